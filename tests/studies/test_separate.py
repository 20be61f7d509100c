"""Sequences of a batch with partitions of their own: each is answered exactly as if it were alone, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MIXTRAL_TINY, SIZES, complete_checkpoint, left_padded, resolved, saved_pair
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.llama import LlamaForCausalLM
from popengine.engine.loading import load
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.answering import encode, generate_together, generate_until
from popengine.studies.evidence import Prior
from popengine.studies.resolve import StudyPruning
from popengine.studies.separate import Separate, keep_sequences, separate
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

LENGTHS, STEPS = [9, 4, 13], 6
SETTINGS: dict[str, dict[str, Any]] = {
    "pop": {}, "wide": {"candidate_width": 0.5}, "frozen": {"candidate_width": 0.0},
    "all-channels": {"rule": "all-channels"}, "retained": {"retained_share": 0.2, "candidate_width": 0.6},
    "groups": {"groups": 2, "candidate_width": 0.5}, "prefill": {"prefill": "dense"},
    "skip": {"prefill_skip": 0.5, "boundary_tokens": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES))[1].double()


def logits_of(
    model: LlamaForCausalLM, tokens: Tensor, real: Tensor | None, said: Tensor, pruning: StudyPruning
) -> Tensor:
    """Prefill and decode given tokens. tokens int64 [B, T], said int64 [B, S] -> [B, S + 1, V]"""
    state = model.new_state(len(tokens), tokens.shape[1] + said.shape[1], pruning)
    logits = [model.prefill(model.embed(tokens), state, real)]
    return torch.stack([*logits, *(model.decode(one, state) for one in said.T)], dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("name", SETTINGS)
def test_a_sequence_of_a_batch_is_pruned_as_if_it_were_alone(model: LlamaForCausalLM, name: str) -> None:
    tokens, real = left_padded(LENGTHS, model.config.vocab_size)
    said = left_padded([STEPS] * len(LENGTHS), model.config.vocab_size, seed=2)[0]
    alone = resolved(model, PruningSettings.paper(ffn_ratio=0.4, **SETTINGS[name]))
    together = separate(alone, model)
    assert isinstance(together.rule, Separate)
    found = logits_of(model, tokens, real, said, together)
    expected = [
        logits_of(model, own[is_real][None], None, after[None], alone)[0]
        for own, is_real, after in zip(tokens, real, said, strict=True)
    ]
    assert_same(found, torch.stack(expected))
    shared = logits_of(model, tokens, real, said, alone)
    assert (shared - found).abs().max() > 1e-3, "one partition for all would pass this test"


@torch.inference_mode()
def test_a_prior_is_evidence_of_every_sequence(model: LlamaForCausalLM) -> None:
    tokens, real = left_padded(LENGTHS, model.config.vocab_size)
    said = left_padded([STEPS] * len(LENGTHS), model.config.vocab_size, seed=2)[0]
    drawn = torch.Generator().manual_seed(3)
    networks = [layer.mlp for layer in model.model.layers]
    prior = Prior({(one, "h"): torch.rand(one.channels, generator=drawn) for one in networks}, 20)
    alone = resolved(model, PruningSettings.paper(ffn_ratio=0.4)).with_prior(prior)
    found = logits_of(model, tokens, real, said, separate(alone, model))
    for own, is_real, after, answer in zip(tokens, real, said, found, strict=True):
        assert_same(answer, logits_of(model, own[is_real][None], None, after[None], alone)[0])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["pop", "all-channels", "skip"])
def test_a_sequence_that_leaves_the_batch_changes_no_other(model: LlamaForCausalLM, name: str) -> None:
    tokens, real = left_padded(LENGTHS, model.config.vocab_size)
    said = left_padded([STEPS] * len(LENGTHS), model.config.vocab_size, seed=2)[0]
    together = separate(resolved(model, PruningSettings.paper(ffn_ratio=0.4, **SETTINGS[name])), model)
    whole = logits_of(model, tokens, real, said, together)                          # [B, S + 1, V]
    state = model.new_state(len(tokens), tokens.shape[1] + STEPS, together)
    model.prefill(model.embed(tokens), state, real)
    model.decode(said[:, 0], state)
    for number, rows in ((1, [1, 2]), (2, [2])):
        left = torch.tensor(rows)
        keep_sequences(state, left if number == 1 else torch.tensor([1]))
        assert_same(model.decode(said[left, number], state), whole[left, number + 1])


def test_the_answers_of_a_batch_are_those_of_single_prompts(tmp_path: Path) -> None:
    engine = load(complete_checkpoint(tmp_path), dtype="float32")
    prompts = [encode(engine, text) for text in ("one two three four", "five", "six seven")]
    alone = engine.resolve(PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3))
    whole = [generate_until(engine, [prompt], 12, alone, Sampling(), [])[0] for prompt in prompts]
    stops = [whole[1][3:5], whole[2][6:8]]          # two answers end before the third
    for given in ([], stops):
        texts = generate_together(engine, prompts, 12, separate(alone, engine.model), given)
        assert engine.idle_state is not None and (len(engine.idle_state.live) < 3) == bool(given)
        assert texts == [generate_until(engine, [prompt], 12, alone, Sampling(), given)[0] for prompt in prompts]
    assert len({len(text) for text in texts}) == 3, "no answer left the batch"


def test_what_has_no_separate_form_is_refused_or_unchanged(model: LlamaForCausalLM) -> None:
    dense = resolved(model, DENSE)
    assert separate(dense, model) is dense
    for other in ({"rule": "up"}, {"head_ratio": 0.5}, {"min_evidence": 64}, {"dense_every": 4}):
        pruning = resolved(model, PruningSettings.paper(ffn_ratio=0.4, **other))
        with pytest.raises(InputError, match="--batch-size 1"):
            separate(pruning, model)
    mixture = load(MIXTRAL_TINY, dtype="float32")
    with pytest.raises(InputError, match="experts: give --batch-size 1"):
        separate(mixture.resolve(PruningSettings.paper(0.2)), mixture.model)
