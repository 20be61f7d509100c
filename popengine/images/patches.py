"""Preparation of pictures for Qwen's vision towers: pictures of any size, nearly in their own size, cut into patches.

A picture is resized so that both sides are whole tokens (patch_size times merge_size pixels) and its pixels are within
the processor's limits; proportions are kept as far as possible. Patches come in merge order: patches of one token are
consecutive. A still picture is two equal frames of a video.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from models.families.picture_model import Grid
from popengine.images.images import (
    CLIP_DEFAULTS,
    MOST_RESIZED_PIXELS,
    MOST_STRETCHED,
    Colours,
    ImageSource,
    image_size,
    open_image,
    parse_colours,
    processor_fields,
    processor_name,
)
from popengine.images.vision import Vision
from weights.errors import InputError
from weights.json_files import JsonObject, shown

PROCESSOR = "Qwen2VLImageProcessor"


@dataclass(frozen=True)
class PatchProcessing:
    """The processing of every picture. resized: if False, its sides must be whole tokens already"""

    resized: bool
    least_pixels: int
    most_pixels: int
    patch_size: int
    merge_size: int
    frames: int
    resample: Image.Resampling
    colours: Colours

    @property
    def token_size(self) -> int:
        """Pixels on a side of a token."""
        return self.patch_size * self.merge_size

    def grid(self, height: int, width: int) -> Grid:
        """Compute rows and columns of a picture's tokens, by its size. Raises InputError for a size out of bounds."""
        size, pixels = f"an image is {width} x {height} pixels", height * width
        if max(height, width) > MOST_STRETCHED * min(height, width):
            raise InputError(f"{size}, more than {MOST_STRETCHED} times as long as it is wide: crop it")
        if not self.resized:
            if height % self.token_size or width % self.token_size:
                raise InputError(f"{size}, and the image processor takes multiples of {self.token_size} alone")
            return height // self.token_size, width // self.token_size
        rows, columns = round(height / self.token_size), round(width / self.token_size)
        made = rows * columns * self.token_size**2
        if made > self.most_pixels:
            shrink = math.sqrt(pixels / self.most_pixels)
            rows, columns = (max(1, math.floor(side / shrink / self.token_size)) for side in (height, width))
        elif made < self.least_pixels:
            stretch = math.sqrt(self.least_pixels / pixels)
            rows, columns = (math.ceil(side * stretch / self.token_size) for side in (height, width))
        if rows * columns * self.token_size**2 > MOST_RESIZED_PIXELS:
            raise InputError(
                f"{size}, and its processor would make more than {MOST_RESIZED_PIXELS} of them; scale it down"
            )
        return rows, columns

    def pixel_values(self, image: ImageSource) -> Tensor:
        """Cut one picture into patches, float32 [P, C]. Raises InputError for a picture that cannot be read."""
        picture = open_image(image)
        rows, columns = self.grid(picture.height, picture.width)
        if self.resized:
            picture = picture.resize((columns * self.token_size, rows * self.token_size), self.resample)
        x = self.colours.values(picture)                                            # [3, Y, X]
        cut = (rows, self.merge_size, self.patch_size, columns, self.merge_size, self.patch_size)
        patches = x.view(3, *cut).permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)        # [P, 3, patch, patch]
        return patches[:, :, None].expand(-1, -1, self.frames, -1, -1).flatten(1)   # [P, C]


def parse_patch_processing(fields: JsonObject) -> PatchProcessing:
    """Parse a checkpoint's image processor. Raises InputError if it is not supported or contradicts itself."""
    if (name := processor_name(fields, PROCESSOR)) != PROCESSOR:
        raise InputError(f"{fields.where}: image processor {shown(name)} is not supported here, but {PROCESSOR} is")
    size = fields.section("size")
    least, most = (
        fields.integer(older, size.integer(newer, size.integer(older, default)))
        for older, newer, default in (
            ("min_pixels", "shortest_edge", 56 * 56), ("max_pixels", "longest_edge", 28 * 28 * 1280)
        )
    )
    processing = PatchProcessing(
        resized=fields.boolean("do_resize", True),
        least_pixels=least,
        most_pixels=most,
        patch_size=fields.integer("patch_size", 14),
        merge_size=fields.integer("merge_size", 2),
        frames=fields.integer("temporal_patch_size", 2),
        resample=Image.Resampling(fields.integer("resample", int(Image.Resampling.BICUBIC), 0, 5)),
        colours=parse_colours(fields, CLIP_DEFAULTS),
    )
    if least > most or most < processing.token_size**2:
        raise InputError(
            f"{fields.where}: an image of at least {least} and at most {most} pixels cannot be: the first must not be "
            f"larger, and one token has {processing.token_size**2}"
        )
    return processing


class PatchVision(Vision):
    """Vision for pictures of any size, with tokens in proportion to the size."""

    @cached_property
    def processing(self) -> PatchProcessing:  # type: ignore[override]  # what it makes only this class reads
        """The processing of images. Raises InputError if the configuration is missing, broken or does not fit."""
        processing, vision = parse_patch_processing(processor_fields(self.directory)), self.model.config.vision
        made = processing.patch_size, processing.merge_size, processing.frames
        read = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        if made != read:
            raise InputError(
                f"{self.directory}: the image processor makes patches of {made[0]} pixels, {made[1]} on a side of a "
                f"token, {made[2]} frames, and the vision tower reads {read[0]}, {read[1]} and {read[2]}"
            )
        return processing

    def grid(self, image: ImageSource) -> Grid:
        return self.processing.grid(*image_size(image))

    def pixel_values(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Cut images, paths or Pillow's, into patches, float32 [P, C]. Raises InputError for a bad image."""
        return torch.cat([self.processing.pixel_values(image) for image in images]) if images else None
