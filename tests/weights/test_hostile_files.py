"""Whatever stands in a checkpoint's files: one line, at once and without the memory it asks for, or a right answer.

Every test has a generator of its own; a case is a change to the files of a small checkpoint that works.
"""

import io
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LLAVA_TINY, MIXTRAL_TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_gemma import complete_gemma
from tiny_qwen_vl import FAMILIES as QWENS
from tiny_qwen_vl import complete_qwen

from popengine.engine.loading import end_of_sequence_ids, load_model
from popengine.images.images import parse_image_processing, processor_fields, read_image_processing
from popengine.images.patches import parse_patch_processing
from popengine.text.chat import read_chat_template
from popengine.text.tokenizer import TextTokenizer, open_tokenizer
from weights.checkpoint import checkpoint_dtype, open_checkpoint
from weights.errors import InputError
from weights.json_files import JsonObject
from weights.memory import peak_memory_bytes

CPU = torch.device("cpu")
MOST_SECONDS, MOST_BYTES = 2.0, 500_000_000


def cases(count: int) -> settings:
    """So many of a test: the same at every run, so that what fails once fails again."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


# What may stand in a JSON file, and what it should least be believed.
numbers = st.one_of(
    st.integers(-3, 3), st.sampled_from([10**9, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 5e-324, 0.5, 1e9]),
    st.floats(allow_nan=True),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["x" * 10_000, "\x1b[2J\n"]))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["rope_type", "factor", "rope_theta", "height", "content"]), inner, max_size=3
), max_leaves=6)


@contextmanager
def bounded() -> Iterator[None]:
    """An InputError of one printable line, or nothing; and neither long nor large."""
    began, before = time.process_time(), peak_memory_bytes(CPU)
    try:
        yield
    except InputError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 1100, repr(str(error))
    assert time.process_time() - began < MOST_SECONDS
    assert peak_memory_bytes(CPU) - before < MOST_BYTES


def read_all(folder: Path) -> None:
    """Everything that is read of a folder before the first prompt."""
    read_model(folder, open_tokenizer)
    read_chat_template(folder)
    if (folder / "preprocessor_config.json").exists():
        read_image_processing(folder)


def read_model(folder: Path, tokenizer_of: Callable[[Path], TextTokenizer]) -> None:
    """Everything that is read of config.json and the weights, with a tokenizer that is opened after the model."""
    with open_checkpoint(folder) as checkpoint:
        checkpoint_dtype(checkpoint)
        load_model(checkpoint, torch.float32, CPU)
        end_of_sequence_ids(checkpoint, tokenizer_of(folder))


# For tests that leave the tokenizer's files as they are: to open one starts a process, which costs more than the model.
opened_once = cache(open_tokenizer)


@pytest.fixture(scope="module")
def copies(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that a test may write into, by family."""
    folder = tmp_path_factory.mktemp("copies")
    sources = {"llama": checkpoint, "mixtral": MIXTRAL_TINY, "llava": LLAVA_TINY}
    return {name: shutil.copytree(source, folder / name) for name, source in sources.items()}


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


FIELDS = (
    "architectures", "model_type", "torch_dtype", "eos_token_id", "hidden_size", "intermediate_size", "hidden_act",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "quantization_config",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers",
    "decoder_sparse_step", "shared_expert_intermediate_size", "text_config", "vision_config", "image_token_index",
    "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "image_size", "patch_size",
)
KINDS = ("qwen2", "qwen3", "mistral", "qwen2_moe", "qwen3_moe", "siglip_vision_model")
PARTS = ("", "text_config", "vision_config")
PROCESSING = parse_image_processing(JsonObject({}, "test"))
families = st.sampled_from(["llama", "mixtral", "llava"])


@pytest.mark.slow
@cases(700)
@given(
    family=families, part=st.sampled_from(PARTS), kind=st.none() | st.sampled_from(KINDS),
    fields=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3),
)
def test_any_value_in_any_field_of_a_config(
    copies: dict[str, Path], family: str, part: str, fields: dict[str, Any], kind: str | None
) -> None:
    path = copies[family] / "config.json"
    config = json.loads(path.read_text())
    inner = config.get(part) if part else config
    (inner if isinstance(inner, dict) else config).update(fields | ({"model_type": kind} if kind else {}))
    with changed(path, json.dumps(config).encode()), bounded():
        read_model(copies[family], opened_once)


@cases(150)
@given(family=families, part=st.sampled_from(PARTS), name=st.sampled_from(FIELDS),
       size=st.sampled_from([1000, 65_536, 10**6, 10**9, 2**31, 2**62]))
def test_no_size_in_a_config_is_built_before_it_is_held_to_the_tensors(
    copies: dict[str, Path], family: str, part: str, name: str, size: int
) -> None:
    path = copies[family] / "config.json"
    config = json.loads(path.read_text())
    inner = config.get(part) if part else config
    (inner if isinstance(inner, dict) else config)[name] = size
    began, before = time.process_time(), peak_memory_bytes(CPU)
    with changed(path, json.dumps(config).encode()), bounded():
        read_model(copies[family], opened_once)
    assert time.process_time() - began < 1.0 and peak_memory_bytes(CPU) - before < 300_000_000


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: complete_qwen(tmp_path_factory.mktemp("qwen"), name) for name in QWENS}


QWEN_FIELDS = (
    "model_type", "depth", "embed_dim", "hidden_size", "out_hidden_size", "intermediate_size", "mlp_ratio", "num_heads",
    "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size", "window_size", "fullatt_block_indexes",
    "num_position_embeddings", "deepstack_visual_indexes", "hidden_act", "rope_parameters", "rope_scaling",
    "image_token_id", "video_token_id", "tie_word_embeddings", "text_config", "vision_config", "head_dim", "vocab_size",
    "num_hidden_layers", "min_pixels", "max_pixels", "merge_size", "size", "do_resize", "resample", "image_mean",
)


@pytest.mark.slow
@cases(400)
@given(
    family=st.sampled_from(QWENS), fields=st.dictionaries(st.sampled_from(QWEN_FIELDS), values, min_size=1, max_size=3),
    part=st.sampled_from(["config", "text_config", "vision_config", "rope_parameters", "preprocessor_config"]),
    section=st.lists(numbers, max_size=4), size=st.sampled_from([(4, 4), (40, 30), (800, 4), (1, 1)]),
)
def test_any_value_in_what_a_qwen_vl_reads(
    qwens: dict[str, Path], family: str, part: str, fields: dict[str, Any], section: list[Any], size: tuple[int, int]
) -> None:
    folder = qwens[family]
    path = folder / ("preprocessor_config.json" if part == "preprocessor_config" else "config.json")
    whole = json.loads(path.read_text())
    if part == "rope_parameters":
        whole["text_config"][part]["mrope_section"] = section
    else:
        whole.get(part, whole).update(fields)
    with changed(path, json.dumps(whole).encode()), bounded():
        with open_checkpoint(folder) as checkpoint:
            model, _ = load_model(checkpoint, torch.float32, CPU)
        processing = parse_patch_processing(processor_fields(folder))
        read = model.config.vision.patch_size, model.config.vision.spatial_merge_size
        if (processing.patch_size, processing.merge_size, processing.frames) == (*read, 2):
            picture = Image.new("RGB", size)
            grid = processing.grid(picture.height, picture.width)
            if grid[0] * grid[1] < 1000:
                model.encode_images(processing.pixel_values(picture), [grid])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_gemma(tmp_path_factory.mktemp("gemma"))


GEMMA_FIELDS = (
    "model_type", "text_config", "vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index",
    "eoi_token_id", "tie_word_embeddings", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_activation", "query_pre_attn_scalar",
    "sliding_window", "sliding_window_pattern", "layer_types", "rope_theta", "rope_local_base_freq", "rope_scaling",
    "rope_parameters", "full_attention", "sliding_attention", "final_logit_softcapping", "attn_logit_softcapping",
    "use_bidirectional_attention", "attention_bias", "image_size", "patch_size", "vision_use_head", "layer_norm_eps",
)


@pytest.mark.slow
@cases(400)
@given(
    fields=st.dictionaries(st.sampled_from(GEMMA_FIELDS), values | numbers, min_size=1, max_size=3),
    part=st.sampled_from(["", "text_config", "vision_config", "rope_parameters"]),
)
def test_any_value_in_what_a_gemma_reads(gemma: Path, part: str, fields: dict[str, Any]) -> None:
    path = gemma / "config.json"
    whole = json.loads(path.read_text())
    (whole["text_config"][part] if part == "rope_parameters" else whole.get(part, whole)).update(fields)
    with changed(path, json.dumps(whole).encode()), bounded():
        read_model(gemma, opened_once)


FILES = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "model.safetensors.index.json",
)
NEIGHBOURS = (
    "eos_token_id", "bos_token", "eos_token", "added_tokens_decoder", "extra_special_tokens", "chat_template", "legacy",
    "add_bos_token", "add_prefix_space", "image_processor", "size", "crop_size", "resample", "image_mean", "image_std",
    "rescale_factor", "do_resize", "do_pad", "image_processor_type", "weight_map", "<extra>",
)


@pytest.mark.slow
@cases(300)
@given(family=families, name=st.sampled_from(FILES),
       fields=st.dictionaries(st.sampled_from(NEIGHBOURS), values, min_size=1, max_size=3))
def test_any_value_in_the_files_beside_a_config(
    copies: dict[str, Path], family: str, name: str, fields: dict[str, Any]
) -> None:
    folder = copies[family]
    with changed(folder / name, json.dumps(fields).encode()), bounded():
        read_all(folder)


@cases(200)
@given(family=families, name=st.sampled_from(["config.json", "tokenizer.json", *FILES]), content=st.one_of(
    st.binary(max_size=40), values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b"", b"\xef\xbb\xbf{}"]),
))
def test_files_that_are_no_json_objects(copies: dict[str, Path], family: str, name: str, content: bytes) -> None:
    with changed(copies[family] / name, content), bounded():
        read_all(copies[family])


sizes = st.lists(st.sampled_from([0, 1, 2, 3, 48, 2**31, 2**62, 2**63 - 1, -1]), max_size=12)
entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "F4", 3]),
    "shape": sizes | sizes.map(lambda few: few * 1000) | values,
    "data_offsets": st.tuples(st.integers(0, 400), st.integers(0, 400)).map(sorted) | values,
})


@cases(400)
@given(header=st.dictionaries(st.sampled_from(["model.norm.weight", "lm_head.weight", "x\n\x1b[31m"]), entries,
                              min_size=1, max_size=3), data=st.integers(0, 400))
def test_headers_of_weight_files(copies: dict[str, Path], header: dict[str, Any], data: int) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + b"\0" * data
    with changed(copies["llama"] / "model.safetensors", content), bounded():
        read_model(copies["llama"], opened_once)


@pytest.mark.parametrize("dimensions", [10**6, 7 * 10**6])
def test_very_many_dimensions_are_said_at_once(copies: dict[str, Path], dimensions: int) -> None:
    shape = "9" + ",9" * (dimensions - 1)
    text = f'{{"x": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'.encode()
    began = time.process_time()
    json.loads(text)
    parsed = time.process_time() - began
    began = time.process_time()
    with (
        changed(copies["llama"] / "model.safetensors", len(text).to_bytes(8, "little") + text + b"\0" * 4),
        pytest.raises(InputError, match="not a list of at most 8 sizes"),
    ):
        read_model(copies["llama"], opened_once)
    assert time.process_time() - began < 4 * parsed + 0.5       # not much more than to parse it as JSON


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    with bounded():
        PROCESSING.pixel_values(tmp_path / "large.png")
        pytest.fail("it was read")


@pytest.mark.parametrize("size", [(1, 20_000_000), (20_000_000, 1), (402, 2)])
def test_a_picture_that_is_a_line_is_not_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    content = bytearray(picture_file("PNG", "L", 7))
    content[16:24] = struct.pack(">II", *size)                  # what the header says, and its checksum
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "line.png").write_bytes(content)
    with bounded(), pytest.raises(InputError, match=r"too long and thin: .* at most 200 times as long as wide"):
        PROCESSING.pixel_values(tmp_path / "line.png")
    Image.new("1", (400, 2)).save(tmp_path / "line.png")
    assert PROCESSING.pixel_values(tmp_path / "line.png").shape == (3, 224, 224)


def picture_file(kind: str, mode: str, side: int) -> bytes:
    """A file of this kind, or of the nearest that Pillow can write."""
    picture = Image.new("RGB", (side, side), "teal").convert("L" if mode == "I;16" else mode)
    picture = Image.new(mode, (side, side)) if mode == "I;16" else picture
    file = io.BytesIO()
    try:
        picture.save(file, kind)
    except (OSError, ValueError, KeyError):
        picture.convert("RGB").save(file, kind)
    return file.getvalue()


@cases(300)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "EPS"]),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "I;16", "CMYK"]), side=st.sampled_from([1, 7, 40]),
    bytes_changed=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), cut=st.integers(0, 9),
)
def test_pictures_of_any_kind_and_damaged_ones(
    tmp_path_factory: pytest.TempPathFactory, kind: str, mode: str, side: int,
    bytes_changed: list[tuple[int, int]], cut: int,
) -> None:
    content = bytearray(picture_file(kind, mode, side))
    for place, value in bytes_changed:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "picture.png"
    path.write_bytes(content[: len(content) - cut * len(content) // 10])
    with bounded():
        values = PROCESSING.pixel_values(path)
        assert values.shape == (3, 224, 224) and kind not in ("PPM", "TGA", "ICO", "EPS")
