"""Which matrices of a model are packed while it is loaded, and how.

The projections of attention and of feed-forward networks are, and the output projection, with the embedding where both
are one tensor. Routers, norms, biases and the vision tower stay plain: they are small, or choose.
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
from weights.checkpoint import Checkpoint
from weights.entries import TensorEntry
from weights.errors import InputError
from weights.gguf_blocks import FOUR_BIT_TYPES, READERS, stored_size
from weights.groups import group
from weights.load import Packing

# What `--weights` takes. auto: what a checkpoint keeps packed stays so, everything else is plain.
FORMS = ("auto", "plain", "int8", "int4")
# How far matrices are from those of the file, as a share of their norm (docs/packed.md says how it is measured).
PACKED_ERRORS = "int4, int8 in groups: the file's own numbers, 0.2 % off by rounded scales; int8: 0.8 to 1.5 % off"
# Weights that are packed at once: what is made of them on the way stays in a processor's cache.
PACKED_AT_ONCE = 1 << 20
# Neighbours in a row that share a scale, of weights that are packed here (docs/packed.md compares sizes).
GROUP = 32


def choose_form(name: str, checkpoint: Checkpoint, device: torch.device, dtype: str) -> str:
    """InputError for a form that there is not, or that the device lacks. dtype: as it was asked for"""
    if name not in FORMS:
        raise InputError(f"weights must be one of {', '.join(FORMS)}, not {name!r}")
    if name == "auto":
        quantised = any(entry.stored is not None for entry in checkpoint.entries.values())
        return "auto" if quantised and device.type == "cpu" and dtype != "float32" else "plain"
    if name == "int4" and device.type != "cpu":
        raise InputError(f"weights int4 are multiplied on a CPU only, not on {device}; use int8 or plain")
    return name


class Packer:
    """Decides for every parameter of a model, and puts the packed matrices into their places.

    form  "auto": a matrix of four bits in the checkpoint stays so, other quantised ones become int8, the rest is plain;
          "int8"; "int4": what has no four bits yet is packed in groups of GROUP. The output projection is int8 always

    A file most of whose layers have more than four bits keeps its numbers: other kinds become int8 in groups, the
    output projection too. Beside four bits a scale for each row is exact enough, and a quarter less to read.
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
        self.forms: dict[str, None] = {}                            # in the order in which they were met
        self.places: dict[int, tuple[nn.Module, str]] = {}          # of a matrix's weight: the parent, and its name
        for module in language_model.modules():
            names: tuple[str, ...] = ()
            if isinstance(module, Attention):
                names = ("q_proj", "k_proj", "v_proj", "o_proj")
            elif isinstance(module, FeedForward):
                names = ("gate_proj", "up_proj", "down_proj")
            for name in names:
                self.places[id(getattr(module, name).weight)] = (module, name)
        embedding = language_model.model.embed_tokens.weight
        self.places[id(embedding)] = (language_model.model, "embed_tokens")         # unless it is the head's too
        self.places[id(language_model.lm_head.weight)] = (language_model, "lm_head")

    def __call__(self, target: Tensor, name: str, entry: TensorEntry) -> Packing | None:
        """What becomes of one parameter; None: it is kept as it is."""
        if id(target) not in self.places or (self.form == "auto" and entry.stored is None):
            return None
        parent, attribute = self.places[id(target)]
        rows, columns = target.shape
        put = partial(self.put, parent, attribute)
        if attribute == "embed_tokens":     # a quantised one's rows stay as the file has them
            if self.form != "auto" or entry.stored not in READERS:
                return None
            read, held = READERS[entry.stored], stored_size(entry.stored, rows * columns)
            return Packing(lambda all: StoredEmbedding(next(all).clone(), read, self.dtype), put, "stored", rows, held)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        step = rows_at_once(columns, PACKED_AT_ONCE)
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
                return Packing(lambda groups: eight().fill(groups), put, "groups", step, held)
            return Packing(lambda values: eight().fill(values), put, "values", step, held)
        size = entry.groups or GROUP
        if columns % size or size % GROUP:
            raise InputError(f"{name} has {columns} columns, which groups of {size} do not divide: use weights int8")
        four = partial(Int4Matrix.with_room, rows, columns, size, like, None)
        held = rows * columns // 2 + rows * columns // size * 4
        if entry.groups:
            return Packing(lambda groups: four().fill(groups), put, "groups", step, held)
        return Packing(lambda values: four().fill(group(part, GROUP) for part in values), put, "values", step, held)

    @property
    def made(self) -> str:
        """What form the matrices have got, for people."""
        return ", ".join(self.forms) or "plain"

    def put(self, parent: nn.Module, attribute: str, made: nn.Module) -> None:
        """Put a matrix into its place, with the bias that is there, or an embedding."""
        if isinstance(made, Matrix):
            made.bias = getattr(parent, attribute).bias
        setattr(parent, attribute, made)
        if parent is self.model and self.model.config.tie_word_embeddings:
            assert isinstance(made, Int8Matrix | GroupedInt8Matrix)
            kind: Any = Int8Embedding if isinstance(made, Int8Matrix) else GroupedInt8Embedding
            self.model.model.embed_tokens = kind(made)
