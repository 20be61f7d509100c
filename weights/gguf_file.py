"""A .gguf file of the Llama architecture: weights, config and tokenizer in one file, as llama.cpp writes it.

Names become Hugging Face's, quantised tensors are dequantised by the gguf package, and the rows of the query and key
projections are put back into Hugging Face's order: llama.cpp rotates neighbouring pairs, Hugging Face the two halves.
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
from weights.gguf_blocks import FOUR_BIT_TYPES, GROUP
from weights.gguf_header import GGUFHeader, Metadata, read_header
from weights.gguf_tokenizer import special_id, tokenizer_json
from weights.groups import Groups
from weights.mapped_file import MappedFile

# Read as they are; every other type is quantised and read as float32.
PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

# The working arrays of so many elements stay in the processor's cache.
DEQUANTISED_AT_ONCE = 131_072


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie and how: its ggml type, and how many heads' rows are to be reordered (0: none)."""

    begin: int
    end: int
    type_name: str
    shape: tuple[int, ...]
    heads: int = 0


class GGUFCheckpoint:
    """A .gguf file, opened: its header is read and checked, no tensor is read.

    path               the file
    config             what config.json would say, made from the metadata
    generation_config  {"eos_token_id": [every id that ends a text or a turn]}
    entries            every tensor under its Hugging Face name, in the order of the file
    mapped             False: `read` returns tensors of their own
    tokenizer_json     what a tokenizer.json would say, written from the metadata when it is first asked for
    chat_template      jinja text or None
    bos_token          the text of the token that begins a text, or None; eos_token: of the one that ends it
    """

    mapped = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        header = read_header(self._file, path)
        metadata = header.metadata
        architecture = metadata.text("general.architecture")
        if architecture != "llama":
            raise InputError(f"{path} has the architecture {architecture!r}; of .gguf files only 'llama' is supported")
        places = find_places(header, self._file, path)
        rope_factors = places.pop(ROPE_FACTORS, None)

        self.config: dict[str, Any] = read_config(metadata, header)
        if rope_factors is not None:
            self.config["rope_scaling"] = read_rope_factors(self._file, rope_factors, self.config, path)
        self.config["torch_dtype"] = "float32"
        kinds = {place.type_name for place in places.values() if len(place.shape) > 1}
        if len(kinds) == 1 and kinds <= set(PLAIN_TYPES):
            # Norms are kept in float32 beside half-precision matrices, so the matrices tell.
            self.config["torch_dtype"] = str(PLAIN_TYPES[kinds.pop()]).removeprefix("torch.")

        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, Place] = {}
        for gguf_name, place in sorted(places.items(), key=lambda item: item[1].begin):
            name = hugging_face_name(gguf_name)
            if name in self.entries:
                raise InputError(f"{path} is corrupt: it holds {name} under two names")
            kind = place.type_name
            self.entries[name] = TensorEntry(
                place.shape, PLAIN_TYPES.get(kind, torch.float32), None if kind in PLAIN_TYPES else kind,
                groups=GROUP if kind in FOUR_BIT_TYPES else 0,
            )
            self._places[name] = with_heads(place, name, self.config, path)

        self._metadata = metadata
        tokens = metadata.strings("tokenizer.ggml.tokens")
        bos, eos, eot, eom = (special_id(metadata, which) for which in ("bos", "eos", "eot", "eom"))
        self.config["bos_token_id"], self.config["eos_token_id"] = bos, eos
        ends = [token_id for token_id in (eos, eot, eom) if token_id is not None]
        self.generation_config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
        self.bos_token = None if bos is None else tokens[bos]
        self.eos_token = None if eos is None else tokens[eos]
        self.chat_template = metadata.text("tokenizer.chat_template", default="") or None

    @cached_property
    def tokenizer_json(self) -> str:
        return tokenizer_json(self._metadata)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor in its entry's dtype, on the CPU, dequantised and in Hugging Face's order."""
        entry, place = self.entries[name], self._places[name]
        shape = (len(range(*rows.indices(entry.shape[0]))), *entry.shape[1:])
        raw = self._ordered_bytes(name).reshape(entry.shape[0], -1)[rows].reshape(-1)
        if place.type_name in PLAIN_TYPES:
            return torch.from_numpy(raw.copy()).view(entry.dtype).view(shape)
        return dequantise(raw, place.type_name, math.prod(shape)).view(shape)

    def read_groups(self, name: str) -> Groups:
        """A tensor of four-bit numbers as it is kept, on the CPU, in Hugging Face's order."""
        raw = torch.from_numpy(self._ordered_bytes(name))
        return FOUR_BIT_TYPES[self._places[name].type_name](raw, self.entries[name].shape)

    def stored_bytes(self, name: str) -> Tensor:
        """uint8, a tensor's bytes in the file."""
        place = self._places[name]
        return self._file.view(place.begin, place.end)

    def _ordered_bytes(self, name: str) -> Any:
        """A tensor's bytes with its rows in Hugging Face's order: numpy, uint8 [bytes]."""
        place = self._places[name]
        # In numpy, because so many small copies cost more to share out over torch's threads than to make.
        raw = self.stored_bytes(name).numpy()
        if place.heads:
            # A row's bytes stay together, so rows can change places before they are dequantised: within each head
            # row 2 j goes to j, and row 2 j + 1 to head_dim / 2 + j.
            pairs = raw.reshape(place.heads, place.shape[0] // place.heads // 2, 2, -1)
            raw = pairs.swapaxes(1, 2).reshape(-1)
        return raw

    def release(self, name: str) -> None:
        """Give back the file's pages that reading `name` touched; the tensor that was read is the caller's."""
        place = self._places[name]
        self._file.release(place.begin, place.end)

    def close(self) -> None:
        """Nothing is open but the mapping, which goes when this object does."""

    def __enter__(self) -> "GGUFCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def import_gguf(path: Path) -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(f"reading {path} needs the gguf package: pip install gguf") from error


def find_places(header: GGUFHeader, file: MappedFile, path: Path) -> dict[str, Place]:
    """Where each tensor lies, by its name in the file; InputError for an unknown type or a place beyond the end."""
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
            try:  # one block of zeros shows whether there is a way to dequantise this type
                gguf.dequantize(torch.zeros(1, block_bytes, dtype=torch.uint8).numpy(), kind)
            except NotImplementedError as error:
                message = f"{path}: {name} is in {kind.name}, which the gguf package cannot dequantise"
                raise InputError(message) from error
            readable.add(kind.name)
        elements = math.prod(tensor.shape)
        if elements == 0 or tensor.shape[-1] % block:
            raise InputError(f"{path} is corrupt: {name} has the shape {list(tensor.shape)} in blocks of {block}")
        begin = header.data_start + tensor.offset
        end = begin + elements // block * block_bytes
        if end > file.size:
            raise InputError(f"{path} is truncated or corrupt: {name} ends at byte {end} of {file.size}")
        places[name] = Place(begin, end, kind.name, tensor.shape)
    return places


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor; a name that is not known stays, and is then one the model does not expect."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return NAMES.get(name, name)


def with_heads(place: Place, name: str, config: dict[str, Any], path: Path) -> Place:
    """The place of a query or key projection with its number of heads, any other as it is."""
    match = re.search(r"self_attn\.([qk])_proj\.", name)
    if not match:
        return place
    heads = config["num_attention_heads"] if match[1] == "q" else config["num_key_value_heads"]
    if place.shape[0] != heads * config["head_dim"]:
        raise InputError(f"{path}: {name} has {place.shape[0]} rows, not {heads} heads of {config['head_dim']}")
    return replace(place, heads=heads)


def read_config(metadata: Metadata, header: GGUFHeader) -> dict[str, Any]:
    """What config.json would say; InputError for what is missing, or for a feature that is not supported."""
    path, tensors = metadata.path, header.tensors
    if metadata.whole("llama.expert_count", default=0):
        raise InputError(f"{path} has llama.expert_count: mixture-of-experts is not supported in .gguf files")
    if metadata.whole("llama.attention.sliding_window", default=0):
        raise InputError(f"{path} has llama.attention.sliding_window, which is not supported in .gguf files")
    if metadata.whole("split.count", default=0) > 1:
        parts = metadata.whole("split.count")
        raise InputError(f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge`")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise InputError(f"{path} has no token_embd.weight of two dimensions: it is not a whole model")

    layers = metadata.size("llama.block_count")
    if f"blk.{layers - 1}.attn_norm.weight" not in tensors:  # a model of so many layers must not even be laid out
        raise InputError(f"{path} is corrupt: llama.block_count is {layers}, but it has no tensors of the last layer")

    heads = metadata.size("llama.attention.head_count")
    hidden_size = metadata.size("llama.embedding_length")
    head_dim = metadata.size("llama.attention.key_length", default=max(1, hidden_size // heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.size(key, default=head_dim) != head_dim:
            raise InputError(f"{path}: {key} is {metadata.size(key)}, but heads of {head_dim}; only equal is supported")
    if head_dim % 2:
        raise InputError(f"{path}: heads of {head_dim} dimensions cannot be rotated in pairs")

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.size("llama.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("llama.attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.size("llama.context_length"),
        "rms_norm_eps": metadata.positive("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.positive("llama.rope.freq_base", default=10000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    scaling = metadata.text("llama.rope.scaling.type", default="none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": metadata.positive("llama.rope.scaling.factor")}
    elif scaling != "none":
        raise InputError(f"{path}: llama.rope.scaling.type is {scaling!r}; in .gguf files 'none' and 'linear' are read")
    return config


def read_rope_factors(file: MappedFile, place: Place, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The rope_scaling of a file that gives a divisor for each rotary frequency (Llama 3.1 and later)."""
    if "rope_scaling" in config:
        raise InputError(f"{path} has both llama.rope.scaling.type and {ROPE_FACTORS}; one of them is supported")
    if place.type_name != "F32" or place.shape != (config["head_dim"] // 2,):
        raise InputError(f"{path}: {ROPE_FACTORS} is {place.type_name} {list(place.shape)}, not F32 [head_dim / 2]")
    factors = file.view(place.begin, place.end).clone().view(torch.float32)  # [head_dim / 2]
    if not (torch.isfinite(factors) & (factors > 0)).all():
        raise InputError(f"{path}: {ROPE_FACTORS} holds numbers that cannot divide a frequency")
    return {"rope_type": "factors", "factors": factors.tolist()}


def dequantise(raw: Any, type_name: str, elements: int) -> Tensor:
    """The float32 values of a tensor's quantised blocks.

    raw      [bytes]     numpy array, uint8
    returns  [elements]  float32
    """
    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    values = torch.empty(elements, dtype=torch.float32)
    floats = values.numpy()
    blocks_at_once = DEQUANTISED_AT_ONCE // block
    for start in range(0, elements // block, blocks_at_once):
        part = raw[start * block_bytes : (start + blocks_at_once) * block_bytes]
        # Blocks know nothing of rows, so that a stretch of any length can pass as one row.
        part_values = gguf.dequantize(part.reshape(1, -1), kind)            # [1, elements of this part]
        floats[start * block : start * block + part_values.size] = part_values[0]
    return values
