"""Pictures as the vision tower wants them: opened, upright, RGB, resized, cropped, rescaled, normalised.

The steps and their order are those of the checkpoint's own image processor (CLIP's or SigLIP's), read from
preprocessor_config.json or from the `image_processor` part of processor_config.json. Resizing is Pillow's, on bytes,
as in transformers' Pillow image processors, so the pixel values are the same to rounding.

C colour channels (always 3), Y rows, X columns.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from weights.errors import InputError

ImageSource = str | Path | Image.Image

# What a configuration means when it leaves a field out: the defaults of the class it names.
CLIP_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP_DEFAULTS = CLIP_DEFAULTS | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
DEFAULTS = {
    "CLIPImageProcessor": CLIP_DEFAULTS,
    "LlavaImageProcessor": CLIP_DEFAULTS,
    "SiglipImageProcessor": SIGLIP_DEFAULTS,
}


@dataclass(frozen=True)
class ImageProcessing:
    """What is done to every picture, in this order. Sizes are (Y, X) in pixels; None skips the step."""

    shortest_edge: int | None  # resize, keeping the proportions ...
    resize_to: tuple[int, int] | None  # ... or resize to exactly this
    resample: Image.Resampling
    crop_to: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def pixel_values(self, image: ImageSource) -> Tensor:
        """One picture, a path or a Pillow image, as the vision tower reads it: float32 [C, Y, X].

        Raises InputError for a picture that cannot be read or is too large.
        """
        picture = self.cropped(self.resized(open_image(image)))
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        x = x.view(picture.height, picture.width, 3).permute(2, 0, 1)  # [C, Y, X]
        if self.rescale_factor is not None:
            x = x.double() * self.rescale_factor
        x = x.float()
        if self.mean is not None and self.std is not None:
            x = (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return x.contiguous()

    def resized(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        if self.resize_to is not None:
            new_height, new_width = self.resize_to
        elif self.shortest_edge is not None:
            short, long = sorted((width, height))
            new_long = int(self.shortest_edge * long / short)
            new_width, new_height = (
                (self.shortest_edge, new_long) if width <= height else (new_long, self.shortest_edge)
            )
        else:
            return picture
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and new_width * new_height > limit:
            raise InputError(
                f"image of {width} x {height} pixels is too long and thin: resized it would have {new_width} x "
                f"{new_height} pixels, above Pillow's limit of {limit}; crop it first"
            )
        return picture.resize((new_width, new_height), self.resample)

    def cropped(self, picture: Image.Image) -> Image.Image:
        if self.crop_to is None:
            return picture
        height, width = self.crop_to
        # Pillow fills what lies outside the picture with zeros, as the processors do. Where the margin is odd, they
        # put the extra row of a cut at the bottom and that of a filled border at the top: rounding down does both.
        top, left = (picture.height - height) // 2, (picture.width - width) // 2
        return picture.crop((left, top, left + width, top + height))


def open_image(source: ImageSource) -> Image.Image:
    """A picture from a path or a Pillow image: fully read, turned upright (EXIF), RGB, transparency laid on white.

    Raises InputError where there is no such file, it is not an image, is damaged, or is above Pillow's limit on pixels.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    path = Path(source)
    if not path.exists():
        raise InputError(f"no such image: {path}")
    if not path.is_file():
        raise InputError(f"not an image: {path} is not a file")
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit; a prompt that needs gigabytes to decode is refused at once.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return upright_rgb(picture)
    except UnidentifiedImageError as error:
        raise InputError(f"not an image that Pillow can read: {path}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"image too large: {path} is above Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels; scale it down first"
        ) from error
    except MemoryError as error:
        raise InputError(f"image too large for this machine's memory: {path}; scale it down first") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"damaged or truncated image: {path} ({reason})") from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def read_image_processing(directory: Path) -> ImageProcessing:
    """The checkpoint's image processing.

    Raises InputError where neither file is there, a file is broken, or it asks for a step that is not done here.
    """
    nested = read_json(directory / "processor_config.json").get("image_processor")
    if nested is not None:
        return parse_image_processing(nested, f"{directory / 'processor_config.json'}, image_processor")
    path = directory / "preprocessor_config.json"
    if not path.exists():
        raise InputError(
            f"no image processor configuration in {directory}: "
            "preprocessor_config.json, or processor_config.json with an image_processor part, is needed to read images"
        )
    return parse_image_processing(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"broken image processor configuration: {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"broken image processor configuration: {path} holds no JSON object")
    return content


def parse_image_processing(content: Any, where: str) -> ImageProcessing:
    if not isinstance(content, dict):
        raise InputError(f"broken image processor configuration: {where} is not a JSON object")
    name = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "CLIPImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in DEFAULTS:
        raise InputError(f"image processor {name!r} is not supported ({where}); supported are {', '.join(DEFAULTS)}")
    if content.get("do_pad"):
        raise InputError(f"image processor with do_pad is not supported ({where})")
    fields = DEFAULTS[name] | {key: value for key, value in content.items() if value is not None}
    size = fields["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if name != "SiglipImageProcessor" else {"height": size, "width": size}
    try:
        keeps_proportions = "shortest_edge" in size
        if "longest_edge" in size:
            raise ValueError("size.longest_edge is not supported")
        resample = fields["resample"]
        if isinstance(fields["crop_size"], int):
            fields["crop_size"] = {"height": fields["crop_size"], "width": fields["crop_size"]}
        normalized = bool(fields["do_normalize"])
        return ImageProcessing(
            shortest_edge=positive(size["shortest_edge"]) if fields["do_resize"] and keeps_proportions else None,
            resize_to=height_and_width(size) if fields["do_resize"] and not keeps_proportions else None,
            resample=Image.Resampling(resample),
            crop_to=height_and_width(fields["crop_size"]) if fields["do_center_crop"] else None,
            rescale_factor=float(fields["rescale_factor"]) if fields["do_rescale"] else None,
            mean=three(fields["image_mean"], "image_mean") if normalized else None,
            std=three(fields["image_std"], "image_std") if normalized else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error} in size or crop_size" if isinstance(error, KeyError) else str(error)
        raise InputError(f"broken image processor configuration: {where}: {reason}") from error


def height_and_width(size: dict[str, Any]) -> tuple[int, int]:
    return positive(size["height"]), positive(size["width"])


def positive(pixels: Any) -> int:
    if not isinstance(pixels, int) or pixels < 1:
        raise ValueError(f"a size of {pixels!r} pixels; a whole number above 0 is needed")
    return pixels


def three(values: Any, name: str) -> tuple[float, ...]:
    """A value per colour channel; one number stands for all three."""
    numbers = tuple(float(value) for value in (values if isinstance(values, list) else [values] * 3))
    if len(numbers) != 3 or (name == "image_std" and 0.0 in numbers):
        raise ValueError(f"{name} is {values!r}; three numbers are needed, and none of image_std may be 0")
    return numbers
