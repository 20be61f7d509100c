"""Loading a checkpoint as an Engine, with the choice of device, dtype, matrices and tokenizer."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.families.picture_model import PictureConfig, PictureModel
from models.families.qwen2_vl import Qwen2VLForConditionalGeneration
from models.llama import LlamaForCausalLM
from models.ranks import ALONE, Ranks, share_of
from models.registry import architecture
from popengine.engine.choices import Choices, lay_out
from popengine.engine.distributed import agree, ranks
from popengine.engine.dtypes import dtype_name
from popengine.engine.engine import Engine
from popengine.engine.packages import compiled_steps
from popengine.engine.packing import Packer, choose_form
from popengine.engine.sharding import join_ranks, shares
from popengine.engine.spinner import waiting
from popengine.images.patches import PatchVision
from popengine.images.vision import TextOnly, Vision
from popengine.text.chat import WITHOUT_TEMPLATE, read_chat_template
from popengine.text.prompts import Prompts
from popengine.text.sandbox.process import Sandbox
from popengine.text.tokenizer import FastTokenizer, TextTokenizer, open_tokenizer
from weights.checkpoint import (
    Checkpoint,
    GGUFCheckpoint,
    checkpoint_dtype,
    description_digest,
    fingerprint,
    open_checkpoint,
)
from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError
from weights.json_files import JsonObject
from weights.load import load_weights, require_room, told_apart

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    checkpoint: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    weights: str = "auto",
    max_seq_len: int | None = None,
    compile: bool | None = None,
    progress: bool = False,
) -> Engine:
    """Load a checkpoint: a Hugging Face directory, a Hub id or a .gguf file; None: the default checkpoint.

    dtype        of activations and of plain weights: "auto" (the checkpoint's own; bfloat16 with packed weights;
                 float32 for quantised weights that are made plain), "float32", "bfloat16", "float16", a short name
                 like "bf16", or a dtype of PyTorch
    device       "auto", "cpu", "cuda", "cuda:1", "mps"
    weights      "auto" (on a CPU packed weights of the checkpoint stay packed, unless float32 is requested), "plain",
                 "int8", "int4" (CPU only)
    max_seq_len  a shorter context than the model's own (which includes the extension by YaRN or linear scaling)
    compile      True: compile decode steps, which are then 1.3 to 2 times as fast on a CPU. The first run waits for
                 that; the code is kept in the user's cache. If compiling fails, a line gives the reason and steps run
                 eagerly. False: eager steps. None: compiled ones where the user's cache has them
    progress     progress bars on stderr
    Raises InputError, in one line, for anything wrong with the arguments.
    """
    began, dtype = time.perf_counter(), dtype_name(dtype)
    ours = ranks(device)
    where = choose_device(device)
    with (
        open_checkpoint(default_checkpoint() if checkpoint is None else checkpoint) as opened,
        ThreadPoolExecutor(max_workers=1) as beside,
    ):
        form = choose_form(weights, opened, where, dtype)
        kind = choose_dtype(dtype, opened, where, packed=form != "plain")
        text_side = beside.submit(open_text_side, opened)       # mostly waits for a process
        if ours.count > 1:
            agree({"checkpoint": fingerprint(opened), "config or tokenizer": description_digest(opened)})
        loaded, forms = load_model(opened, kind, where, form, progress, ours)
        tokenizer, template = text_side.result()
        pictures: TextOnly | Vision
        if isinstance(loaded, PictureModel):
            vision = PatchVision if isinstance(loaded, Qwen2VLForConditionalGeneration) else Vision
            model, pictures = loaded.language_model, vision(loaded, tokenizer, opened.path)
        else:
            model, pictures = loaded, TextOnly(loaded)
        with waiting("compiling", progress and bool(compile)):
            compiled = compiled_steps(model, compile)
        if compiled is None and where.type == "cpu" and kind != torch.float16:      # float16 is slow in this layout
            lay_out(model, Choices())
        warn_of_tokens_without_embedding(tokenizer, model, loaded)
        context = model.config.context
        if max_seq_len is not None:
            if not 1 <= max_seq_len <= context:
                raise InputError(f"the context must be between 1 and the model's {context} tokens, not {max_seq_len}")
            context = max_seq_len
        return Engine(
            model=model,
            prompts=Prompts(tokenizer, template, pictures, context),
            pictures=pictures,
            compiled=compiled,
            end_of_sequence_ids=end_of_sequence_ids(opened, tokenizer),
            max_seq_len=context,
            dtype=kind,
            device=where,
            weights=forms,
            load_s=time.perf_counter() - began,
            parameters=sum(entry.elements for entry in opened.entries.values()),
            name=opened.path.name,
            folder=opened.path if opened.path.is_dir() else opened.path.parent,
            fingerprint=fingerprint(opened),
            progress=progress,
        )


def warn_of_tokens_without_embedding(
    tokenizer: TextTokenizer, model: LlamaForCausalLM, loaded: LlamaForCausalLM | PictureModel
) -> None:
    """Warn if tokens have no embedding. The image token may lie beyond it, because it is never looked up."""
    image = loaded.config.image_token_index if isinstance(loaded, PictureModel) else -1
    rows, tokens = model.config.vocab_size, tokenizer.vocabulary_size
    if tokens - (image >= rows) > rows:
        warnings.warn(
            f"the tokenizer has {tokens} tokens and the model's embedding {rows} rows: a text with one of the last "
            f"{tokens - rows} is refused", stacklevel=3,
        )


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, form: str = "plain", progress: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[LlamaForCausalLM | PictureModel, str]:
    """Build the model without memory and fill it tensor by tensor.

    Returns the model, and the form of its matrices, for people.
    """
    family = architecture(checkpoint.config, str(checkpoint.path))
    config = family.read_config(checkpoint.config)
    require_room(checkpoint, config.sides, config.blocks)
    with_text = isinstance(config, PictureConfig)
    text = share_of(config.text if with_text else config, ranks)

    def laid_out(text: Any) -> LlamaForCausalLM | PictureModel:
        with torch.device("meta"):
            return family.model(replace(config, text=text) if with_text else text)

    model = laid_out(text)
    if apart := told_apart(model, checkpoint, model.locate):
        warnings.warn(
            f"{checkpoint.path}: its config ties {' and '.join(apart)}, which differ: each is used as it is",
            stacklevel=2,
        )
        model = laid_out(replace(text, tie_word_embeddings=False))
    language_model = model.language_model if isinstance(model, PictureModel) else model
    pack = None if form == "plain" else Packer(language_model, form, dtype, device, checkpoint.entries)
    held = shares(model, language_model)
    load_weights(model, checkpoint, dtype, device, model.locate, model.ignored_keys, progress, pack, held)
    join_ranks(language_model)
    # Buffers that no checkpoint holds (rotary frequencies) must still move to the device.
    return model.to(device).eval().requires_grad_(False), "plain" if pack is None else pack.made


def choose_device(name: str) -> torch.device:
    """Return the device of this name. Raises InputError if it is unknown or unavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but this PyTorch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for, but this machine has none; use --device cpu")
    return device


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device, packed: bool) -> torch.dtype:
    """Return the dtype of this name. Raises InputError if it is unknown or the device cannot compute in it."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    if packed and name == "auto":
        name = "bfloat16"
    dtype = checkpoint_dtype(checkpoint) if name == "auto" else DTYPES[name]
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        _ = ones @ ones
    except (RuntimeError, TypeError):
        raise InputError(f"device {device} cannot compute in {dtype}; choose another dtype") from None
    return dtype


def open_text_side(checkpoint: Checkpoint) -> tuple[TextTokenizer, str | InputError | None]:
    """Return tokenizer and chat template, from the files beside the weights or from the .gguf file.

    An InputError replaces a template that cannot be read, because raw text needs none.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        sandbox = Sandbox("tokenizers", checkpoint.tokenizer_json, str(checkpoint.path))
        return FastTokenizer(sandbox, checkpoint.bos_token, checkpoint.eos_token), checkpoint.chat_template
    tokenizer = open_tokenizer(checkpoint.path)
    try:
        return tokenizer, read_chat_template(checkpoint.path)
    except InputError as error:
        return tokenizer, InputError(f"{error}; {WITHOUT_TEMPLATE}")


def end_of_sequence_ids(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> frozenset[int]:
    """Return every id that a file of the checkpoint declares as end of sequence; text_config's if there is no other."""
    generation, config = (JsonObject(raw, str(checkpoint.path)) for raw in (
        checkpoint.generation_config, checkpoint.config
    ))  # fmt: skip
    ids = {*generation.integers("eos_token_id", ()), *config.integers("eos_token_id", ())}
    ids = ids or {*config.section("text_config").integers("eos_token_id", ())}
    if tokenizer.eos_token is not None:
        token = tokenizer.token_id(tokenizer.eos_token)
        ids |= set() if token is None else {token}
    return frozenset(ids)
