"""Hugging Face directories: what is read from them, and that everything wrong with one is said in one clear line."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from weights.checkpoint import SafetensorsCheckpoint, checkpoint_dtype, open_checkpoint
from weights.errors import InputError
from weights.safetensors_files import DTYPES


def directory_with(path: Path, weights: bytes | None = None, config: str = '{"architectures": ["X"]}') -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor_line(shape: Any, begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def message_of(path: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_dtype_and_shape_is_read_as_it_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    written = {
        f"{name}.{number}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate([(), (0,), (3,), (2, 0, 5), (5, 7)])
    }
    save_file(written, directory_with(tmp_path / "all") / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "all") as checkpoint:
        assert set(checkpoint.entries) == set(written)
        for name, tensor in written.items():
            entry, read = checkpoint.entries[name], checkpoint.read(name)
            assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype) == (tuple(read.shape), read.dtype)
            assert torch.equal(read.to(torch.float32), tensor.to(torch.float32))
            checkpoint.release(name)
            assert torch.equal(checkpoint.read(name).to(torch.float32), tensor.to(torch.float32))


def test_a_tensor_outlives_the_checkpoint_it_was_read_from(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory_with(tmp_path / "one", save({"a": torch.arange(5.0)})))
    tensor = checkpoint.read("a")
    checkpoint.close()
    del checkpoint
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_tensors_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    data = b"\x01" + struct.pack("<2f", 1.5, -2.5)
    header = {"flag": tensor_line([1], 0, 1, "BOOL"), "w": tensor_line([2], 1, 9)}
    checkpoint = open_checkpoint(directory_with(tmp_path / "odd", with_header(header, data)))
    read = checkpoint.read("w")
    assert read.tolist() == [1.5, -2.5] and read.data_ptr() % 4 == 0


def sharded(path: Path, weight_map: dict[str, Any] | None = None) -> Path:
    directory_with(path)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 7.0)}, path / "model-00002-of-00002.safetensors")
    if weight_map is None:
        first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        weight_map = {"a": first, "b": first, "c": second}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "shards"))
    assert list(checkpoint.entries) == ["a", "b", "c"]
    assert checkpoint.read("c").tolist() == [7, 7, 7, 7]


def test_a_shard_that_is_named_but_missing_or_incomplete_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path / "gone") / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in message_of(tmp_path / "gone")
    sharded(tmp_path / "incomplete", {"x": "model-00002-of-00002.safetensors"})
    assert "lacks x, which model.safetensors.index.json says" in message_of(tmp_path / "incomplete")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "..\\m.safetensors", "config.json", 3, None, ["a"]]
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path: Path, shard: Any) -> None:
    directory_with(tmp_path, save({"a": torch.ones(1)}))  # where the first of them would lead
    assert "which is not a .safetensors file name" in message_of(sharded(tmp_path / "index", {"a": shard}))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "{", ""])
def test_a_broken_index_is_one_line(tmp_path: Path, index: str) -> None:
    (sharded(tmp_path / "index") / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in message_of(tmp_path / "index")


def test_a_tensor_in_two_shards_must_be_the_same_in_both(tmp_path: Path) -> None:
    folder, second = sharded(tmp_path / "shards"), "model-00002-of-00002.safetensors"
    save_file({"b": torch.zeros(3), "c": torch.full((4,), 7.0)}, folder / second)
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.entries) == ["a", "b", "c"] and checkpoint.read("b").tolist() == [0, 0, 0]
    for other in (torch.ones(3), torch.zeros(4), torch.zeros(3, dtype=torch.float64), -torch.zeros(3)):
        save_file({"b": other, "c": torch.full((4,), 7.0)}, folder / second)
        assert f"{second}: b is also in model-00001-of-00002.safetensors" in message_of(folder)


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    message = message_of(tmp_path)
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in message
    assert "model.safetensors.index.json" in message


def test_an_adapter_is_named_alone_and_beside_a_model(tmp_path: Path) -> None:
    about = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/base"})
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(about)
    assert "is an adapter ('LORA') of 'someone/base', not a model: merge it" in message_of(tmp_path)
    directory_with(tmp_path, save({"a": torch.ones(1)}))
    assert "holds a model and an adapter of it" in message_of(tmp_path) and "merge it" in message_of(tmp_path)


def test_what_is_not_a_checkpoint_is_said(tmp_path: Path) -> None:
    assert "no such path" in message_of(tmp_path / "nowhere")
    assert "no such path" in message_of("a/b/c\n\0" * 300)
    (tmp_path / "empty").mkdir()
    assert "is empty" in message_of(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    assert "has no config.json" in message_of(tmp_path / "other")
    assert "is not a checkpoint" in message_of(tmp_path / "other" / "notes.txt")
    (tmp_path / "other" / "m.gguf").write_text("")
    assert "name the .gguf file itself" in message_of(tmp_path / "other")
    weights_alone = directory_with(tmp_path / "whole", save({"a": torch.ones(1)})) / "model.safetensors"
    assert "name its folder" in message_of(weights_alone)
    assert "has no weights" in message_of(directory_with(tmp_path / "weightless"))


def test_pickled_weights_are_refused_with_a_way_to_convert_them(tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "pickle")
    torch.save({}, directory / "pytorch_model.bin")
    assert "pytorch_model.bin" in message_of(directory) and "save_pretrained" in message_of(directory)


@pytest.mark.parametrize("config", ["", "{", "[]", "3", '"text"', "\xff", "[" * 100_000, "1" * 5000])
def test_a_broken_config_is_one_line(tmp_path: Path, config: str) -> None:
    directory = directory_with(tmp_path / "broken", save({"a": torch.ones(1)}))
    (directory / "config.json").write_bytes(config.encode("latin-1"))
    assert "config.json" in message_of(directory)


WHOLE = save({"a": torch.ones(4), "b": torch.zeros(2, 3)})
CORRUPT = {
    "empty": b"",
    "shorter than its first number": b"\x01\x02",
    "cut in the header": WHOLE[:20],
    "cut in the data": WHOLE[:-3],
    "longer than its header says": WHOLE + b"x",
    "header length beyond the file": struct.pack("<Q", 2**63) + WHOLE[8:],
    "not JSON": with_header(b"not JSON"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "not an object": with_header([1, 2]),
    "a tensor twice": with_header(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
    "a tensor that is no object": with_header({"a": 3}),
    "overlapping offsets": with_header({"a": tensor_line([2], 0, 8), "b": tensor_line([2], 4, 12)}, bytes(12)),
    "the same bytes twice": with_header({"a": tensor_line([2], 0, 8), "b": tensor_line([2], 0, 8)}, bytes(8)),
    "a hole": with_header({"a": tensor_line([1], 0, 4), "b": tensor_line([1], 8, 12)}, bytes(12)),
    "offsets backwards": with_header({"a": tensor_line([1], 4, 0)}, bytes(4)),
    "offsets beyond the file": with_header({"a": tensor_line([2**40], 0, 2**42)}, bytes(4)),
    "negative offset": with_header({"a": tensor_line([1], -4, 0)}, bytes(4)),
    "offsets that do not fit the shape": with_header({"a": tensor_line([3], 0, 8)}, bytes(8)),
    "negative size": with_header({"a": tensor_line([-1, -1], 0, 4)}, bytes(4)),
    "a size too large for 64 bits": with_header({"a": tensor_line([0, 2**64], 0, 0)}),
    "sizes that are not numbers": with_header({"a": tensor_line([True, "1"], 0, 4)}, bytes(4)),
    "no shape": with_header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "three offsets": with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4)),
    "unknown dtype": with_header({"a": tensor_line([1], 0, 4, "F4_WHAT")}, bytes(4)),
    "dtype that is no text": with_header({"a": tensor_line([1], 0, 4, ["F32"])}, bytes(4)),
}


@pytest.mark.parametrize("weights", CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_safetensors_are_one_line(tmp_path: Path, weights: bytes) -> None:
    assert "model.safetensors" in message_of(directory_with(tmp_path / "corrupt", weights))


def test_any_changed_byte_is_an_input_error_or_loads(tmp_path: Path) -> None:
    source = random.Random(0)
    refused = 0
    for _ in range(600):
        changed = bytearray(WHOLE)
        for _ in range(source.choice([1, 1, 2, 8])):
            changed[source.randrange(len(changed))] = source.randrange(256)
        length = source.choice([len(changed), source.randrange(len(changed))])
        directory_with(tmp_path / "fuzz", bytes(changed[:length]))
        try:
            with open_checkpoint(tmp_path / "fuzz") as checkpoint:
                for name in checkpoint.entries:
                    checkpoint.read(name)
        except InputError:
            refused += 1
    assert 300 < refused < 600


def test_generation_config_is_optional(tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "one", save({"a": torch.ones(1)}))
    assert open_checkpoint(directory).generation_config == {}
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(directory).generation_config == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ('{"torch_dtype": "bfloat16"}', torch.float32, torch.bfloat16),
        ('{"dtype": "float16"}', torch.float32, torch.float16),
        ('{"text_config": {"torch_dtype": "float16"}}', torch.float32, torch.float16),
        ("{}", torch.bfloat16, torch.bfloat16),
        ('{"torch_dtype": null}', torch.float32, torch.float32),
        ('{"torch_dtype": "auto"}', torch.float16, torch.float16),
        ('{"torch_dtype": "int8"}', torch.float32, "choose one of float32, bfloat16, float16"),
        ('{"torch_dtype": "half"}', torch.float32, torch.float16),
        ('{"torch_dtype": "Tensor"}', torch.float32, "choose one of float32, bfloat16, float16"),
        ('{"dtype": "bfloat16", "torch_dtype": "float32"}', torch.float32, torch.bfloat16),
        ('{"torch_dtype": {}}', torch.float32, "torch_dtype must be a text, not an object"),
        ("{}", torch.float64, "choose one of float32, bfloat16, float16"),
    ],
)
def test_auto_dtype_is_the_config_s_else_the_tensors(
    tmp_path: Path, config: str, tensors: torch.dtype, expected: torch.dtype | str
) -> None:
    checkpoint = open_checkpoint(directory_with(tmp_path / "d", save({"a": torch.ones(3, dtype=tensors)}), config))
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    if isinstance(expected, torch.dtype):
        assert checkpoint_dtype(checkpoint) == expected
    else:
        with pytest.raises(InputError, match=expected):
            checkpoint_dtype(checkpoint)
