"""Conversion of pictures with more than 8 bits per colour to 8 bits.

The high byte of a 16-bit grey is used, as Pillow does for 16-bit colours. The modes I (32-bit integers) and F (floats)
define no range. Theirs is the narrowest that holds all values: 8, 16 or 31 bits (32 without a sign), for floats 0 to 1,
8 or 16 bits. If a value is negative or too large for all of them, the least becomes black and the largest white.

Y rows, X columns.
"""

from typing import Any

import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from weights.errors import InputError

# Tags of a .tiff: bits of a value; meaning of black and white; sign of values.
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339


def eight_bit(picture: Image.Image) -> Image.Image:
    """Convert a grey picture of more than 8 bits to mode L; others stay. Raises InputError for greys not finite."""
    if not picture.mode.startswith("I") and picture.mode != "F":
        return picture
    tags: Any = picture.tag_v2 if isinstance(picture, TiffImageFile) else {}
    data, eight = bytearray(picture.tobytes()), bytearray(picture.width * picture.height)
    if picture.mode == "I":
        grey = of_integers(torch.frombuffer(data, dtype=torch.int32), is_unsigned=tags.get(SAMPLE_FORMAT) == (1,))
    elif picture.mode == "F":
        grey = of_floats(torch.frombuffer(data, dtype=torch.float32))
    else:
        first, second = torch.frombuffer(data, dtype=torch.uint8).view(-1, 2).unbind(dim=1)     # uint8 [Y * X]
        low, grey = (second, first) if picture.mode == "I;16B" else (first, second)
        if tags.get(BITS) == (12,):                                 # the highest four of 16 bits are empty
            grey = (grey << 4) | (low >> 4)
    if tags.get(PHOTOMETRIC) == 0:                                  # white is 0, and Pillow does not invert it here
        grey = 255 - grey
    torch.frombuffer(eight, dtype=torch.uint8).copy_(grey)
    made = Image.frombytes("L", picture.size, bytes(eight))
    made.info = picture.info
    return made


def of_integers(values: Tensor, is_unsigned: bool) -> Tensor:
    """Convert integer greys by their range. int32 [Y * X] -> uint8"""
    values = values.long() & 0xFFFFFFFF if is_unsigned else values.long()
    if values.min() < 0:
        return stretched(values)
    most = values.max()
    bits = next(bits for bits in (8, 16, 32 if is_unsigned else 31) if most < 2**bits)
    return (values >> (bits - 8)).to(torch.uint8)


def of_floats(values: Tensor) -> Tensor:
    """Convert float greys by their range. float32 [Y * X] -> uint8. Raises InputError for values not finite."""
    if not values.isfinite().all():
        raise InputError("an image has greys that are not finite numbers")
    most = values.max()
    if values.min() < 0 or most > 65535:
        return stretched(values)
    return (values * 255 if most <= 1 else values if most <= 255 else values // 256).round().to(torch.uint8)


def stretched(values: Tensor) -> Tensor:
    """Scale values linearly to 0 .. 255. [Y * X] -> uint8"""
    values = values.double() - values.min()
    return (values * 255 / values.max().clamp(min=1e-300)).round().to(torch.uint8)


def eight_bit_key(picture: Image.Image) -> None:
    """Convert the transparent colour of a .png from the file's bits to 8 bits, before Pillow loads the picture."""
    key, tiles = picture.info.get("transparency"), getattr(picture, "tile", [])
    stored = str(tiles[0][-1]) if tiles else ""                     # Pillow's name of how pixels are packed
    if key is None or isinstance(key, bytes):                       # bytes: of a palette
        return
    if stored in ("L;2", "L;4"):
        picture.info["transparency"] = key * 255 // (2 ** int(stored[-1]) - 1)
    elif stored.endswith(";16B"):
        picture.info["transparency"] = key >> 8 if isinstance(key, int) else tuple(one >> 8 for one in key)
