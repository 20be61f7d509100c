"""The engine, from prompts to text. `popengine.load` makes it; the loop itself is in popengine/engine/run.py.

B batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.compiled import CompiledDecode
from models.cost_model import bytes_per_token, layer_weights
from models.llama import LlamaForCausalLM
from models.state import DecodeState
from popengine.engine.conversation import Conversation
from popengine.engine.memory_plan import state_within
from popengine.engine.packages import CachedSteps
from popengine.engine.prior import prior_for
from popengine.engine.results import Generation, Piece, measured
from popengine.engine.run import Run, next_logits
from popengine.engine.sampling import Sampling, sampling_of
from popengine.engine.spinner import waiting
from popengine.images.images import ImageSource
from popengine.images.vision import TextOnly, Vision
from popengine.studies.evidence import Prior
from popengine.studies.resolve import StudyPruning, resolve_study
from popengine.studies.settings import DENSE, PruningSettings
from popengine.text.chat import end_of_turn_token
from popengine.text.prompts import Prompt, Prompts
from popengine.text.stops import StoppedText
from weights.errors import InputError
from weights.memory import available_memory

# Values of the argument `pruning`.
Given = PruningSettings | StudyPruning | float | None
# Capacities are rounded up to a multiple of this many slots, so that prompts of similar length share buffers.
CAPACITY_STEP = 128


class Engine:
    """A loaded checkpoint, ready to generate.

    model     the language model
    prompts   converts texts and conversations to token ids; pictures: the vision side, if the checkpoint reads images
    compiled  the model's compiled decode steps, if they were requested or are in the user's cache
    weights   form of its matrices, for people; parameters: their number in the checkpoint
    name      name of the checkpoint, for people
    folder    folder of the checkpoint, and its fingerprint; progress: show bars on stderr
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        prompts: Prompts,
        pictures: TextOnly | Vision,
        *,
        compiled: CachedSteps | CompiledDecode | None,
        stop_ids: frozenset[int],
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: str,
        load_s: float,
        parameters: int,
        name: str,
        folder: Path,
        fingerprint: str,
        progress: bool = False,
    ) -> None:
        self.model, self.prompts, self.pictures, self.compiled = model, prompts, pictures, compiled
        self.tokenizer, self.chat_template = prompts.tokenizer, prompts.chat_template
        self.max_seq_len, self.dtype, self.device, self.weights = max_seq_len, dtype, device, weights
        self.load_s, self.parameters, self.name = load_s, parameters, name
        self.end_of_sequence_ids = stop_ids
        self.folder, self.fingerprint, self.progress = folder, fingerprint, progress
        self.priors: dict[int, Prior] = {}
        self.idle_state: DecodeState | None = None

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"<popengine.Engine of {self.name}: {type(self.model).__name__}, {self.parameters / 1e6:,.1f} M "
            f"parameters, {self.weights} weights, {dtype}, {self.device}>"
        )

    @property
    def unknown_fields(self) -> tuple[str, ...]:
        """Fields of config.json that are unknown and ignored."""
        return self.model.config.unknown_fields + self.pictures.unknown_fields

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a sequence: every end of sequence in the files, and the chat template's end of a turn."""
        turn_end = end_of_turn_token(self.chat_template, self.tokenizer) if self.chat_template else None
        return self.end_of_sequence_ids if turn_end is None else self.end_of_sequence_ids | {turn_end}

    def generate(
        self,
        prompts: Prompt | Sequence[str] | Sequence[list[dict[str, Any]]],
        *,
        images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]] = (),
        max_new_tokens: int = 128,
        pruning: Given = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        system_prompt: str | None = None,
        ignore_eos: bool = False,
        parse_special: bool = False,
        logprobs: bool = False,
        **of_sampling: Any,
    ) -> list[Generation]:
        """Generate for a batch of prompts. One partition and one pick serve the whole batch.

        prompts        one prompt or a list; a prompt is text, or a conversation in the form of chat templates
        images         paths or Pillow images, for a checkpoint that reads them: a list for one prompt, or a list of
                       lists for several (popengine.images.vision describes their positions in the text)
        pruning        a prune ratio, or PruningSettings. None: PruningSettings(), the recommended ones;
                       PruningSettings.paper() is the paper's rule
        raw            encode text without the chat template
        system_prompt  put before each text prompt as the system's turn
        parse_special  read control tokens spelled in a message as these tokens. Otherwise, and in raw text always, they
                       are read as letters
        logprobs       return the log-probability of each token under the model itself
        of_sampling    fields of Sampling by name: temperature, top_p, seed, stop, ...
        Raises InputError for prompts that are empty or exceed the context, and for images that cannot be read.
        """
        texts = as_batch(prompts)
        pictures = images_per_prompt(images, texts, one_prompt=texts[0] is prompts)
        batch = self.prompts.batch(texts, pictures, raw=raw, system_prompt=system_prompt, parse_special=parse_special)
        all_images = [image for own in pictures for image in own]
        chosen = sampling_of(sampling, of_sampling)
        run = self.run(batch, max_new_tokens, pruning, chosen, ignore_eos, all_images, logprobs=logprobs)
        token_ids, found = [list[int]() for _ in batch], [list[float]() for _ in batch]
        answers = [StoppedText(self.tokenizer, chosen.stop) for _ in batch]
        for step in run:
            for index, token in enumerate(step):
                if token is not None:
                    token_ids[index].append(token)
                    found[index] += run.logprobs[index : index + 1]
                    if chosen.stop:
                        answers[index].push(token)
                        if answers[index].found:
                            run.end(index)
        statistics = measured(run)
        return [
            Generation(
                answers[index].whole() if chosen.stop else self.tokenizer.decode(token_ids[index]), token_ids[index],
                prompt, str(run.finish_reasons[index]), statistics, found[index] if logprobs else None,
            )
            for index, prompt in enumerate(batch)
        ]

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = 128,
        pruning: Given = None,
        sampling: Sampling | None = None,
        raw: bool = False,
        system_prompt: str | None = None,
        ignore_eos: bool = False,
        parse_special: bool = False,
        logprobs: bool = False,
        **of_sampling: Any,
    ) -> Iterator[Piece]:
        """Generate for one prompt, piece by piece. Bad input raises InputError on the call, before the first piece.

        Arguments as in `generate`. Text that may begin a stop string is held back until that is decided.
        """
        ids = self.prompts.ids(
            prompt, raw=raw, system_prompt=system_prompt, images=images, parse_special=parse_special
        )
        chosen = sampling_of(sampling, of_sampling)
        return self.pieces(
            self.run([ids], max_new_tokens, pruning, chosen, ignore_eos, images, logprobs=logprobs)
        )

    def chat(
        self,
        system_prompt: str | None = None,
        *,
        pruning: Given = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        **of_sampling: Any,
    ) -> Conversation:
        """Return a conversation, whose earlier turns are not computed again. Arguments as in `generate`.

        Raises InputError without a chat template.
        """
        chosen = sampling_of(sampling, of_sampling)
        return Conversation(self, system_prompt, settings_of(pruning), chosen, max_new_tokens)

    def pieces(self, run: Run) -> Iterator[Piece]:
        """Yield the tokens of a run of one prompt as text."""
        text = StoppedText(self.tokenizer, run.sampling.stop)
        for (token,) in run:
            assert token is not None
            shown = text.push(token)
            if text.found:
                run.end(0)
            yield Piece(shown, token, logprob=run.logprobs[0] if run.logprobs else None)
        yield Piece(text.finish(), None, run.finish_reasons[0], run.prompts[0], measured(run))

    def joined(self, pieces: Iterable[Piece]) -> Generation:
        """Join the pieces of one stream."""
        *said, last = pieces
        assert last.prompt_token_ids is not None and last.finish_reason is not None and last.statistics is not None
        text = "".join(piece.text for piece in (*said, last))
        ids = [piece.token_id for piece in said if piece.token_id is not None]
        found = [piece.logprob for piece in said if piece.logprob is not None]
        return Generation(
            text, ids, last.prompt_token_ids, last.finish_reason, last.statistics, found if found else None
        )

    def run(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        pruning: Given = None,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
        images: Sequence[ImageSource] = (),
        held: DecodeState | None = None,
        kept: int = 0,
        logprobs: bool = False,
    ) -> Run:
        """Check all arguments and return a Run over token ids that has computed nothing yet.

        images      images of all prompts, in the order of their image tokens
        held, kept  see Run
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
            self.model.check_ids(self.pictures.text_ids(ids))
        stop_ids = frozenset[int]() if ignore_eos else self.stop_ids
        resolved = self.resolve(settings_of(pruning))
        given = self.pictures.given(images, prompts, kept)
        chosen = sampling or Sampling()
        return Run(self, prompts, max_new_tokens, resolved, chosen, stop_ids, given, held, kept, logprobs)

    def resolve(self, pruning: PruningSettings | StudyPruning) -> StudyPruning:
        """Resolve settings for this model; a resolved pruning is returned unchanged.

        The recommended settings become dense where they would save no bytes.
        """
        if isinstance(pruning, StudyPruning):
            return pruning
        if pruning.visual_tokens != "all" and not self.pictures.reads:
            raise InputError(
                f"visual tokens {pruning.visual_tokens} is for pictures, and this checkpoint is a text model; LLaVA, "
                "Qwen-VL and Gemma-3 read images"
            )
        weights = layer_weights(self.model)
        found, dense = resolve_study(pruning, weights), resolve_study(DENSE, weights)
        is_usual = pruning == PruningSettings()
        if is_usual and bytes_per_token(self.model, found) >= bytes_per_token(self.model, dense):
            return replace(dense, why_dense=f"the recommended pruning would read no less of {self.weights} weights")
        return found.with_prior(self.prior(pruning.prior)) if found.cuts else found

    def prior(self, tokens: int) -> Prior | None:
        """Return the evidence that counts as `tokens` tokens before the prompt; None for 0."""
        if tokens and tokens not in self.priors:
            self.priors[tokens] = prior_for(self, tokens, self.progress)
        return self.priors.get(tokens)

    @contextmanager
    def borrowed_state(self, batch: int, tokens: int, pruning: StudyPruning, missing: int = 0) -> Iterator[DecodeState]:
        """Lend the last run's buffers if they fit, else new ones. A state belongs to one run at a time.

        missing  tokens of pictures that some layers leave out
        """
        state, self.idle_state = self.idle_state, None
        capacity = self.capacity(tokens)
        if state is None or not state.fits(batch, capacity, pruning, capacity - self.capacity(tokens - missing)):
            state = None                        # freed before the new one is allocated
            state = self.new_state(batch, tokens, pruning, missing)
        try:
            yield state
        except InputError:
            state = None                        # NaN in its cache would stay NaN, even with weight 0
            raise
        finally:
            self.idle_state = state

    def capacity(self, tokens: int) -> int:
        """Return the slots of a cache for `tokens` tokens."""
        return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, self.max_seq_len)

    @torch.inference_mode()
    def new_state(self, batch: int, tokens: int, pruning: StudyPruning, missing: int = 0) -> DecodeState:
        """Allocate buffers for a batch of sequences with `tokens` tokens. Raises InputError if memory is too small."""
        free, capacity = available_memory(self.device), self.capacity(tokens)
        dropped = capacity - self.capacity(tokens - missing)
        state = state_within(free, self.model, batch, capacity, pruning, dropped)
        if isinstance(self.compiled, CachedSteps) and self.compiled.by_columns(state):
            del state                           # freed before the new one is allocated
            self.compiled = None
            state = state_within(free, self.model, batch, capacity, pruning, dropped)
        return state

    def prepare(self, state: DecodeState) -> float:
        """Compile the steps of a run if necessary. Returns seconds."""
        if self.compiled is None:
            return 0.0
        with waiting("compiling", self.progress and not self.compiled.knows(state)):
            return self.compiled.prepare(state)

    def kind_of_steps(self, state: DecodeState) -> str:
        """Return how the steps of a state run: "package", "compiled" (through torch.compile) or "eager"."""
        return "eager" if self.compiled is None else self.compiled.kind(state)

    def stepping(self) -> AbstractContextManager[object]:
        """Return the context manager for the steps of a run."""
        return nullcontext() if self.compiled is None else self.compiled.trusting_guards()

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute one step. tokens int64 [B] -> logits [B, V]"""
        return next_logits(self.model if self.compiled is None else self.compiled, tokens, state)


def settings_of(pruning: Given) -> PruningSettings | StudyPruning:
    """Convert the argument `pruning`: a number is a prune ratio, None the recommended settings."""
    if pruning is None:
        return PruningSettings()
    if isinstance(pruning, (int, float)) and not isinstance(pruning, bool):
        return PruningSettings(prune_ratio=float(pruning))
    if isinstance(pruning, (PruningSettings, StudyPruning)):
        return pruning
    raise InputError(f"pruning must be a prune ratio like 0.4, PruningSettings(...) or None, not {pruning!r}")


def as_batch(prompts: Prompt | Sequence[str] | Sequence[list[dict[str, Any]]]) -> list[Prompt]:
    """Return one or many prompts as a list. A list of messages is one conversation."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        return [prompts]  # type: ignore[list-item]
    if not prompts:
        raise InputError("no prompt was given")
    return list(prompts)  # type: ignore[arg-type]


def images_per_prompt(
    images: Sequence[ImageSource] | Sequence[Sequence[ImageSource]], prompts: list[Prompt], one_prompt: bool
) -> list[Sequence[ImageSource]]:
    """Return the images of each prompt. One prompt takes a plain list, several a list of lists."""
    if one_prompt:
        return [images]  # type: ignore[list-item]
    if not images:
        return [()] * len(prompts)
    if len(images) != len(prompts) or not all(isinstance(own, (list, tuple)) for own in images):
        raise InputError(
            f"images for {len(prompts)} prompts must be {len(prompts)} lists of images, one list for each prompt"
        )
    return list(images)  # type: ignore[arg-type]
