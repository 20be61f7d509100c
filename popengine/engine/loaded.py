"""A checkpoint in memory: the model, its text and image sides, and the buffers of its runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from models.compiled import CompiledDecode
from models.cost_model import layer_weights
from models.llama import LlamaForCausalLM
from models.state import DecodeState
from popengine.engine.memory_plan import resized, state_within
from popengine.engine.packages import CachedSteps
from popengine.engine.spinner import waiting
from popengine.images.vision import TextOnly, Vision
from popengine.studies.evidence import Prior
from popengine.studies.resolve import StudyPruning, resolve_study
from popengine.studies.settings import DENSE
from popengine.text.prompts import Prompts
from weights.errors import InputError
from weights.memory import available_memory

# Capacities are rounded up to a multiple of this many slots, so that prompts of similar length share buffers.
CAPACITY_STEP = 128


@dataclass(eq=False, repr=False)
class LoadedModel:
    """A loaded checkpoint.

    model                the language model
    prompts              converts texts and conversations to token ids
    pictures             the vision side, if the checkpoint reads images
    compiled             the model's compiled decode steps, if they were requested or are in the user's cache
    end_of_sequence_ids  ids that the checkpoint's files declare as the end of a sequence
    weights              form of its matrices, for people; parameters: their number in the checkpoint
    name                 name of the checkpoint, for people
    folder               folder of the checkpoint, and its fingerprint; progress: show bars on stderr
    idle_state           buffers of the last run, for the next one; priors: made so far, by the tokens they count as
    """

    model: LlamaForCausalLM
    prompts: Prompts
    pictures: TextOnly | Vision
    compiled: CachedSteps | CompiledDecode | None
    end_of_sequence_ids: frozenset[int]
    max_seq_len: int
    dtype: torch.dtype
    device: torch.device
    weights: str
    load_s: float
    parameters: int
    name: str
    folder: Path
    fingerprint: str
    progress: bool = False
    idle_state: DecodeState | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokenizer, self.chat_template = self.prompts.tokenizer, self.prompts.chat_template
        self.priors: dict[int, Prior] = {}

    @cached_property
    def dense(self) -> StudyPruning:
        """The pruning that prunes nothing."""
        return resolve_study(DENSE, layer_weights(self.model))

    @property
    def decoder(self) -> LlamaForCausalLM | CachedSteps | CompiledDecode:
        """The compiled decode step if there is one, else the model."""
        return self.model if self.compiled is None else self.compiled

    @property
    def compiles(self) -> bool:
        """True if steps of settings that are new to this machine are compiled before a run."""
        return isinstance(self.compiled, CompiledDecode) or (self.compiled is not None and self.compiled.makes)

    @contextmanager
    def borrowed_state(self, batch: int, tokens: int, pruning: StudyPruning, missing: int = 0) -> Iterator[DecodeState]:
        """Lend the last run's buffers if they fit, else new ones. A state belongs to one run at a time.

        missing  tokens of pictures that some layers leave out
        """
        state, self.idle_state = self.idle_state, None
        if state is None or not self.fitted(state, batch, tokens, pruning, missing):
            state = None                        # freed before the new one is allocated
            state = self.new_state(batch, tokens, pruning, missing)
        try:
            yield state
        except InputError:
            state = None                        # NaN in its cache would stay NaN, even with weight 0
            raise
        finally:
            self.idle_state = state

    def fitted(self, state: DecodeState, batch: int, tokens: int, pruning: StudyPruning, missing: int) -> bool:
        """Make the state of an ended run fit another one. Returns False if it cannot. Arguments as `borrowed_state`"""
        capacity = self.capacity(tokens)
        dropped = capacity - self.capacity(tokens - missing)
        if not state.fits(batch, pruning):
            return False
        if (state.cache.capacity, state.cache.dropped) == (capacity, dropped):
            return True
        return resized(available_memory(self.device), self.model, state, capacity, dropped)

    def capacity(self, tokens: int) -> int:
        """Return the slots of a cache for `tokens` tokens."""
        return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, self.max_seq_len)

    @torch.inference_mode()
    def new_state(self, batch: int, tokens: int, pruning: StudyPruning, missing: int = 0) -> DecodeState:
        """Allocate buffers for a batch of sequences with `tokens` tokens. Raises InputError if memory is too small."""
        free, capacity = available_memory(self.device), self.capacity(tokens)
        dropped = capacity - self.capacity(tokens - missing)
        state = state_within(free, self.model, batch, capacity, pruning, dropped)
        if isinstance(self.compiled, CachedSteps) and self.compiled.made_eager(state):
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
