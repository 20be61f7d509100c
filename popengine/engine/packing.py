"""Packing: the choice of matrices that are packed during loading, and of their format.

The projections of attention and of feed-forward networks are packed, and the output projection, together with a tied
embedding. Routers, norms, biases and the vision tower stay plain, because they are small or make choices.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.packed import (
    GroupedInt8Embedding,
    GroupedInt8Matrix,
    Int4Matrix,
    Int8Embedding,
    Int8Matrix,
    StoredEmbedding,
    rows_at_once,
)
from models.matrices.plain import Matrix
from popengine.engine.dtypes import FORMS
from weights.checkpoint import Checkpoint
from weights.entries import TensorEntry
from weights.errors import InputError
from weights.gguf_blocks import FOUR_BIT_TYPES, READERS, stored_size
from weights.groups import group
from weights.load import Packing

# Errors of matrices relative to those of the file, as a share of their norm (measured in docs/measurements/packed.md).
PACKED_ERRORS = "int4, int8 in groups: the file's own numbers, 0.2 % off by rounded scales; int8: 0.8 to 1.5 % off"
# Weights per packing step, of plain numbers and of quantised blocks: intermediate results stay in a processor's cache.
PACKED_AT_ONCE, BLOCKS_AT_ONCE = 1 << 20, 1 << 21
# Group size of weights that are packed here (docs/measurements/packed.md compares sizes).
GROUP = 32


def choose_form(name: str, checkpoint: Checkpoint, device: torch.device, dtype: str) -> str:
    """Return the format for `--weights`. Raises InputError if it is unknown or unsupported on this device.

    dtype  as requested by the user
    """
    if name not in FORMS:
        raise InputError(f"weights must be one of {', '.join(FORMS)}, not {name!r}")
    if name == "auto":
        quantised = any(entry.stored is not None for entry in checkpoint.entries.values())
        return "auto" if quantised and device.type == "cpu" and dtype != "float32" else "plain"
    if name == "int4" and device.type != "cpu":
        raise InputError(f"weights int4 are multiplied on a CPU only, not on {device}; use int8 or plain")
    return name


class Packer:
    """Chooses the packing of every parameter of a model, and puts the packed matrices into their places.

    form  "auto": four-bit matrices of the checkpoint stay so, other quantised ones become int8, the rest is plain;
          "int8"; "int4": matrices with more bits are packed in groups of GROUP. The output projection is always int8

    A file with more than four bits in most of its layers keeps its numbers: other types become int8 in groups, the
    output projection too. Beside four-bit matrices one scale per row is exact enough, with a quarter less to read.
    """

    def __init__(
        self, language_model: LlamaForCausalLM, form: str, dtype: torch.dtype, device: torch.device,
        entries: Mapping[str, TensorEntry],
    ) -> None:
        self.form, self.dtype, self.device = form, dtype, device
        quantised = [entry for name, entry in entries.items() if entry.stored is not None and ".layers." in name]
        more_bits = sum(entry.elements for entry in quantised if not entry.groups)
        keeps_groups = form == "auto" and 2 * more_bits > sum(entry.elements for entry in quantised)
        self.in_groups = set(READERS) - set(FOUR_BIT_TYPES) if keeps_groups else set()
        self.model = language_model
        self.forms: dict[str, None] = {}                            # in order of appearance
        self.places: dict[int, tuple[nn.Module, str]] = {}          # parent and attribute, by the id of the weight
        for module in language_model.modules():
            names: tuple[str, ...] = ()
            if isinstance(module, Attention):
                names = ("q_proj", "k_proj", "v_proj", "o_proj")
            elif isinstance(module, FeedForward):
                names = ("gate_proj", "up_proj", "down_proj")
            for name in names:
                self.places[id(getattr(module, name).weight)] = (module, name)
        embedding = language_model.model.embed_tokens.weight
        self.places[id(embedding)] = (language_model.model, "embed_tokens")         # unless tied to the head
        self.places[id(language_model.lm_head.weight)] = (language_model, "lm_head")

    def __call__(self, target: Tensor, name: str, entry: TensorEntry) -> Packing | None:
        """Return the packing of one parameter; None: it is stored unchanged."""
        if id(target) not in self.places or (self.form == "auto" and entry.stored is None):
            return None
        parent, attribute = self.places[id(target)]
        rows, columns = target.shape
        put = partial(self.put, parent, attribute)
        if attribute == "embed_tokens":     # quantised rows stay as they are stored
            if entry.stored not in READERS or self.device.type != "cpu":
                return None
            read, held = READERS[entry.stored], stored_size(entry.stored, rows * columns)
            return Packing(lambda all: StoredEmbedding(next(all).clone(), read, self.dtype), put, "stored", rows, held)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        step, rows_of_blocks = rows_at_once(columns, PACKED_AT_ONCE), rows_at_once(columns, BLOCKS_AT_ONCE)
        four_bits = entry.groups if self.form == "auto" else self.form == "int4"
        as_int8 = parent is self.model or not four_bits
        in_groups = entry.stored in self.in_groups and columns % GROUP == 0
        made = "int8 in groups" if in_groups else "int8" if as_int8 else "int4"
        self.forms[f"{entry.stored} as {made}" if entry.stored else made] = None
        if in_groups:
            grouped = partial(GroupedInt8Matrix.of_stretches, rows, columns, like)
            return Packing(grouped, put, "groups", step, rows * columns * 5 // 4)
        if as_int8:
            eight, held = partial(Int8Matrix.with_room, rows, columns, like, None), rows * (columns + 2)
            if entry.stored in READERS:
                return Packing(lambda groups: eight().fill(groups), put, "groups", rows_of_blocks, held)
            return Packing(lambda values: eight().fill(values), put, "values", step, held)
        size = entry.groups or GROUP
        if columns % size or size % GROUP:
            raise InputError(f"{name} has {columns} columns, which groups of {size} do not divide: use weights int8")
        four = partial(Int4Matrix.with_room, rows, columns, size, like, None)
        held = rows * columns // 2 + rows * columns // size * 4
        if entry.groups:
            return Packing(lambda groups: four().fill(groups), put, "groups", rows_of_blocks, held)
        return Packing(lambda values: four().fill(group(part, GROUP) for part in values), put, "values", step, held)

    @property
    def made(self) -> str:
        """Forms of the matrices, for people."""
        return ", ".join(self.forms) or "plain"

    def put(self, parent: nn.Module, attribute: str, made: nn.Module) -> None:
        """Put a matrix into its place with the existing bias, or an embedding."""
        if isinstance(made, Matrix):
            made.bias = getattr(parent, attribute).bias
        setattr(parent, attribute, made)
        if parent is self.model and self.model.config.tie_word_embeddings:
            assert isinstance(made, Int8Matrix | GroupedInt8Matrix)
            kind: Any = Int8Embedding if isinstance(made, Int8Matrix) else GroupedInt8Embedding
            self.model.model.embed_tokens = kind(made)
