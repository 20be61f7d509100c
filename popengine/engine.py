"""The engine: load a checkpoint, then text -> tokens -> prefill -> decode steps -> text.

    engine = load("path/or/hub-id")
    for piece in engine.stream("Why is the sky blue?", pruning=PruningSettings(prune_ratio=0.4)):
        print(piece.text, end="")

B batch, T prompt tokens.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clock import Clock
from models.layers import Linear
from models.llama import LlamaForCausalLM
from models.llava import LlavaForConditionalGeneration
from models.mixtral import ActiveExperts, MixtralForCausalLM
from models.products import lay_columns_together
from models.pruning.settings import DENSE, Pruning, PruningSettings, resolve
from models.state import DecodeState
from popengine.memory import peak_memory_bytes
from popengine.pictures.images import ImageSource
from popengine.pictures.vision import Vision
from popengine.sampling import Sampling, next_tokens
from popengine.text.chat import end_of_turn_token, read_chat_template, render_chat
from popengine.text.tokenizer import FastTokenizer, TextStream, TextTokenizer, open_tokenizer
from weights.checkpoint import Checkpoint, GGUFCheckpoint, checkpoint_dtype, open_checkpoint
from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError
from weights.load import load_weights
from weights.memory import available_memory

ARCHITECTURES: dict[str, type[LlamaForCausalLM] | type[LlavaForConditionalGeneration]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2MoeForCausalLM": MixtralForCausalLM,
    "Qwen3MoeForCausalLM": MixtralForCausalLM,
    "LlavaForConditionalGeneration": LlavaForConditionalGeneration,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A prompt, or a conversation as chat templates take it: [{"role": "user", "content": "..."}, ...].
Prompt = str | list[dict[str, Any]]

# Capacities are rounded up to this many slots, so that prompts of like length find the buffers of the last one.
CAPACITY_STEP = 128


@dataclass(frozen=True)
class Regions:
    """Channels of one feed-forward network (of the first layer; all layers of a uniform model are cut alike)."""

    channels: int
    retained: int
    candidate: int
    pruned: int
    picked: int


@dataclass(frozen=True)
class ExpertUse:
    """What was seen of the experts of one layer, one number per expert.

    prompt_tokens  that were routed to it and counted in its scores
    picks          decoded tokens that were routed to it
    copied         whether it has a copy of its active weights (not before it is needed, nor beyond the free memory)
    """

    layer: int
    prompt_tokens: tuple[int, ...]
    picks: tuple[int, ...]
    copied: tuple[bool, ...]


@dataclass(frozen=True)
class Statistics:
    """Measured over one call of generate or stream; the batch is served as one.

    prompt_tokens        padding not counted; of them, image_tokens stand for pictures
    image_ms             vision tower and projector
    prefill_ms           embedded prompt to first logits, without the partition
    partition_ms         scores, sort and copy of the active weights; within them: scores_ms, sort_ms, copy_ms
    decode_ms_per_token  mean over the decode steps; nan when there was none
    compile_s            spent on compiling the decode step before the run; 0 when that was done or is not wanted
    experts              per layer that is a mixture of experts
    """

    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    image_ms: float
    prefill_ms: float
    partition_ms: float
    scores_ms: float
    sort_ms: float
    copy_ms: float
    decode_ms_per_token: float
    decode_tokens_per_s: float
    compile_s: float
    regions: Regions
    pruning: Pruning
    weight_bytes_per_token: int
    dense_weight_bytes_per_token: int
    peak_memory_bytes: int
    experts: tuple[ExpertUse, ...]


@dataclass(frozen=True)
class Piece:
    """One step of a stream: a token and the text that it completes, if any.

    The last piece has no token. It brings text that was held back, finish_reason ("stop" or "length"), the prompt's
    token ids and the statistics.
    """

    text: str
    token_id: int | None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None
    statistics: Statistics | None = None


@dataclass(frozen=True)
class Generation:
    """What one prompt of a batch became. token_ids end with the end-of-sequence token when that was reached."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    statistics: Statistics


class Run:
    """One batch on its way: nothing is computed before it is iterated, the prompt at the first step.

    Iterating yields, per step, the new token of each sequence, or None for sequences that had ended before.
    """

    def __init__(
        self,
        engine: "Engine",
        prompts: list[list[int]],
        max_new_tokens: int,
        pruning: Pruning,
        sampling: Sampling,
        stop_ids: frozenset[int],
        pixel_values: Tensor | None = None,                                         # [pictures, 3, Y, X]
    ) -> None:
        self.pixel_values = pixel_values
        self.engine, self.prompts, self.sampling, self.stop_ids = engine, prompts, sampling, stop_ids
        self.max_new_tokens, self.pruning = max_new_tokens, pruning
        self.generator = sampling.generator(engine.device)
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        self.new_tokens = self.decode_steps = 0
        self.image_s = self.prefill_s = self.decode_s = 0.0

    def __iter__(self) -> Iterator[list[int | None]]:
        engine, model = self.engine, self.engine.model
        longest = max(len(prompt) for prompt in self.prompts)
        state = engine.borrow_state(len(self.prompts), longest + self.max_new_tokens, self.pruning)
        self.state = state
        try:
            self.compile_s = engine.compile_for(state)
            tokens, real = pad_left(self.prompts, engine.device)
            x, counted = self.embed(tokens, real)
            began = time.perf_counter()
            with torch.inference_mode():
                logits = model.prefill(x, state, real, counted)                     # [B, V]
                chosen = next_tokens(logits, self.sampling, self.generator)         # [B]
                new = self.accept(chosen)
            self.prefill_s = time.perf_counter() - began
            yield new
            while None in self.finish_reasons:
                began = time.perf_counter()
                with torch.inference_mode(), engine.trusting_guards():
                    logits = model.decode(chosen, state)                            # [B, V]
                    chosen = next_tokens(logits, self.sampling, self.generator)     # [B]
                    new = self.accept(chosen)
                self.decode_s += time.perf_counter() - began
                self.decode_steps += 1
                yield new
        finally:
            engine.give_back(state)

    @torch.inference_mode()
    def embed(self, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The prompts with their pictures in place [B, T, H], and which tokens count in the scores (None: all)."""
        vision = self.engine.vision
        if vision is None:
            return self.engine.model.embed(tokens), None
        clock = Clock(self.engine.device)
        features = None
        if self.pixel_values is not None:
            with clock.phase("images"):
                features = vision.model.encode_images(self.pixel_values.to(self.engine.device))   # [pictures, P, H]
        x = vision.model.embed(tokens, features)
        self.image_s = clock.milliseconds("images") / 1000
        if self.pruning.scored_tokens == "all":
            return x, None
        text = ~vision.model.is_image(tokens)                                       # [B, T]
        return x, text if real is None else text & real

    def accept(self, chosen: Tensor) -> list[int | None]:
        """Take one token per sequence that is still running, and end those that are done."""
        self.new_tokens += 1
        new: list[int | None] = []
        for index, token in enumerate(chosen.tolist()):
            if self.finish_reasons[index] is not None:
                new.append(None)
                continue
            new.append(token)
            if token in self.stop_ids:
                self.end(index)
            elif self.new_tokens == self.max_new_tokens:
                self.finish_reasons[index] = "length"
        return new

    @torch.inference_mode()
    def end(self, index: int) -> None:
        """One sequence is done: it yields no more tokens and no longer counts when candidates are picked."""
        self.finish_reasons[index] = "stop"
        self.state.live[index] = False

    def statistics(self) -> Statistics:
        engine, clock = self.engine, self.state.clock
        scores, sort, copy = (clock.milliseconds(phase) for phase in ("scores", "sort", "copy"))
        partition = scores + sort + copy
        per_token = self.decode_s / self.decode_steps if self.decode_steps else float("nan")
        return Statistics(
            prompt_tokens=sum(map(len, self.prompts)),
            image_tokens=0 if engine.vision is None else engine.vision.image_tokens(self.prompts),
            new_tokens=self.new_tokens,
            image_ms=self.image_s * 1000,
            prefill_ms=self.prefill_s * 1000 - partition,
            partition_ms=partition,
            scores_ms=scores,
            sort_ms=sort,
            copy_ms=copy,
            decode_ms_per_token=per_token * 1000,
            decode_tokens_per_s=len(self.prompts) / per_token,
            compile_s=self.compile_s,
            regions=engine.regions(self.pruning),
            pruning=self.pruning,
            weight_bytes_per_token=engine.model.weight_bytes_per_token(self.pruning),
            dense_weight_bytes_per_token=engine.model.weight_bytes_per_token(engine.resolve(DENSE)),
            peak_memory_bytes=peak_memory_bytes(engine.device),
            experts=expert_use(self.state),
        )


class Engine:
    """A loaded checkpoint, ready to generate. Made by `load`.

    model   the language model; vision is what a LLaVA checkpoint has besides, None for the others
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: TextTokenizer,
        *,
        chat_template: str | None,
        stop_ids: frozenset[int],
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        load_s: float,
        vision: Vision | None = None,
    ) -> None:
        self.model, self.tokenizer, self.chat_template, self.vision = model, tokenizer, chat_template, vision
        self.max_seq_len, self.dtype, self.device, self.load_s = max_seq_len, dtype, device, load_s
        self.end_of_sequence_ids = stop_ids
        self.idle_state: DecodeState | None = None
        # Batch sizes and prunings whose decode step has been compiled.
        self.compiled_for: set[tuple[int, Pruning]] = set()

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields of config.json that nothing here knows, and that are ignored."""
        return self.model.config.unknown_fields + (() if self.vision is None else self.vision.unknown_fields)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a sequence: what the files call end of sequence, and what the chat template ends a turn with."""
        turn_end = end_of_turn_token(self.chat_template, self.tokenizer) if self.chat_template else None
        return self.end_of_sequence_ids if turn_end is None else self.end_of_sequence_ids | {turn_end}

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[list[dict[str, Any]]],
        *,
        images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]] = (),
        max_new_tokens: int = 128,
        pruning: PruningSettings | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        system_prompt: str | None = None,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Generate for a batch of prompts, decided upon together: one partition and one pick serve the whole batch.

        prompts        one prompt or a list; a prompt is text, or a conversation as chat templates take it
        images         paths or Pillow images, for a LLaVA checkpoint: those of the one prompt, or a list for each of
                       several prompts (see popengine.pictures.vision for where they stand in the text)
        raw            encode text as it stands, without the chat template
        system_prompt  put before each text prompt as the system's turn
        Raises InputError for prompts that are empty or do not fit the context, and for images that cannot be read.
        """
        texts = as_batch(prompts)
        pictures = images_per_prompt(images, texts, one_prompt=texts[0] is prompts)
        batch = [
            self.prompt_ids(prompt, raw=raw, system_prompt=system_prompt, images=len(own))
            for prompt, own in zip(texts, pictures, strict=True)
        ]
        all_images = [image for own in pictures for image in own]
        run = self.run(batch, max_new_tokens, pruning, sampling, ignore_eos, all_images)
        token_ids: list[list[int]] = [[] for _ in batch]
        for step in run:
            for ids, token in zip(token_ids, step, strict=True):
                if token is not None:
                    ids.append(token)
        statistics = run.statistics()
        return [
            Generation(self.tokenizer.decode(ids), ids, prompt, str(reason), statistics)
            for ids, prompt, reason in zip(token_ids, batch, run.finish_reasons, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = 128,
        pruning: PruningSettings | None = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        system_prompt: str | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Generate for one prompt, piece by piece. Bad input raises InputError here, before the first piece."""
        ids = self.prompt_ids(prompt, raw=raw, system_prompt=system_prompt, images=len(images))
        return self.pieces(self.run([ids], max_new_tokens, pruning, sampling, ignore_eos, images))

    def pieces(self, run: Run) -> Iterator[Piece]:
        """The tokens of a run of one prompt as text."""
        text = TextStream(self.tokenizer)
        for (token,) in run:
            assert token is not None
            yield Piece(text.push(token), token)
        yield Piece(text.finish(), None, run.finish_reasons[0], run.prompts[0], run.statistics())

    def run(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        pruning: PruningSettings | None = None,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
        images: Sequence[ImageSource] = (),
    ) -> Run:
        """Check everything that can be wrong, then a Run over token ids that has computed nothing yet.

        images  those of all prompts, in the order of their image tokens
        """
        if max_new_tokens < 1:
            raise InputError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
        for ids in prompts:
            if not ids:
                raise InputError("the prompt is empty: give at least one token of text")
            if len(ids) + max_new_tokens > self.max_seq_len:
                raise InputError(
                    f"the prompt has {len(ids)} tokens and {max_new_tokens} new ones are asked for, together "
                    f"{len(ids) + max_new_tokens}: more than the context of {self.max_seq_len}"
                )
        stop_ids = frozenset[int]() if ignore_eos else self.stop_ids
        resolved = self.resolve(pruning or PruningSettings())
        pixel_values = self.vision.pixel_values(images) if self.vision is not None and images else None
        return Run(self, prompts, max_new_tokens, resolved, sampling or Sampling(), stop_ids, pixel_values)

    def prompt_ids(
        self, prompt: Prompt, *, raw: bool = False, system_prompt: str | None = None, images: int = 0
    ) -> list[int]:
        """Token ids of a prompt: through the chat template if there is one and `raw` does not forbid it.

        images  how many are given with it; each has as many image tokens among the ids as the vision tower makes
        """
        if images and self.vision is None:
            raise InputError("an image was given, and this checkpoint is a text model; a LLaVA checkpoint reads images")
        ids = self.tokenizer.encode(*self.prompt_text(prompt, raw, system_prompt, images))
        return ids if self.vision is None else self.vision.expand(ids, images)

    def prompt_text(self, prompt: Prompt, raw: bool, system_prompt: str | None, images: int) -> tuple[str, bool]:
        """A prompt as it goes to the tokenizer, and whether that still has to add its special tokens."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty: give at least one token of text")
            check_text(prompt, "the prompt")
        if isinstance(prompt, str) and (raw or self.chat_template is None):
            if system_prompt is not None:
                raise InputError("a system prompt needs a chat template, and this prompt is encoded without one")
            if self.vision is not None and not raw:
                prompt = self.vision.plain(self.vision.messages(as_messages(prompt), images)[0]["content"])
            return prompt, True
        if self.chat_template is None:
            raise InputError("this checkpoint has no chat template: give the prompt as one text")
        messages = as_messages(prompt)
        if system_prompt is not None:
            check_text(system_prompt, "the system prompt")
            messages = [{"role": "system", "content": system_prompt}, *messages]
        render = partial(
            render_chat,
            self.chat_template,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )
        text = render(messages) if self.vision is None else self.vision.render(messages, images, render)
        # The template has written the special tokens itself.
        return text, False

    def resolve(self, settings: PruningSettings) -> Pruning:
        return resolve(settings, self.model.layer_weights())

    def regions(self, pruning: Pruning) -> Regions:
        sizes = self.model.ffn_sizes(pruning)
        return Regions(sizes.channels, sizes.retained, sizes.candidate, sizes.pruned, sizes.pick)

    def borrow_state(self, batch: int, tokens: int, pruning: Pruning) -> DecodeState:
        """The last run's buffers when they fit, else new ones. A state belongs to one run at a time."""
        capacity = min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, self.max_seq_len)
        state, self.idle_state = self.idle_state, None
        if state is not None and state.fits(batch, capacity, pruning):
            return state
        del state                               # before the new one is allocated: never both
        with torch.inference_mode():
            return self.model.new_state(batch, capacity, pruning, available_memory(self.device))

    def compile_for(self, state: DecodeState) -> float:
        """Have the decode step of this shape compiled, so that no step of a run waits for it; returns seconds."""
        shape = (len(state.live), state.pruning)
        if not self.model.compiled or shape in self.compiled_for:
            return 0.0
        began = time.perf_counter()
        with torch.inference_mode():
            tokens = torch.zeros(shape[0], dtype=torch.int64, device=self.device)
            self.model.prefill(self.model.embed(tokens.unsqueeze(1)), state)
            self.model.decode(tokens, state)
        self.compiled_for.add(shape)
        return time.perf_counter() - began

    def trusting_guards(self) -> AbstractContextManager[object]:
        """For compiled steps of a shape that compile_for has seen to.

        PyTorch then tells its compiled functions apart by what differs between them, and leaves out some 250 other
        checks of every call, which take 5 % of a step.
        """
        if not self.model.compiled:
            return nullcontext()
        return torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)

    def give_back(self, state: DecodeState) -> None:
        self.idle_state = state


def load(
    checkpoint: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_seq_len: int | None = None,
    compile: bool = False,
    progress: bool = False,
) -> Engine:
    """Load a checkpoint: a Hugging Face directory, a Hub id or a .gguf file; None: the default checkpoint.

    dtype        "auto" (the checkpoint's own; float32 for quantised .gguf), "float32", "bfloat16" or "float16"
    device       "auto", "cpu", "cuda", "cuda:1", "mps"
    max_seq_len  a shorter context than the model's own
    compile      run decode steps through torch.compile: seconds to start, then 1.3 to 2 times as fast on a CPU.
                 Where that does not work, a warning says why and steps run as without it
    progress     progress bars on stderr
    Raises InputError, in one line, for anything wrong with what was given.
    """
    began = time.perf_counter()
    where = choose_device(device)
    with open_checkpoint(default_checkpoint() if checkpoint is None else checkpoint) as opened:
        kind = choose_dtype(dtype, opened, where)
        tokenizer, template = open_text_side(opened)
        loaded = load_model(opened, kind, where, progress)
        vision: Vision | None = None
        if isinstance(loaded, LlavaForConditionalGeneration):
            model, vision = loaded.language_model, Vision(loaded, tokenizer, opened.path)
        else:
            model = loaded
        if compile and (problem := compiler_problem(where)):
            warnings.warn(f"torch.compile does not work here, so steps run eagerly: {problem}", stacklevel=2)
        elif compile:
            model.compile_decode()
        if not model.compiled and where.type == "cpu" and kind != torch.float16:    # which PyTorch multiplies slowly so
            for module in model.modules():
                if isinstance(module, Linear):
                    lay_columns_together(module)
        context = model.config.max_position_embeddings
        if max_seq_len is not None:
            if not 1 <= max_seq_len <= context:
                raise InputError(f"the context must be between 1 and the model's {context} tokens, not {max_seq_len}")
            context = max_seq_len
        return Engine(
            model,
            tokenizer,
            chat_template=template,
            stop_ids=end_of_sequence_ids(opened, tokenizer),
            max_seq_len=context,
            dtype=kind,
            device=where,
            load_s=time.perf_counter() - began,
            vision=vision,
        )


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine, in one line; None when it can."""
    try:
        torch.compile(torch.neg, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:      # whatever a compiler, its absence or its environment raises
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: bool = False
) -> LlamaForCausalLM | LlavaForConditionalGeneration:
    """The forward passes with their weights: laid out without memory first, then filled tensor by tensor."""
    model_class = architecture(checkpoint)
    with torch.device("meta"):
        model = model_class.from_config(checkpoint.config)
    load_weights(model, checkpoint, dtype, device, model.locate, model.ignored_keys, progress)
    # What is no part of a checkpoint (rotary frequencies) has yet to follow to the device.
    return model.to(device).eval().requires_grad_(False)


def architecture(checkpoint: Checkpoint) -> type[LlamaForCausalLM] | type[LlavaForConditionalGeneration]:
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{checkpoint.path}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def choose_device(name: str) -> torch.device:
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


def choose_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    dtype = checkpoint_dtype(checkpoint) if name == "auto" else DTYPES[name]
    try:
        ones = torch.ones(2, 2, dtype=dtype, device=device)
        _ = ones @ ones
    except (RuntimeError, TypeError):
        raise InputError(f"device {device} cannot compute in {dtype}; choose another dtype") from None
    return dtype


def open_text_side(checkpoint: Checkpoint) -> tuple[TextTokenizer, str | None]:
    """Tokenizer and chat template, from the files beside the weights or from inside a .gguf."""
    if isinstance(checkpoint, GGUFCheckpoint):
        tokenizer = FastTokenizer(checkpoint.tokenizer, checkpoint.bos_token, checkpoint.eos_token)
        return tokenizer, checkpoint.chat_template
    return open_tokenizer(checkpoint.path), read_chat_template(checkpoint.path)


def end_of_sequence_ids(checkpoint: Checkpoint, tokenizer: TextTokenizer) -> frozenset[int]:
    """Every id that any file of the checkpoint calls an end of sequence."""
    ids: set[int] = set()
    for config in (checkpoint.generation_config, checkpoint.config):
        named = config.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        ids |= {token for token in named if isinstance(token, int)}
    if tokenizer.eos_token is not None:
        token = tokenizer.token_id(tokenizer.eos_token)
        ids |= set() if token is None else {token}
    return frozenset(ids)


def expert_use(state: DecodeState) -> tuple[ExpertUse, ...]:
    use = []
    for index, layer in enumerate(state.layers):
        if isinstance(layer.ffn, ActiveExperts):
            copied = tuple(copy is not None for copy in layer.ffn.copies)
            use.append(ExpertUse(index, tuple(layer.ffn.prompt_tokens), tuple(layer.ffn.picks), copied))
    return tuple(use)


def as_batch(prompts: Prompt | Sequence[str] | Sequence[list[dict[str, Any]]]) -> list[Prompt]:
    """One prompt or many -> many. A list of messages is one conversation."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    if not prompts:
        raise InputError("no prompt was given")
    return list(prompts)  # type: ignore[arg-type]


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def images_per_prompt(
    images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]], prompts: list[Prompt], one_prompt: bool
) -> list[Sequence[ImageSource]]:
    """The images of each prompt. For one prompt they come as a plain list, for several as a list of lists."""
    if one_prompt:
        return [images]  # type: ignore[list-item]
    if not images:
        return [()] * len(prompts)
    if len(images) != len(prompts) or not all(isinstance(own, (list, tuple)) for own in images):
        raise InputError(
            f"images for {len(prompts)} prompts must be {len(prompts)} lists of images, one list for each prompt"
        )
    return list(images)  # type: ignore[arg-type]


def check_text(text: str, what: str) -> None:
    """Text with lone surrogates is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (at character {error.start})") from None


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, int64 [B, T], and which slots are real, bool [B, T] (None when none is padding).

    Padding stands on the left, so that every sequence ends in the same slot. Its token id is never seen by a real
    token: 0 will do.
    """
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    if all(len(ids) == longest for ids in prompts):
        return tokens, None
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    real = torch.arange(longest, device=device) >= (longest - lengths)[:, None]    # [B, T]
    return tokens, real
