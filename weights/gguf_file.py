"""A .gguf file: weights, config and tokenizer in one file or several parts, as llama.cpp writes it.

Names become Hugging Face's, and quantised tensors are dequantised. The rows of Llama's query and key projections are
put back into Hugging Face's order: llama.cpp rotates neighbouring pairs, Hugging Face the two halves. Differences
between architectures are in gguf_families.py.
"""

import importlib
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from weights.entries import TensorEntry
from weights.errors import InputError
from weights.gguf_blocks import FOUR_BIT_TYPES, GROUP, READERS
from weights.gguf_families import ROPE_FACTORS, Family, find_family, hugging_face_names, read_config
from weights.gguf_header import GGUFHeader, read_header
from weights.gguf_tokenizer import ends_of_turns, special_id, tokenizer_json
from weights.groups import Groups
from weights.mapped_file import MappedFile

# Types that are not quantised. Every other type is read as float32.
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Elements per step: working arrays of this size stay in the processor's cache.
DEQUANTISED_AT_ONCE = 131_072


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint: its header and its mapped bytes."""

    path: Path
    file: MappedFile
    header: GGUFHeader


@dataclass(frozen=True)
class Place:
    """Position of a tensor's bytes, and how it is stored.

    type_name  ggml type
    heads      number of heads whose rows must be reordered; 0: none
    offset     number added to the values before they were stored
    """

    file: MappedFile
    begin: int
    end: int
    type_name: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: int = 0


class GGUFCheckpoint:
    """An opened .gguf file with all its parts: headers are read and checked, no tensor is read.

    path               the file, or any of its parts; files: all parts
    config             contents of config.json, made from the metadata
    generation_config  {"eos_token_id": [every id that ends a text or a turn]}
    entries            every tensor under its Hugging Face name, in the order of the files
    mapped             False: `read` returns copies
    tokenizer_json     contents of tokenizer.json, made from the metadata on first use
    chat_template      Jinja text or None
    bos_token          text of the token that begins a text, or None; eos_token: that ends it
    """

    mapped = False

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = open_parts(path)
        self.files = [part.path for part in parts]
        metadata = parts[0].header.metadata
        family = find_family(metadata)
        tensors = {name: tensor for part in parts for name, tensor in part.header.tensors.items()}
        places = {name: place for part in parts for name, place in find_places(part).items()}
        factors = places.pop(ROPE_FACTORS, None)
        divisors = None if factors is None else read_rope_factors(factors, path)
        self.config: dict[str, Any] = read_config(family, metadata, tensors, divisors)
        self.config["torch_dtype"] = "float32"
        kinds = {
            # Norms and routers are stored in float32 beside half-precision matrices; the other matrices decide.
            place.type_name for name, place in places.items() if len(place.shape) > 1 and "ffn_gate_inp" not in name
        }
        if len(kinds) == 1 and kinds <= set(PLAIN_TYPES):
            self.config["torch_dtype"] = str(PLAIN_TYPES[kinds.pop()]).removeprefix("torch.")

        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, Place] = {}
        for gguf_name, stored in places.items():
            for name, place in named_places(gguf_name, stored, family, self.config, path):
                if name in self.entries:
                    raise InputError(f"{path} is corrupt: it holds {name} under two names")
                kind = place.type_name
                self.entries[name] = TensorEntry(
                    place.shape, PLAIN_TYPES.get(kind, torch.float32), None if kind in PLAIN_TYPES else kind,
                    groups=GROUP if kind in FOUR_BIT_TYPES else 0,
                )
                self._places[name] = place

        self._metadata = metadata
        tokens = metadata.strings("tokenizer.ggml.tokens")
        bos, eos = special_id(metadata, "bos"), special_id(metadata, "eos")
        self.config["bos_token_id"], self.config["eos_token_id"] = bos, eos
        ends = ends_of_turns(metadata)
        self.generation_config: dict[str, Any] = {"eos_token_id": ends} if ends else {}
        self.bos_token = None if bos is None else tokens[bos]
        self.eos_token = None if eos is None else tokens[eos]
        self.chat_template = metadata.text("tokenizer.chat_template", default="") or None

    @cached_property
    def tokenizer_json(self) -> str:
        return tokenizer_json(self._metadata)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return rows of a tensor in its entry's dtype, on the CPU, dequantised and in Hugging Face's order."""
        entry, place = self.entries[name], self._places[name]
        raw = self._ordered_rows(name, rows)                                        # [n, bytes of a row]
        if place.type_name in PLAIN_TYPES:
            values = raw.clone().view(entry.dtype).view(len(raw), *entry.shape[1:])
        else:
            values = dequantise(raw, place.type_name, entry.shape[-1]).view(len(raw), *entry.shape[1:])
        return values.sub_(place.offset) if place.offset else values

    def read_groups(self, name: str, rows: slice = slice(None)) -> Groups:
        """Return rows of a four-bit matrix without dequantising, on the CPU, in Hugging Face's order."""
        raw = self._ordered_rows(name, rows)
        return READERS[self._places[name].type_name](raw.flatten(), len(raw))

    def stored_bytes(self, name: str) -> Tensor:
        """Return a tensor's bytes in the file, uint8."""
        place = self._places[name]
        return place.file.view(place.begin, place.end)

    def _ordered_rows(self, name: str, rows: slice) -> Tensor:
        """Return the bytes of rows that are numbered in Hugging Face's order: uint8 [n, bytes per row]"""
        place = self._places[name]
        raw = self.stored_bytes(name).view(place.shape[0], -1)
        if not place.heads:
            return raw[rows]
        # Within each head row 2 j goes to j, and row 2 j + 1 to head_dim / 2 + j.
        order = torch.arange(len(raw)).view(place.heads, -1, 2).transpose(1, 2).flatten()
        return raw[order[rows]]

    def release(self, name: str) -> None:
        """Give back the file's pages that reading `name` touched. The tensor that was read remains valid."""
        place = self._places[name]
        place.file.release(place.begin, place.end)

    def close(self) -> None:
        """Do nothing: only the mapping is open, and it ends with this object."""

    def __enter__(self) -> "GGUFCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def import_gguf(path: Path) -> ModuleType:
    """Import the gguf package. Raises InputError if it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(f"reading {path} needs the gguf package: pip install gguf") from error


def open_parts(path: Path) -> list[Part]:
    """Open the file, or all parts of its checkpoint: NAME-00001-of-00003.gguf and its neighbours.

    The first part holds all metadata except the numbers of the parts.
    """

    def open_one(one: Path) -> Part:
        file = MappedFile(one)
        return Part(one, file, read_header(file, one))

    given = open_one(path)
    count = given.header.metadata.whole("split.count", default=0)
    if count <= 1:
        return [given]
    named = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name)
    if named is None or int(named[3]) != count:
        raise InputError(
            f"{path} is one of {count} parts, but is not named like NAME-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{named[1]}{number:05}{named[2]}") for number in range(1, count + 1)]
    for one in paths:
        if not one.exists():
            raise InputError(f"{path} is one of {count} parts, and {one.name} is not beside it")
    parts = [given if one == path else open_one(one) for one in paths]
    for number, part in enumerate(parts):
        own = part.header.metadata
        if (own.whole("split.count", default=0), own.whole("split.no", default=0)) != (count, number):
            raise InputError(f"{part.path} is not part {number + 1} of {count}, as its name says")
    names = [name for part in parts for name in part.header.tensors]
    total = parts[0].header.metadata.whole("split.tensors.count", default=len(names))
    if total != len(names) or len(set(names)) != len(names):
        raise InputError(f"{path}: its {count} parts do not belong together: {total} tensors, of which {len(names)}")
    return parts


def find_places(part: Part) -> dict[str, Place]:
    """Return the place of each tensor of one file, by its name there, in the order of the file.

    Raises InputError for an unknown type or a place beyond the end of the file.
    """
    path, file, header = part.path, part.file, part.header
    gguf = import_gguf(path)
    kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    readable = set(PLAIN_TYPES)
    places: dict[str, Place] = {}
    for name, tensor in header.tensors.items():
        if tensor.type_number not in kinds:
            raise InputError(f"{path}: {name} is of the type {tensor.type_number}, unknown to the gguf package")
        kind = kinds[tensor.type_number]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in readable:
            try:  # one block of zeros shows whether the package can dequantise this type
                gguf.dequantize(torch.zeros(1, block_bytes, dtype=torch.uint8).numpy(), kind)
            except NotImplementedError as error:
                message = f"{path}: {name} is in {kind.name}, which the gguf package cannot dequantise"
                raise InputError(message) from error
            readable.add(kind.name)
        elements = math.prod(tensor.shape)
        if elements == 0 or tensor.shape[-1] % block or (block > 1 and len(tensor.shape) == 1):
            raise InputError(f"{path} is corrupt: {name} has the shape {list(tensor.shape)} in blocks of {block}")
        begin = header.data_start + tensor.offset
        end = begin + elements // block * block_bytes
        if end > file.size:
            raise InputError(f"{path} is truncated or corrupt: {name} ends at byte {end} of {file.size}")
        places[name] = Place(file, begin, end, kind.name, tensor.shape)
    return dict(sorted(places.items(), key=lambda item: item[1].begin))


def named_places(
    gguf_name: str, stored: Place, family: Family, config: dict[str, Any], path: Path
) -> list[tuple[str, Place]]:
    """Return the tensors in one tensor of the file, by their Hugging Face names."""
    named = hugging_face_names(gguf_name, stored.shape, family)
    size = (stored.end - stored.begin) // len(named)
    offset = family.norm_offset if gguf_name.endswith("norm.weight") else 0
    places = []
    for index, (name, shape) in enumerate(named):
        begin = stored.begin + index * size
        place = replace(stored, begin=begin, end=begin + size, shape=shape, offset=offset)
        places.append((name, with_heads(place, name, config, path) if family.pairs else place))
    return places


def with_heads(place: Place, name: str, config: dict[str, Any], path: Path) -> Place:
    """Return the place of a query or key projection with its number of heads, and any other place unchanged."""
    match = re.search(r"self_attn\.([qk])_proj\.", name)
    if not match:
        return place
    heads = config["num_attention_heads"] if match[1] == "q" else config["num_key_value_heads"]
    if place.shape[0] != heads * config["head_dim"]:
        raise InputError(f"{path}: {name} has {place.shape[0]} rows, not {heads} heads of {config['head_dim']}")
    return replace(place, heads=heads)


def read_rope_factors(place: Place, path: Path) -> list[float]:
    """Read a divisor for each rotary frequency (Llama 3.1 and later)."""
    if place.type_name != "F32" or len(place.shape) != 1:
        raise InputError(f"{path}: {ROPE_FACTORS} is {place.type_name} {list(place.shape)}, not F32 [head_dim / 2]")
    factors = place.file.view(place.begin, place.end).clone().view(torch.float32)   # [head_dim / 2]
    if not (torch.isfinite(factors) & (factors > 0)).all():
        raise InputError(f"{path}: {ROPE_FACTORS} holds numbers that cannot divide a frequency")
    return factors.tolist()


def dequantise(raw: Tensor, type_name: str, columns: int) -> Tensor:
    """Dequantise rows of blocks. raw uint8 [rows, bytes] -> float32 [rows, columns]"""
    values = torch.empty(len(raw), columns)
    step = max(1, DEQUANTISED_AT_ONCE // columns)
    for part, into in zip(raw.split(step), values.split(step), strict=True):
        if type_name in READERS:
            into.copy_(READERS[type_name](part.flatten(), len(part)).values())
        else:
            gguf = importlib.import_module("gguf")
            into.copy_(torch.from_numpy(gguf.dequantize(part.numpy(), gguf.GGMLQuantizationType[type_name])))
    return values
