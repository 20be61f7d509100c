"""Every format, mode and orientation gives the pixels of the same picture stored as 8-bit RGB; small and large ones."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tolerance import assert_same
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from popengine.images.images import image_size, open_image, parse_image_processing
from popengine.images.patches import parse_patch_processing
from weights.errors import InputError
from weights.json_files import JsonObject

# What the orientations of EXIF mean: the upright picture of the stored rows [Y, X, C].
UPRIGHT = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
GREYS = ("1", "L", "I;16", "I;16B", "I;16 low", "I 8", "I 16", "I 31", "F 1", "F 8", "F 16")
COLOURS = ("LA", "P", "PA", "RGB", "RGBA", "CMYK", "P transparent", "L key", "RGB key")
FORMATS = {
    "PNG": ("1", "L", "I;16", "I;16 low", "LA", "P", "RGB", "RGBA", "P transparent", "L key", "RGB key"),
    "TIFF": (*GREYS, "LA", "P", "PA", "RGB", "RGBA", "CMYK"),
    "TIFF, tiff_lzw": ("1", "L", "I;16", "I 16", "F 1", "RGB", "RGBA", "P"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "P transparent"),
    "BMP": ("1", "L", "P", "RGB"),
}
CASES = [(name, mode) for name, modes in FORMATS.items() for mode in modes]


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Of pixels that are there or not, as whole ones."""
    return np.where(alpha[..., None] > 0, rgb, 255).astype(np.uint8)


def stored(mode: str, seed: int, height: int, width: int) -> tuple[Image.Image, np.ndarray, dict[str, Any]]:
    """A picture in a mode, its pixels [Y, X, 3] as 8-bit RGB, and how it is saved."""
    random = np.random.default_rng(seed)
    grey = random.integers(0, 256, (height, width), np.uint8)
    rgb = random.integers(0, 256, (height, width, 3), np.uint8)
    grey[0, :2] = 0, 255                                            # both ends, so that the range is known
    alpha = random.choice(np.array([0, 255], np.uint8), (height, width))
    of_grey = np.stack([grey] * 3, axis=-1)
    wide = grey.astype(np.uint16)
    if mode == "1":
        return Image.fromarray(grey).point(lambda v: 255 * (v > 127), "1"), 255 * (of_grey > 127).astype(np.uint8), {}
    if mode in GREYS:
        values = {
            "L": grey, "I;16": wide * 257, "I;16B": (wide * 257).astype(">u2"),
            "I;16 low": wide * 256 + random.integers(0, 256, grey.shape, np.uint16),
            "I 8": grey.astype(np.int32), "I 16": grey.astype(np.int32) * 257, "I 31": grey.astype(np.int32) << 23,
            "F 1": grey.astype(np.float32) / 255, "F 8": grey.astype(np.float32), "F 16": grey.astype(np.float32) * 257,
        }[mode]
        return Image.frombytes(mode.split()[0], (width, height), values.tobytes()), of_grey, {}
    if mode == "RGB":
        return Image.fromarray(rgb), rgb, {}
    if mode in ("LA", "RGBA"):
        colours = of_grey if mode == "LA" else rgb
        bands = (grey, alpha) if mode == "LA" else (*rgb.transpose(2, 0, 1), alpha)
        return Image.merge(mode, [Image.fromarray(band) for band in bands]), on_white(colours, alpha), {}
    if mode == "CMYK":
        picture = Image.frombytes("CMYK", (width, height), random.bytes(4 * height * width))
        return picture, np.array(picture.convert("RGB")), {}
    if mode == "L key":
        return Image.fromarray(grey), on_white(of_grey, grey != 255), {"transparency": 255}
    if mode == "RGB key":
        key = tuple(map(int, rgb[1, 1]))
        return Image.fromarray(rgb), on_white(rgb, (rgb != rgb[1, 1]).any(axis=-1)), {"transparency": key}
    indices = random.integers(0, 16, (height, width), np.uint8)
    palette = random.integers(0, 256, (16, 3), np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())                           # mode P from here on
    colours = palette[indices]
    if mode == "PA":
        picture = Image.merge("LA", [Image.fromarray(indices), Image.fromarray(alpha)])
        picture.putpalette(palette.tobytes())
        return picture, on_white(colours, alpha), {}
    if mode == "P transparent":
        return picture, on_white(colours, indices != 3), {"transparency": 3}
    return picture, colours, {}


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(case=st.sampled_from(CASES), orientation=st.sampled_from(sorted(UPRIGHT)), seed=st.integers(0, 1000),
       height=st.integers(2, 9), width=st.integers(2, 9))
def test_a_picture_is_itself_in_every_format_mode_and_orientation(
    case: tuple[str, str], orientation: int, seed: int, height: int, width: int, tmp_path_factory: Any
) -> None:
    (name, mode), path = case, tmp_path_factory.mktemp("picture") / "picture"
    picture, pixels, saved = stored(mode, seed, height, width)
    kind, _, compression = name.partition(", ")
    if compression:
        saved |= {"compression": compression}
    if kind == "WEBP":
        saved |= {"lossless": True, "exact": True}
    if kind in ("GIF", "BMP"):
        orientation = 1                                             # they have no word for it
    elif kind == "TIFF":
        saved |= {"tiffinfo": {274: orientation}}
    else:
        exif = Image.Exif()
        exif[274] = orientation
        saved |= {"exif": exif}
    picture.save(path, kind, **saved)
    if kind == "JPEG":
        with Image.open(path) as read:                              # what it has lost, and no more
            pixels = np.array(read.convert("RGB"))
    upright = UPRIGHT[orientation](pixels)
    found = np.array(open_image(path))
    np.testing.assert_array_equal(found, upright)
    assert image_size(path) == found.shape[:2]
    plain = path.with_suffix(".png")
    Image.fromarray(np.ascontiguousarray(upright)).save(plain)
    assert open_image(plain).tobytes() == found.tobytes()
    if mode in ("1", "L", "P", "RGB", "CMYK") and (kind != "TIFF" or orientation == 1):     # which it turns twice
        assert load_image(str(path)).tobytes() == found.tobytes()


def test_every_mode_and_orientation_is_among_them() -> None:
    assert {mode for _, mode in CASES} == {*GREYS, *COLOURS}


def png(depth: int, colour: int, rows: list[bytes], width: int, key: bytes = b"") -> io.BytesIO:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    transparent = chunk(b"tRNS", key) if key else b""
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + transparent + data + chunk(b"IEND", b""))


@pytest.mark.parametrize(("depth", "colour", "row", "width", "key", "wanted"), [
    (1, 0, b"\x40", 2, b"", [0, 255]), (1, 0, b"\x40", 2, b"\0\0", [255, 255]), (1, 0, b"\x40", 2, b"\0\1", [0, 255]),
    (2, 0, b"\x1b", 4, b"", [0, 85, 170, 255]), (2, 0, b"\x1b", 4, b"\0\1", [0, 255, 170, 255]),
    (4, 0, b"\x0e", 2, b"", [0, 238]), (4, 0, b"\x0e", 2, b"\0\0", [255, 238]),
    (16, 0, b"\x03\x01\xc8\x05", 2, b"", [3, 200]), (16, 0, b"\x03\x01\xc8\x05", 2, b"\xc8\x05", [3, 255]),
    (16, 2, 3 * b"\x03\x01" + 3 * b"\xc8\x05", 2, 3 * b"\xc8\x05", [3, 255]),
    (16, 4, b"\x03\x01\xff\xff\xc8\x05\x00\x00", 2, b"", [3, 255]),
    (16, 6, 3 * b"\x03\x01" + b"\0\0" + 3 * b"\xc8\x05" + b"\xff\xff", 2, b"", [255, 200]),
])
def test_bit_depths_of_png_and_their_transparent_colours(
    depth: int, colour: int, row: bytes, width: int, key: bytes, wanted: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(depth, colour, [row], width, key).getvalue())
    assert np.array(open_image(path))[0].tolist() == [[value] * 3 for value in wanted]


def tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A .tiff as cameras and microscopes write it: one strip, one row, no compression."""
    data = values.tobytes()
    tags = [(256, 3, 8 * len(data) // bits), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8 + 2 + 12 * 10 + 4), (277, 3, 1), (278, 3, 1), (279, 4, len(data)), (339, 3, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + data


@pytest.mark.parametrize(("values", "about", "wanted"), [
    (np.array([0, 257, 65535], "<u2"), (16, 0), [255, 254, 0]),                     # white is 0
    (np.array([0, 1 / 255, 1], "<f4"), (32, 0, 3), [255, 254, 0]),
    (np.array([0, 7 << 24, 255 << 24], "<u4"), (32, 1, 1), [0, 7, 255]),
    (np.array([0, 255, 65535], "<u4"), (32, 1, 1), [0, 0, 255]),
    (np.array([-100, 0, 155], "<i2"), (16, 1, 2), [0, 100, 255]),                   # stretched
    (np.array([-1, 0, 1], "<f4"), (32, 1, 3), [0, 128, 255]),
    (np.array([-7, -7, -7], "<i4"), (32, 1, 2), [0, 0, 0]),
    (np.array([0, 1e30, 3e38], "<f4"), (32, 1, 3), [0, 0, 255]),
    (np.array([0x01, 0x00, 0x80, 0xFF, 0xF7, 0xF0], "u1"), (12, 1), [0x01, 0x08, 0xFF, 0x7F]),    # two in three bytes
])
def test_values_of_tiff(values: np.ndarray, about: tuple[int, ...], wanted: list[int], tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    path.write_bytes(tiff(values, *about))
    assert np.array(open_image(path))[0, :, 0].tolist() == wanted


def test_greys_that_are_no_numbers_are_one_line(tmp_path: Path) -> None:
    for value in ("nan", "inf"):
        Image.frombytes("F", (2, 1), np.array([0, float(value)], np.float32).tobytes()).save(tmp_path / "bad.tiff")
        with pytest.raises(InputError, match="not finite"):
            open_image(tmp_path / "bad.tiff")


@pytest.mark.parametrize("mode", ["La", "RGBa", "I;16L", "YCbCr", "HSV", "LAB", "RGBX"])
def test_pictures_in_memory_may_have_modes_that_no_file_has(mode: str) -> None:
    source = Image.new("LA" if mode == "La" else "RGBA" if mode == "RGBa" else "RGB", (3, 2), 200)
    picture = Image.new(mode, (3, 2), 200 << 8) if mode == "I;16L" else source.convert(mode)
    assert open_image(picture).mode == "RGB"


def test_a_photo_of_26_megapixels_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6240, 4168), (9, 99, 199)).save(tmp_path / "photo.jpg", exif=exif)
    assert image_size(tmp_path / "photo.jpg") == (6240, 4168)
    assert open_image(tmp_path / "photo.jpg").size == (4168, 6240)
    Image.new("1", (8200, 8200)).save(tmp_path / "bomb.png")
    for read in (open_image, image_size):
        with pytest.raises(InputError, match="at most 64000000 are read"):
            read(tmp_path / "bomb.png")


SMALL = [(1, 1), (2, 5), (5, 2), (13, 100), (100, 13), (7, 7), (1, 200), (27, 28), (3, 3), (3, 40), (1, 3)]


@pytest.mark.parametrize("size", SMALL, ids=str)
def test_small_pictures_are_enlarged_as_the_processors_do(size: tuple[int, int]) -> None:
    """Smaller than a patch, too. What rows are is said: three of them could be three colours."""
    picture = Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1]))
    asked = {"return_tensors": "pt", "input_data_format": "channels_last"}
    for name, reference in (("CLIPImageProcessor", CLIPImageProcessorPil()),
                            ("SiglipImageProcessor", SiglipImageProcessorPil()),
                            ("Gemma3ImageProcessor", Gemma3ImageProcessorPil())):
        wanted = reference(picture, **asked)["pixel_values"][0]
        ours = parse_image_processing(JsonObject({"image_processor_type": name}, "test"))
        assert_same(ours.pixel_values(picture), wanted)
    for limits in ({}, {"min_pixels": 4 * 784, "max_pixels": 8 * 784}, {"min_pixels": 1, "max_pixels": 784}):
        reference = Qwen2VLImageProcessorPil(**limits)
        wanted = reference(picture, **asked)
        ours = parse_patch_processing(JsonObject(limits, "test"))
        assert_same(ours.pixel_values(picture), wanted["pixel_values"])
        rows, columns = ours.grid(size[1], size[0])
        assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
