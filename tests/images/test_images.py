"""Image processing: the same pixel values as transformers' Pillow processors, and one clear line for a bad picture."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tolerance import assert_same
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from popengine.evaluation.picture_tasks import picture_questions
from popengine.images import images
from popengine.images.images import open_image, parse_image_processing, read_image_processing, upright_rgb
from weights.errors import InputError
from weights.json_files import JsonObject


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture with structure at every scale, so that a wrong filter or a shift of one pixel shows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height * width * len(mode),), generator=generator, dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), bytes(values.tolist()))


def written(directory: Path, content: dict | list | str, name: str = "preprocessor_config.json") -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [(96, 96, "RGB"), (131, 77, "RGB"), (50, 203, "RGBA"), (33, 20, "L"), (61, 61, "P"), (224, 224, "RGB")],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 49}},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 46}},  # the crop is larger: zeros around
        {"size": {"height": 40, "width": 30}, "do_center_crop": False, "resample": 2},
        {"do_resize": False, "do_center_crop": False, "do_normalize": False, "resample": 0},
        {"do_rescale": False, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 1},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 127.5},
    ],
)
def test_pixel_values_equal_the_clip_processor(
    width: int, height: int, mode: str, settings: dict, tmp_path: Path
) -> None:
    picture = noise(width, height).quantize(16) if mode == "P" else noise(width, height, mode)
    reference = CLIPImageProcessorPil(**settings)
    reference.save_pretrained(tmp_path)
    expected = reference(picture, return_tensors="pt")["pixel_values"][0]
    assert_same(read_image_processing(tmp_path).pixel_values(picture), expected)


def test_pixel_values_equal_the_siglip_processor() -> None:
    picture = noise(75, 51)
    for settings in ({}, {"size": {"height": 28, "width": 28}}):
        expected = SiglipImageProcessorPil(**settings)(picture, return_tensors="pt")["pixel_values"][0]
        named = {"image_processor_type": "SiglipImageProcessorFast", **settings}
        ours = parse_image_processing(JsonObject(named, "test"))
        assert_same(ours.pixel_values(picture), expected)


def test_configuration_may_be_a_part_of_processor_config(tmp_path: Path) -> None:
    part = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "crop_size": 28}
    written(tmp_path, {"image_processor": part, "processor_class": "LlavaProcessor"}, "processor_config.json")
    written(tmp_path, {"size": {"shortest_edge": 99}})
    processing = read_image_processing(tmp_path)
    assert (processing.shortest_edge, processing.crop_to) == (30, (28, 28))


def test_older_configurations_give_sizes_as_whole_numbers(tmp_path: Path) -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 224}
    processing = read_image_processing(written(tmp_path, old))
    assert (processing.shortest_edge, processing.crop_to) == (336, (224, 224))


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    picture = picture_questions(1, seed=0)[0].picture(48).crop((0, 0, 48, 32))
    sideways = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    sideways.save(tmp_path / "sideways.png", exif=exif)
    assert open_image(tmp_path / "sideways.png").tobytes() == picture.tobytes()


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert open_image(half).getpixel((0, 0)) == (255, 127, 127)


def test_a_picture_that_cannot_be_read_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(64, 64).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:5000])
    noise(64, 64).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:1500])
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    monkeypatch.setattr(images, "MOST_PIXELS", 10_000)
    noise(150, 100).save(tmp_path / "large.png")
    noise(150, 200).save(tmp_path / "bomb.png")
    for name, message in [
        ("missing.png", "cannot be read: No such file"),
        ("", "is not a file, but a directory"),
        ("pipe.png", "is not a file, but a pipe or device"),
        ("script.png", "not an image of a kind that is read"),
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
        ("cut.png", "damaged or truncated image"),
        ("cut.jpg", "damaged or truncated image"),
        ("large.png", "image too large.*at most 10000 are read"),
        ("bomb.png", "image too large.*at most 10000 are read"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            open_image(tmp_path / name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_of_8_bits_are_read_as_transformers_reads_them(mode: str) -> None:
    picture = noise(9, 7).convert(mode)
    assert upright_rgb(picture).tobytes() == load_image(picture).tobytes()


def test_a_long_thin_picture_is_refused_before_it_is_blown_up() -> None:
    processing = parse_image_processing(JsonObject({}, "test"))
    with pytest.raises(InputError, match="100000 x 1 pixels is too long and thin"):
        processing.pixel_values(Image.new("RGB", (100_000, 1)))


def test_bad_configuration_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image processor configuration"):
        read_image_processing(tmp_path)
    for content, message in [
        ("{", "preprocessor_config.json is not valid JSON"),
        ([1], "is not a JSON object, but list"),
        ({"size": {"width": 3}}, "size: height must be an integer of at least 1 and at most .*, not None"),
        ({"size": {"shortest_edge": 0}}, "shortest_edge must be an integer .*, not 0"),
        ({"size": "large"}, "size must be an object, not 'large'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be one number or three, not 2"),
        ({"image_std": [0, 1, 1]}, "image_std must be a positive number, not 0"),
        ({"resample": 77}, "77"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "'LlavaNextImageProcessor' is not supported.*CLIPImage"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            read_image_processing(written(tmp_path, content))
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="image_processor must be an object, not 3"):
        read_image_processing(written(tmp_path, {"image_processor": 3}, "processor_config.json"))
