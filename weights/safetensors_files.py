"""A Hugging Face directory: config.json, and weights in model.safetensors or in shards with an index.

The format of a .safetensors file: 8 bytes little-endian N, N bytes of JSON with each tensor's dtype, shape and position
(`data_offsets`, counted from the end of the JSON), then the tensors' bytes without holes or overlaps. The header is
read here because this module must control the mapping: a touched page of a mapped file counts as this process's memory,
and `release` gives each tensor's pages back as soon as it has been copied.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from weights import files
from weights.entries import TensorEntry
from weights.errors import InputError
from weights.four_bit_layouts import Layout, borrow_evidence, find_layout, matrix_entry
from weights.groups import Groups
from weights.json_files import LARGEST_JSON, JsonObject, parse_json, read_json, shown
from weights.mapped_file import MappedFile

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# No tensor of a model has more dimensions; a header with more is refused before they are multiplied.
MOST_DIMENSIONS = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Place:
    """Position of a tensor's bytes: the shard, and [begin, end) from the start of the file."""

    shard: str
    begin: int
    end: int


class SafetensorsCheckpoint:
    """An opened Hugging Face directory: configuration and headers are read and checked, no tensor is read.

    path               the directory
    config             config.json
    generation_config  generation_config.json, {} if there is none
    entries            every tensor of every shard, in the order of the files
    mapped             True: `read` returns views of the mapped files, which callers copy to keep
    """

    mapped = True

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.config: dict[str, Any] = read_config(directory)
        self.generation_config: dict[str, Any] = read_json(directory / files.GENERATION_CONFIG, optional=True)
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, Place] = {}
        self._files: dict[str, MappedFile] = {}
        self._layout = find_layout(self.config, directory)
        self._parts: dict[str, list[str]] = {}      # stored tensors of each four-bit matrix
        self._part_entries: dict[str, TensorEntry] = {}
        for shard, promised in find_shards(directory).items():
            self._open_shard(shard, promised)
        if self._layout is not None:
            self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
            self._join_parts(self._layout)

    def _join_parts(self, layout: Layout) -> None:
        """Replace the entries of each four-bit matrix by one entry X.weight."""
        for name in [key.removesuffix(".qweight") for key in self.entries if key.endswith(".qweight")]:
            entry = matrix_entry(name, layout, self.entries, self.read, self.path)
            keys = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
            self._parts[f"{name}.weight"] = [key for key in keys if key in self.entries]
            self._part_entries |= {key: self.entries.pop(key) for key in self._parts[f"{name}.weight"]}
            self.entries[f"{name}.weight"] = entry
        if layout.less_one:
            evidence = 0.0
            for name in self._parts:
                evidence += borrow_evidence(*self._quantised(name)[:2])
                self.release(name)
            self._layout = replace(layout, borrows=evidence > 0)

    def _open_shard(self, shard: str, promised: list[str]) -> None:
        path = self.path / shard
        file = MappedFile(path)
        entries, places = read_header(file, path)
        absent = [name for name in promised if name not in entries]
        if absent:
            raise InputError(f"{path} lacks {some_of(absent)}, which {files.WEIGHTS_INDEX} says it holds")
        self._files[shard] = file
        for name, entry in entries.items():
            place = Place(shard, *places[name])
            if name in self.entries:
                if entry != self.entries[name] or not self._same_bytes(place, self._places[name]):
                    raise InputError(f"{path}: {name} is also in {self._places[name].shard}, and there it differs")
                continue
            self.entries[name] = entry
            self._places[name] = place

    def _same_bytes(self, *places: Place) -> bool:
        views = [self._files[place.shard].view(place.begin, place.end) for place in places]
        same = torch.equal(*views)
        for place in places:
            self._files[place.shard].release(place.begin, place.end)
        return same

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return rows of a tensor as a view of the mapped file, in its entry's dtype, on the CPU, read-only."""
        if name in self._parts:
            return self.read_groups(name, rows).values()
        whole = self._view(name, self.entries[name])
        return whole[rows] if rows != slice(None) else whole

    def read_groups(self, name: str, rows: slice = slice(None)) -> Groups:
        """Return rows of a four-bit matrix without dequantising."""
        assert self._layout is not None
        qweight, qzeros, scales = self._quantised(name)
        return self._layout.groups(qweight, qzeros, scales, rows)

    def _quantised(self, name: str) -> list[Tensor]:
        """Return qweight, qzeros and scales of a matrix, as views of the mapped file."""
        return [self._view(key, self._part_entries[key]) for key in self._parts[name][:3]]

    def _view(self, name: str, entry: TensorEntry) -> Tensor:
        place = self._places[name]
        raw = self.stored_bytes(name)
        if place.begin % entry.dtype.itemsize:
            raw = raw.clone()  # a tensor must start at a multiple of its element size
        return raw.view(entry.dtype).view(entry.shape)

    def stored_bytes(self, name: str) -> Tensor:
        """Return a tensor's bytes in the file, uint8; for a four-bit matrix those of its numbers."""
        place = self._places[self._parts.get(name, [name])[0]]
        return self._files[place.shard].view(place.begin, place.end)

    def release(self, name: str) -> None:
        """Give back the memory that reading `name` took; the tensor can be read again from the file."""
        for key in self._parts.get(name, [name]):
            place = self._places[key]
            self._files[place.shard].release(place.begin, place.end)

    def close(self) -> None:
        """Release the mapped files. A tensor that was read and not copied keeps its file mapped."""
        self._files.clear()

    def __enter__(self) -> "SafetensorsCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a directory. Raises InputError that says what is missing, or that there is an adapter."""
    path = directory / files.CONFIG
    if (directory / files.ADAPTER_CONFIG).exists():
        raise InputError(describe_adapter(directory, beside_model=path.exists()))
    if path.exists():
        return read_json(path)
    try:
        contents = sorted(item.name for item in directory.iterdir())
    except OSError as error:
        raise InputError(f"{directory} cannot be listed: {error.strerror}") from error
    if not contents:
        raise InputError(f"{directory} is empty: a checkpoint needs config.json, tokenizer.json and {files.WEIGHTS}")
    gguf_files = [name for name in contents if name.endswith(".gguf")]
    if gguf_files:
        raise InputError(f"{directory} has no config.json; name the .gguf file itself: {directory / gguf_files[0]}")
    raise InputError(f"{directory} has no config.json: it is not the folder of a Hugging Face checkpoint")


def describe_adapter(directory: Path, beside_model: bool) -> str:
    """Return advice for an adapter, which would change the computation and is not implemented."""
    about = read_json(directory / files.ADAPTER_CONFIG)
    kind, base = (shown(about.get(name)) for name in ("peft_type", "base_model_name_or_path"))
    merge = (
        "merge it into the model with peft, `AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
        ".save_pretrained(new_folder)`"
    )
    if beside_model:
        return (
            f"{directory} holds a model and an adapter of it ({files.ADAPTER_CONFIG}, {kind}), which is not "
            f"implemented: {merge}, or take the adapter's files out of the folder to run the model alone"
        )
    return f"{directory} is an adapter ({kind}) of {base}, not a model: {merge}, or name the model itself"


def find_shards(directory: Path) -> dict[str, list[str]]:
    """Return the names of the weight files, each with its tensors according to the index ([] without an index)."""
    if (directory / files.WEIGHTS).exists():
        return {files.WEIGHTS: []}
    index_path = directory / files.WEIGHTS_INDEX
    if not index_path.exists():
        others = sorted(path.name for path in directory.glob(files.ANY_WEIGHTS))
        if others:
            raise InputError(
                f"{directory} holds {some_of(others)}, and neither {files.WEIGHTS} nor {files.WEIGHTS_INDEX}, which "
                "says what is in which shard: fetch the missing file"
            )
        pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in directory.glob(pattern))
        if pickles:
            raise InputError(
                f"{directory} holds its weights as pickle only ({some_of(pickles)}), which can run code when it is "
                "read and is refused: convert it with transformers, `AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(new_folder)`, which writes safetensors"
            )
        raise InputError(f"{directory} has no weights: neither {files.WEIGHTS} nor {files.WEIGHTS_INDEX} is there")

    weight_map = JsonObject(read_json(index_path), str(index_path)).section("weight_map").raw
    if not weight_map:
        raise InputError(f"{index_path} has no weight_map that names a shard for each tensor")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # The index is untrusted: it must not lead to files outside its own folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
            raise InputError(f"{index_path}: {name} is said to be in {shard!r}, which is not a .safetensors file name")
        shards.setdefault(shard, []).append(name)
    absent = [shard for shard in shards if not os.path.exists(directory / shard)]
    if absent:
        raise InputError(
            f"{directory} lacks {some_of(absent)}, named in {files.WEIGHTS_INDEX}: fetch the missing shard again"
        )
    return {shard: shards[shard] for shard in sorted(shards)}


def read_header(file: MappedFile, path: Path) -> tuple[dict[str, TensorEntry], dict[str, tuple[int, int]]]:
    """Return the entries of one .safetensors file in the order of their bytes, and each [begin, end) from its start.

    Raises InputError if the header contradicts itself or the size of the file.
    """
    size = file.size
    header_size = int.from_bytes(file.data[:8], "little")
    if size < 8 or header_size > size - 8:
        raise InputError(f"{path} is truncated or not safetensors: {size} bytes, its header alone {header_size}")
    if header_size > LARGEST_JSON:
        raise InputError(f"{path} is not safetensors: a header of {header_size} bytes is over {LARGEST_JSON}")
    header = parse_json(file.data[8 : 8 + header_size], f"the header of {path}", repeats_allowed=False)
    header.pop("__metadata__", None)

    data_start = 8 + header_size
    entries: dict[str, TensorEntry] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, description in header.items():
        entries[name], (begin, end) = read_entry(name, description, path)
        places[name] = (data_start + begin, data_start + end)

    order = sorted(places, key=lambda name: places[name])
    position = data_start
    for name in order:
        begin, end = places[name]
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise InputError(f"{path} is corrupt: {name} at bytes {begin} to {end} {what} (that ends at {position})")
        position = end
    if position != size:
        what = "truncated" if position > size else "corrupt"
        raise InputError(f"{path} is {what}: its header describes {position} bytes, the file has {size}")
    return {name: entries[name] for name in order}, places


def read_entry(name: str, description: Any, path: Path) -> tuple[TensorEntry, tuple[int, int]]:
    """Check one tensor's item of the header and return its entry, and [begin, end) from the start of the data."""
    if not isinstance(description, dict):
        raise InputError(f"{path} is corrupt: the header's {name} is not an object")
    dtype_name: Any = description.get("dtype")
    shape: Any = description.get("shape")
    offsets: Any = description.get("data_offsets")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(f"{path}: {name} has the dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    if not is_list_of_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise InputError(f"{path} is corrupt: the shape of {name} is not a list of at most {MOST_DIMENSIONS} sizes")
    if not is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{path} is corrupt: the data_offsets of {name} are not a begin and an end")
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise InputError(f"{path} is corrupt: {name} {shape} has more numbers than can be counted")
    entry = TensorEntry(tuple(shape), DTYPES[dtype_name])
    begin, end = offsets
    if entry.elements * entry.dtype.itemsize != end - begin:
        raise InputError(
            f"{path} is corrupt: {name} {list(shape)} in {dtype_name} needs {entry.elements * entry.dtype.itemsize} "
            f"bytes, its data_offsets give {end - begin}"
        )
    return entry, (begin, end)


def is_list_of_sizes(value: Any) -> bool:
    """Return True for a JSON list of integers that fit into a 64-bit size."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def some_of(names: list[str], limit: int = 10) -> str:
    """Join names with commas, at most `limit` of them."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
