"""Promises that hold for every family, settings, form of weights and dtype, on combinations drawn at random.

A failure names the seed and what it drew. By default each promise is held to a few cases, always the same ones. With
RANDOM_TEST_SECONDS all promises together take so many seconds, from a new seed, and compiled steps are among them.

Two ways of computing one thing may round differently. How much is taken from float64: two ways may be TIMES as far
apart as the dense model in its dtype is from the one in float64. Where two channels, heads or experts are nearer to
each other than that, both ways may rightly choose differently: such a near-tie is counted and left out.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import count
from random import Random
from typing import Any

import pytest
import torch
from builders import MIXTRAL, MODELS, QWEN2_MOE, interrupted, left_padded, resolved, stored_by_columns
from torch import Tensor

from models.attention import Attention
from models.compiled import CompiledDecode, compiler_problem
from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.packed import Int4Matrix, Int8Matrix
from models.matrices.plain import Matrix
from models.pruning import heads, partition, pop
from models.pruning.pruning import Pruning
from models.registry import architecture
from models.state import DecodeState
from popengine.engine.run import next_logits
from popengine.studies import input_sparsity, rules
from popengine.studies.evidence import Prior
from popengine.studies.known_text import evaluate
from popengine.studies.settings import INPUT_METHODS, RULE_NAMES, PruningSettings
from weights.errors import InputError
from weights.groups import group

SECONDS = float(os.environ.get("RANDOM_TEST_SECONDS", "0"))
CASES = 12
VOCABULARY, LAYERS, CAPACITY = 96, 3, 64
# Sides that groups of four bits divide.
SIDES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
FAMILIES = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
FORMS = ("plain", "columns", "int8", "int4")
TIMES = 8
# Norms and scores are float32 in every dtype: of the float64 model that many roundings of it.
OF_FLOAT64 = 2.0**-18


@cache
def float32_model(family: str) -> LlamaForCausalLM:
    """Weights large enough that a wrong detail shows."""
    raw = deepcopy(FAMILIES[family]).to_dict()
    sides = SIDES | {"head_dim": 64 // raw["num_attention_heads"]}
    raw |= {name: side for name, side in sides.items() if name in raw}
    model: Any = architecture(raw, family).from_config(raw).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=0.15, generator=generator)
    return model


def changed_matrices(model: LlamaForCausalLM, change: Callable[[Any], Matrix | None]) -> LlamaForCausalLM:
    """A copy with other matrices where `change` gives one; routers, and a head that is the embedding, stay."""
    model = deepcopy(model)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, Matrix) and own.endswith("_proj"):
            setattr(model.get_submodule(parent), own, change(module) or module)
    return model


@cache
def model_of(family: str, form: str, dtype: torch.dtype) -> LlamaForCausalLM:
    model = deepcopy(float32_model(family)).to(dtype)
    if form == "columns":
        return stored_by_columns(model)
    if form == "int8":
        return changed_matrices(model, lambda one: Int8Matrix.nearest(one.weight.float(), dtype, one.bias))
    if form == "int4":
        return changed_matrices(
            model, lambda one: Int4Matrix.of_groups(group(one.weight.float(), 32), dtype, one.bias)
        )
    return model


@cache
def with_plain_values(family: str, form: str) -> LlamaForCausalLM:
    """A packed float32 model whose matrices are what their numbers stand for."""
    model = model_of(family, form, torch.float32)
    return changed_matrices(model, lambda one: Matrix.of(one.values().contiguous(), one.bias))


@cache
def tolerance(family: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return TIMES * OF_FLOAT64
    tokens, _ = left_padded([40] * 4, VOCABULARY, seed=3)
    exact = deepcopy(float32_model(family)).double()(tokens)
    return TIMES * distance(deepcopy(float32_model(family)).to(dtype)(tokens), exact)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, of the row where it is largest. [..., V] each"""
    one, other = one.double(), other.double()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


@cache
def prior_of(model: LlamaForCausalLM, tokens: int) -> Prior:
    """Mean squares as random as the weights."""
    generator, of = torch.Generator().manual_seed(1), {}
    for module in model.modules():
        if isinstance(module, FeedForward):
            of |= {(module, part): torch.rand(module.channels, generator=generator) for part in ("h", "gate", "up")}
        if isinstance(module, Attention):
            of[module, "h"] = torch.rand(module.heads * module.head_dim, generator=generator)
    return Prior(of, tokens)


class NearTie(Exception):
    """Two ways may rightly have chosen differently."""


@dataclass
class Choices:
    """The least distance, relative to the mean score, between what was chosen and what was not."""

    nearest: float = float("inf")

    def between(self, scores: Tensor, places: list[int]) -> None:
        """Scores [..., n] of which the best so many are chosen, for each of `places`."""
        falling = scores.double().sort(dim=-1, descending=True).values
        for place in places:
            if 0 < place < scores.shape[-1]:
                apart = (falling[..., place - 1] - falling[..., place]) / scores.double().abs().mean(dim=-1)
                self.nearest = min(self.nearest, float(apart.min()))


@contextmanager
def watched_choices() -> Iterator[Choices]:
    choices = Choices()
    keep_best, cut, rank, route = (
        partition.keep_best, partition.partition_channels, rules.rank_by_score, MixtureOfExperts.route
    )

    def watched_keep(scores: Tensor, count: int) -> Tensor:
        choices.between(scores, [count])
        return keep_best(scores, count)

    def watched_cut(scores: Tensor, sizes: Any) -> Any:
        each = scores.unflatten(-1, (sizes.groups, -1))
        choices.between(each, [sizes.retained // sizes.groups, sizes.active // sizes.groups])
        return cut(scores, sizes)

    def watched_rank(scores: Tensor, groups: int = 1) -> Tensor:
        each = scores.view(groups, -1)
        choices.between(each, list(range(each.shape[-1])))
        return rank(scores, groups)

    def watched_route(mixture: Any, x: Tensor, gate: Any = None) -> Any:
        routing = route(mixture, x, gate)
        if len(x):
            choices.between(routing.probabilities, [mixture.experts_per_token])
        return routing

    with pytest.MonkeyPatch.context() as patch:
        for module in (partition, input_sparsity):
            patch.setattr(module, "keep_best", watched_keep)
        for module in (pop, heads):
            patch.setattr(module, "partition_channels", watched_cut)
        patch.setattr(rules, "rank_by_score", watched_rank)
        patch.setattr(MixtureOfExperts, "route", watched_route)
        yield choices


class Case:
    """What one seed draws. `said` is what a failure prints."""

    def __init__(self, seed: int, promise: str) -> None:
        self.random, self.said = Random(f"{promise} {seed}"), [f"seed {seed}"]

    def of(self, name: str, *choices: Any) -> Any:
        chosen = self.random.choice(choices)
        self.said.append(f"{name} {chosen!r}")
        return chosen

    def model(
        self, forms: tuple[str, ...], dtypes: tuple[torch.dtype, ...], families: Any = FAMILIES
    ) -> LlamaForCausalLM:
        """Other forms than plain know no float64."""
        self.family, form, self.dtype = self.of("family", *families), self.of("form", *forms), self.of("dtype", *dtypes)
        if self.dtype == torch.float64:
            form = "plain"
        return model_of(self.family, form, self.dtype)

    def tokens(self, name: str, least: int, most: int, batch: int = 1) -> Tensor:
        length = self.of(name, *range(least, most + 1))
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        return torch.randint(VOCABULARY, (batch, length), generator=generator)

    def pruning(self, model: LlamaForCausalLM, **fixed: Any) -> Pruning:
        """Settings that go together, but for those that are fixed."""
        maybe: dict[str, tuple[Any, ...]] = {
            "ffn_ratio": (0.2, 0.4, 0.6, 0.8), "candidate_width": (0.0, 0.1, 0.3, 0.6, 1.2),
            "retained_share": (None, None, 0.0, 0.1, 0.3), "head_ratio": (0.0, 0.0, 0.5),
            "prefill": ("pruned", "dense"), "prior": (0, 0, 9), "min_evidence": (0, 0, 12),
            "dense_every": (None, None, 1, 2, 3), "redraw_every": (None, 2, 4), "rule": ("pop", "pop", *RULE_NAMES),
            "min_tokens": (1, 3), "unseen_experts": ("weights", "dense"), "groups": (1, 1, 2, 4),
            "prefill_skip": (0.0, 0.0, "1/3", "2/3"), "boundary_tokens": (1, 3),
            "leave_out": ("", "", "1", "0.mlp", "2.attention", "1.attention+2.mlp"),
            "input_sparsity": ("", "", "0.3", "0.2,o=0.3,down=0.6,head=0.3"), "input_score": INPUT_METHODS,
        }
        while True:
            drawn = {name: self.random.choice(values) for name, values in maybe.items()} | fixed
            try:
                found = resolved(model, PruningSettings.paper(**drawn))
                if found.cuts and drawn["prior"]:
                    found = found.with_prior(prior_of(model, drawn["prior"]))
                model.new_state(1, 1, found)
            except InputError:
                continue
            usual = PruningSettings.paper()
            self.said.append(str({name: value for name, value in drawn.items() if value != getattr(usual, name)}))
            return found

    def equal(self, one: Tensor, other: Tensor, choices: Choices) -> None:
        apart, least = distance(one, other), tolerance(self.family, self.dtype)
        if apart > least:
            if choices.nearest < least:
                raise NearTie
            raise AssertionError(f"{apart:.2g} apart, {least:.2g} allowed, nearest choice {choices.nearest:.2g}")


def steps(model: Any, tokens: Tensor, state: DecodeState) -> Tensor:
    """Of a model or its compiled steps. int64 [B, T] -> logits [B, T, V]"""
    return torch.stack([next_logits(model, token, state) for token in tokens.unbind(1)], dim=1)


def answer(
    model: LlamaForCausalLM, state: DecodeState, prompt: Tensor, text: Tensor, real: Tensor | None = None
) -> Tensor:
    """The logits after the prompt and after each token of the text: [B, 1 + T, V]"""
    first = model.prefill(model.embed(prompt), state, real)
    return torch.cat([first[:, None], steps(model, text, state)], dim=1)


def padded(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of 1 to 3 sequences, what of them is real, and a text for each."""
    lengths = [case.random.randrange(1, 16) for _ in range(case.of("batch", 1, 2, 3))]
    tokens, real = left_padded(lengths, VOCABULARY, case.random.getrandbits(32))
    return tokens, real, case.tokens("text", 1, 8, len(lengths))


FLOATS, HALF = (torch.float64, torch.float32), (torch.bfloat16,)
UNROUTED = tuple(MODELS)


def ratio_zero_is_dense(case: Case) -> None:
    half = case.of("half", False, False, True)      # whose routers would often be near a tie
    forms, dtypes, families = (FORMS, HALF, UNROUTED) if half else (FORMS[:2], FLOATS, tuple(FAMILIES))
    model = case.model(forms, dtypes, families)
    pruning = case.pruning(
        model, ffn_ratio=0.0, head_ratio=0.0, prefill_skip=0.0, leave_out="", input_sparsity=""
    )
    prompt, real, text = padded(case)
    state = model.new_state(len(prompt), CAPACITY, pruning)
    with watched_choices() as choices:
        given = answer(model, state, prompt, text, real)
        whole = model(torch.cat([prompt, text], dim=1), torch.cat([real, torch.ones_like(text).bool()], dim=1))
        case.equal(given, whole[:, prompt.shape[1] - 1 :], choices)


def each_of_a_dense_batch_is_as_if_alone(case: Case) -> None:
    model = case.model(FORMS[:2], FLOATS)
    pruning = case.pruning(model, ffn_ratio=0.0, head_ratio=0.0)
    prompt, real, text = padded(case)
    with watched_choices() as choices:
        together = answer(model, model.new_state(len(prompt), CAPACITY, pruning), prompt, text, real)
        for row, own in enumerate(real):
            state = model.new_state(1, CAPACITY, pruning)
            case.equal(together[row], answer(model, state, prompt[row, own][None], text[row][None])[0], choices)


def a_prompt_in_pieces_is_one_prompt(case: Case) -> None:
    """As a conversation is, where all channels finish the prompt. Steps between the pieces are taken back."""
    model = case.model(FORMS[:2], FLOATS)
    first, second, text = case.tokens("first", 1, 15), case.tokens("second", 1, 15), case.tokens("text", 1, 8)
    said, fixed = case.of("between", 0, 2), {"prefill": "dense", "prefill_skip": 0.0}
    if said:            # dense steps would be evidence that the prompt in one piece has not
        fixed |= {"min_evidence": 0, "dense_every": None, "redraw_every": None}
    pruning = case.pruning(model, **fixed)
    with watched_choices() as choices:
        whole = answer(model, model.new_state(1, CAPACITY, pruning), torch.cat([first, second], dim=1), text)
        state = model.new_state(1, CAPACITY, pruning)
        model.prefill(model.embed(first), state)
        if said:
            steps(model, text[:, :1].repeat(1, said), state)
        pieces = model.prefill(model.embed(second), state, kept=first.shape[1])
        case.equal(torch.cat([pieces[:, None], steps(model, text, state)], dim=1), whole, choices)


def one_pass_is_step_by_step(case: Case) -> None:
    model = case.model(FORMS[:2], FLOATS)
    pruning = case.pruning(model)
    prompt, text = case.tokens("prompt", 1, 15), case.tokens("text", 1, 16)
    with watched_choices() as choices:
        one = model.new_state(1, CAPACITY, pruning)
        model.prefill(model.embed(prompt), one)
        together = evaluate(model, text[0], one)
        case.equal(together, answer(model, model.new_state(1, CAPACITY, pruning), prompt, text)[0, 1:], choices)


def packed_weights_are_what_their_numbers_stand_for(case: Case) -> None:
    """Copies of columns of four bits are of eight: those of eight bits alone are held to their values when pruned."""
    family, form = case.of("family", *FAMILIES), case.of("form", "int8", "int4")
    case.family, case.dtype = family, torch.float32
    model, plain = model_of(family, form, torch.float32), with_plain_values(family, form)
    fixed = {"prior": 0} | ({} if form == "int8" else {"ffn_ratio": 0.0, "head_ratio": 0.0})
    pruning = case.pruning(model, **fixed)
    prompt, real, text = padded(case)
    with watched_choices() as choices:
        given, wanted = (
            answer(one, one.new_state(len(prompt), CAPACITY, pruning), prompt, text, real) for one in (model, plain)
        )
        case.equal(given, wanted, choices)


def a_request_is_the_first_one_again(case: Case) -> None:
    """Exactly, whatever ran in the same buffers, and whether or not it ended."""
    model = case.model(FORMS, FLOATS + HALF)
    pruning = case.pruning(model)
    prompt, real, text = padded(case)
    state = model.new_state(len(prompt), CAPACITY, pruning)
    wanted = answer(model, state, prompt, text, real)
    whole = [layer for layer in range(LAYERS) if len(pruning.sublayers(layer)) == 2]
    for _ in range(2):
        other = case.tokens("other", 4, 20, len(prompt))
        between = case.of("between", "another", "prompt cut", "step cut", "ended", "pieces")
        if between == "another":
            answer(model, state, other, text)
        if between == "prompt cut":
            with interrupted(model, case.of("layer", *whole), 1):
                answer(model, state, other, text)
        if between == "step cut":
            model.prefill(model.embed(other), state)
            with interrupted(model, case.of("layer", *whole), case.of("call", *range(1, text.shape[1] + 1))):
                steps(model, text, state)
        if between == "ended":
            model.prefill(model.embed(other), state)
            state.end(0)
            steps(model, text, state)
        if between == "pieces" and len(prompt) == 1:
            answer(model, state, other, text)
            model.prefill(model.embed(prompt), state, kept=3)
        again = answer(model, state, prompt, text, None if real.all() else real)
        assert torch.equal(again, wanted), f"{distance(again, wanted):.2g} apart"


def compiled_steps_are_the_eager_ones(case: Case) -> None:
    model = case.model(FORMS[:1], (torch.float32,), UNROUTED)
    pruning = case.pruning(model)
    prompt, text = case.tokens("prompt", 1, 15), case.tokens("text", 4, 8)
    compiled, state = CompiledDecode(model), model.new_state(1, CAPACITY, pruning)
    compiled.prepare(state)
    model.prefill(model.embed(prompt), state)
    given = steps(compiled, text, state)
    with watched_choices() as choices:
        case.equal(given, answer(model, model.new_state(1, CAPACITY, pruning), prompt, text)[:, 1:], choices)


PROMISES = [
    ratio_zero_is_dense, each_of_a_dense_batch_is_as_if_alone, a_prompt_in_pieces_is_one_prompt,
    one_pass_is_step_by_step, packed_weights_are_what_their_numbers_stand_for, a_request_is_the_first_one_again,
]


if SECONDS and compiler_problem(torch.device("cpu")) is None:
    PROMISES.append(compiled_steps_are_the_eager_ones)


@pytest.mark.usefixtures("exact_drafts")
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@torch.inference_mode()
def test_a_promise_holds_for_every_combination(promise: Callable[[Case], None]) -> None:
    first, end, near_ties = Random().randrange(10**6) if SECONDS else 0, time.monotonic() + SECONDS / len(PROMISES), 0
    for seed in count(first):
        if time.monotonic() > end if SECONDS else seed == CASES:
            break
        case = Case(seed, promise.__name__)
        try:
            promise(case)
        except NearTie:
            near_ties += 1
        except Exception as error:
            raise AssertionError(f"{promise.__name__}: {', '.join(case.said)}") from error
    print(f"{promise.__name__}: {seed - first} cases from seed {first} on, {near_ties} near-ties left out")
    assert near_ties <= (seed - first) / 4
