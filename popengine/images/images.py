"""Preparation of pictures for the vision tower: opened, upright, RGB, resized, cropped, rescaled, normalised.

A picture of any format and mode has the same pixels as the picture saved as a PNG of 8-bit RGB. The steps and their
order are those of the checkpoint's own image processor (CLIP's or SigLIP's), read from preprocessor_config.json or from
the `image_processor` part of processor_config.json. Resizing is Pillow's, on bytes, as in transformers' Pillow image
processors, so the pixel values are equal up to rounding.

C colour channels (always 3), Y rows, X columns.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from popengine.images.eight_bits import eight_bit, eight_bit_key
from weights import files
from weights.errors import InputError
from weights.json_files import JsonObject, read_json, shown
from weights.mapped_file import open_binary

ImageSource = str | Path | Image.Image
Taken = TypeVar("Taken")

# Formats, recognised by content and not by name. Pillow reads some forty more, one of which starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Cameras have 61 megapixels, phones 50; decoding takes up to 16 bytes per pixel.
MOST_PIXELS = 64_000_000
# Most pixels after resizing; their values take 24 bytes per pixel. Towers read at most 17 megapixels.
MOST_RESIZED_PIXELS = 24_000_000
# Largest ratio of the long side to the short one, as in Qwen's own processors: rows cost memory beside their pixels,
# and models read only a few patches of such a picture.
MOST_STRETCHED = 200

# The orientation tag of EXIF, and the transformation for its values 2 to 8; 5 to 8 lie on their side.
ORIENTATION = 274
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Defaults of fields that a configuration leaves out, by the class it names.
CLIP_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
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
GEMMA3_DEFAULTS = SIGLIP_DEFAULTS | {"resample": Image.Resampling.BILINEAR}
DEFAULTS = {
    "CLIPImageProcessor": CLIP_DEFAULTS,
    "LlavaImageProcessor": CLIP_DEFAULTS,
    "SiglipImageProcessor": SIGLIP_DEFAULTS,
    "Gemma3ImageProcessor": GEMMA3_DEFAULTS,
}


@dataclass(frozen=True)
class Colours:
    """Conversion of bytes to numbers. None skips the step."""

    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def values(self, picture: Image.Image) -> Tensor:
        """Convert a picture without resizing: float32 [C, Y, X]"""
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        x = x.view(picture.height, picture.width, 3).permute(2, 0, 1)  # [C, Y, X]
        if self.rescale_factor is not None:
            x = x.double() * self.rescale_factor
        x = x.float()
        if self.mean is not None and self.std is not None:
            x = (x - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return x.contiguous()


@dataclass(frozen=True)
class ImageProcessing:
    """The steps for every picture, in this order. Sizes are (Y, X) in pixels; None skips the step."""

    shortest_edge: int | None  # resize, keeping the proportions ...
    resize_to: tuple[int, int] | None  # ... or resize to exactly this
    resample: Image.Resampling
    crop_to: tuple[int, int] | None
    colours: Colours

    def pixel_values(self, image: ImageSource) -> Tensor:
        """Prepare one picture, a path or a Pillow image, for the vision tower: float32 [C, Y, X].

        Raises InputError for a picture that cannot be read or is too large.
        """
        picture = self.cropped(self.resized(open_image(image)))
        return self.colours.values(picture)

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
        if new_width * new_height > MOST_RESIZED_PIXELS:
            raise InputError(
                f"image of {width} x {height} pixels is too long and thin: resized it would have {new_width} x "
                f"{new_height} pixels, and at most {MOST_RESIZED_PIXELS} are held; crop it first"
            )
        return picture.resize((new_width, new_height), self.resample)

    def cropped(self, picture: Image.Image) -> Image.Image:
        if self.crop_to is None:
            return picture
        height, width = self.crop_to
        # Pillow fills the area outside the picture with zeros, as the processors do. If the margin is odd, they put the
        # extra row of a crop at the bottom and that of a filled border at the top: rounding down does both.
        top, left = (picture.height - height) // 2, (picture.width - width) // 2
        return picture.crop((left, top, left + width, top + height))


def open_image(source: ImageSource) -> Image.Image:
    """Open a picture from a path or a Pillow image: fully read, upright (EXIF), RGB, transparency composed on white.

    Raises InputError if the file is missing, is no image of FORMATS, is damaged, or has too many pixels.
    """
    return from_image(source, upright_rgb)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Return height and width of the picture that `open_image` would return, without reading its pixels."""
    return from_image(source, upright_size)


def from_image(source: ImageSource, take: Callable[[Image.Image], Taken]) -> Taken:
    """Open a picture and return `take` of it. Raises InputError as `open_image` does."""
    if isinstance(source, Image.Image):
        return take(source)
    path = Path(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow's warnings about what it tolerates
            with open_binary(path) as file, Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise InputError(
                        f"image too large: {path} has {picture.width} x {picture.height} pixels, and at most "
                        f"{MOST_PIXELS} are read; scale it down first"
                    )
                if max(picture.size) > MOST_STRETCHED * min(picture.size):
                    raise InputError(
                        f"image too long and thin: {path} has {picture.width} x {picture.height} pixels, and at most "
                        f"{MOST_STRETCHED} times as long as wide is read; crop it first"
                    )
                return take(picture)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"not an image of a kind that is read ({', '.join(FORMATS)}): {path}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"image too large: {path} ({error}); scale it down first") from error
    except MemoryError as error:
        raise InputError(f"image too large for this machine's memory: {path}; scale it down first") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"damaged or truncated image: {path} ({reason})") from error


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Return height and width after turning the picture upright."""
    width, height = picture.size
    orientation = picture.getexif().get(ORIENTATION)
    if isinstance(picture, TiffImageFile) and orientation is not None:
        width, height = picture.tag_v2[256], picture.tag_v2[257]    # as stored: Pillow may have turned it already
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Read the pixels, turn the picture upright and convert it to RGB."""
    eight_bit_key(picture)
    picture.load()
    # Pillow has turned a .tiff already; it then has no orientation any more.
    turn = UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
    picture = on_white(eight_bit(picture))
    return picture if turn is None else picture.transpose(turn)


def on_white(picture: Image.Image) -> Image.Image:
    """Convert to RGB, with transparency composed on white."""
    picture = picture.convert({"La": "LA", "RGBa": "RGBA"}.get(picture.mode, picture.mode))
    # Other modes have no transparency, or none that Pillow can convert.
    if picture.mode in ("1", "LA", "PA", "RGBA", "P", "L", "RGB") and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def read_image_processing(directory: Path) -> ImageProcessing:
    """Read the checkpoint's image processing.

    Raises InputError if both files are missing, one is broken, or a step is not implemented.
    """
    return parse_image_processing(processor_fields(directory))


def processor_fields(directory: Path) -> JsonObject:
    """Read the fields of the checkpoint's image processor. Raises InputError if there is no file, or it is broken."""
    joint = directory / files.PROCESSOR
    nested = JsonObject(read_json(joint, optional=True), str(joint))
    if nested.get("image_processor") is not None:
        return nested.section("image_processor")
    path = directory / files.IMAGE_PROCESSOR
    if not path.exists():
        raise InputError(
            f"no image processor configuration in {directory}: "
            "preprocessor_config.json, or processor_config.json with an image_processor part, is needed to read images"
        )
    return JsonObject(read_json(path), str(path))


def processor_name(fields: JsonObject, default: str) -> str:
    """Return the class of the image processor, without the suffix of its variant."""
    name = fields.text("image_processor_type", fields.text("feature_extractor_type", default))
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def parse_image_processing(fields: JsonObject) -> ImageProcessing:
    """Parse the fields of an image processor. Raises InputError for a class or a step that is not supported."""
    name = processor_name(fields, "CLIPImageProcessor")
    if name not in DEFAULTS:
        raise InputError(
            f"{fields.where}: image processor {shown(name)} is not supported; supported are {', '.join(DEFAULTS)}"
        )
    for step in ("do_pad", "do_pan_and_scan"):
        if fields.boolean(step, False):
            raise InputError(f"{fields.where}: an image processor with {step} is not supported")
    default = DEFAULTS[name]
    resized, cropped = (fields.boolean(f"do_{step}", default[f"do_{step}"]) for step in ("resize", "center_crop"))
    size = size_of(fields, "size", default["size"], square="height" in default["size"])
    if size.get("longest_edge") is not None:
        raise InputError(f"{size.where}: longest_edge is not supported")
    keeps_proportions = size.get("shortest_edge") is not None
    crop = size_of(fields, "crop_size", default["crop_size"], square=True)
    return ImageProcessing(
        shortest_edge=size.integer("shortest_edge", None) if resized and keeps_proportions else None,
        resize_to=height_and_width(size) if resized and not keeps_proportions else None,
        resample=Image.Resampling(fields.integer("resample", int(default["resample"]), 0, 5)),
        crop_to=height_and_width(crop) if cropped else None,
        colours=parse_colours(fields, default),
    )


def parse_colours(fields: JsonObject, default: dict[str, Any]) -> Colours:
    """Parse the fields of rescaling and normalising."""
    normalized = fields.boolean("do_normalize", default["do_normalize"])
    return Colours(
        rescale_factor=fields.number("rescale_factor", 1 / 255) if fields.boolean("do_rescale", True) else None,
        mean=three(fields, "image_mean", default["image_mean"], positive=False) if normalized else None,
        std=three(fields, "image_std", default["image_std"], positive=True) if normalized else None,
    )


def size_of(fields: JsonObject, name: str, default: dict[str, int], square: bool) -> JsonObject:
    """Return a size as an object; a bare number stands for both sides of a square, or for the shortest edge."""
    value = fields.get(name, default)
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    return JsonObject({name: value}, fields.where).section(name)


def height_and_width(size: JsonObject) -> tuple[int, int]:
    """Return height and width of a size."""
    return size.integer("height", None), size.integer("width", None)


def three(fields: JsonObject, name: str, default: list[float], positive: bool) -> tuple[float, ...]:
    """Return a value per colour channel; one number stands for all three."""
    values = fields.numbers(name, default, positive)
    if len(values) not in (1, 3):
        raise InputError(f"{fields.where}: {name} must be one number or three, not {len(values)}")
    return values * (3 // len(values))
