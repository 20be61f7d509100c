"""The engine, from prompts to text. `popengine.load` makes it; the loop itself is in popengine/engine/run.py.

B batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from models.cost_model import bytes_per_token, layer_weights
from models.state import DecodeState
from popengine.engine.conversation import Conversation
from popengine.engine.loaded import LoadedModel
from popengine.engine.prior import prior_for
from popengine.engine.results import Generation, Piece, measured
from popengine.engine.run import Run, next_logits
from popengine.engine.sampling_settings import Sampling, sampling_of
from popengine.images.images import ImageSource
from popengine.studies.resolve import StudyPruning, resolve_study
from popengine.studies.settings import PruningSettings
from popengine.text.chat import end_of_turn_token
from popengine.text.prompts import Prompt
from popengine.text.stops import StoppedText
from weights.errors import InputError

# Values of the argument `pruning`.
Given = PruningSettings | StudyPruning | float | None


class Engine(LoadedModel):
    """A loaded checkpoint, ready to generate."""

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
        rest = text.finish()
        run.stop_string = text.found
        yield Piece(rest, None, run.finish_reasons[0], run.prompts[0], measured(run))

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
        found = resolve_study(pruning, layer_weights(self.model))
        is_usual = pruning == PruningSettings()
        if is_usual and bytes_per_token(self.model, found) >= bytes_per_token(self.model, self.dense):
            why = f"the recommended pruning would read no less of {self.weights} weights"
            return replace(self.dense, why_dense=why)
        return found.with_prior(prior_for(self, pruning.prior)) if found.cuts else found

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute one step. tokens int64 [B] -> logits [B, V]"""
        return next_logits(self.decoder, tokens, state)


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
