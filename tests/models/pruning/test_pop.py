"""The method on whole models: what must be equal to what, whatever the weights are."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    MODELS,
    SETTINGS,
    SIZES,
    greedy,
    heads_partition,
    left_padded,
    prefilled,
    resolved,
    saved_pair,
    stored_by_columns,
)
from slow_masked import in_model_order, masked_decode, masked_network
from slow_pop import SlowPOP
from tolerance import assert_same

from models.cost_model import bytes_per_token
from models.llama import LlamaForCausalLM
from models.pruning import active_weights
from models.pruning.evidence import channel_scores
from models.pruning.partition import keep_best
from popengine.studies.settings import DENSE, PruningSettings


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """In float64: in float32 two candidates come within rounding of each other in some of 32 steps and 3 layers, and
    then two ways that add in different orders may rightly choose differently."""
    return saved_pair(tmp_path_factory.mktemp(request.param), MODELS[request.param])[1].double()


@pytest.mark.numeric
@pytest.mark.parametrize("name", SETTINGS)
def test_masked_and_active_decode_agree(model: LlamaForCausalLM, name: str) -> None:
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    pruning = resolved(model, SETTINGS[name])
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning, real)
        masked = model.new_state(2, 64, resolved(model, DENSE))
        in_model_order(state, masked)
        for _ in range(32):
            chosen = logits.argmax(-1)
            logits = model.decode(chosen, state)
            assert_same(masked_decode(model, chosen, state, masked), logits)


@pytest.mark.numeric
def test_ratio_zero_is_the_dense_network(model: LlamaForCausalLM) -> None:
    model = deepcopy(model).double()        # float32's rounding alone may exceed what is allowed
    tokens, _ = left_padded([20], SIZES["vocab_size"])
    with torch.inference_mode():
        wanted = model(tokens)
        _, state = prefilled(model, tokens[:, :10], DENSE)
        for slot in range(10, 20):
            logits = model.decode(tokens[:, slot], state)
            assert_same(logits, wanted[:, slot])
        assert state.partition_bytes() == 0


def test_the_beginning_of_a_prompt_knows_nothing_of_the_rest(model: LlamaForCausalLM) -> None:
    """At every length, the one at which a window first hides a row among them."""
    model = deepcopy(model).double()
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    with torch.inference_mode():
        wanted = model(tokens)
        for length in range(1, 12):
            torch.testing.assert_close(model(tokens[:, :length]), wanted[:, :length], atol=1e-5, rtol=1e-5)


def test_dense_prefill_gives_the_dense_models_first_token(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([20], SIZES["vocab_size"])
    with torch.inference_mode():
        wanted = model(tokens)[:, -1]
        logits, _ = prefilled(model, tokens, replace(SETTINGS["both"], prefill="dense"))
        assert_same(logits, wanted)
        logits, _ = prefilled(model, tokens, SETTINGS["both"])
        assert (logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["pop", "all-channels"])
def test_the_widest_width_chooses_among_all_channels(model: LlamaForCausalLM, rule: str) -> None:
    """At r = 0.5 the widest candidate region is everything: each step keeps the best half of all channels."""
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    pruning = resolved(model, PruningSettings.paper(ffn_ratio=0.5, candidate_width=2.0, rule=rule))
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        reference = model.new_state(1, 64, resolved(model, DENSE))
        in_model_order(state, reference)
        for _ in range(8):
            chosen = logits.argmax(-1)
            logits = model.decode(chosen, state)
            x, step = model.begin(chosen, reference)
            for layer, own in zip(model.model.layers, reference.layers, strict=True):
                normed = layer.input_layernorm(x)
                x = x + layer.after_attention(own.attention.decode(normed, own.cache, step))
                h = layer.mlp.activation(layer.before_mlp(x))
                best = keep_best(channel_scores(h, layer.mlp.down_norms()), h.shape[-1] // 2)
                x = x + layer.after_mlp(layer.mlp.down_proj(h * best))
            reference.cache.advance()
            assert_same(model.lm_head(model.model.norm(x[:, -1])), logits)


@pytest.mark.numeric
def test_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    padded = torch.cat([torch.full((1, 6), 7), tokens], dim=1)
    real = torch.arange(15)[None] >= 6
    pruning = resolved(model, SETTINGS["both"])
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        padded_logits, padded_state = prefilled(model, padded, pruning, real)
        for _ in range(8):
            assert_same(padded_logits, logits)
            chosen = logits.argmax(-1)
            logits, padded_logits = model.decode(chosen, state), model.decode(chosen, padded_state)
        for one, other in zip(state.layers, padded_state.layers, strict=True):
            assert torch.equal(one.ffn.partition.order, other.ffn.partition.order)
            assert torch.equal(heads_partition(one).order, heads_partition(other).order)


def test_a_sequence_that_has_ended_no_longer_counts(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    others, _ = left_padded([9], SIZES["vocab_size"], seed=5)
    both = torch.cat([tokens, others])
    pruning = resolved(model, SETTINGS["both"])
    with torch.inference_mode():
        # The same partition for both runs: from both prompts. Then the second sequence ends.
        _, state = prefilled(model, both, pruning)
        state.live[1] = False
        _, again = prefilled(model, both, pruning)
        again.live[1] = False
        for token in (3, 5, 7):
            logits = model.decode(torch.tensor([token, 11]), state)
            changed = model.decode(torch.tensor([token, 60]), again)
            assert_same(changed[0], logits[0])


def test_buffers_serve_the_next_prompt_as_if_they_were_new(model: LlamaForCausalLM) -> None:
    first, _ = left_padded([30], SIZES["vocab_size"], seed=3)
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    pruning = resolved(model, SETTINGS["both"])
    with torch.inference_mode():
        _, state = prefilled(model, first, pruning)
        model.decode(torch.tensor([1]), state)
        wanted, fresh = prefilled(model, tokens, pruning)
        torch.testing.assert_close(model.prefill(model.embed(tokens), state), wanted, atol=0, rtol=0)
        token = torch.tensor([4])
        torch.testing.assert_close(model.decode(token, state), model.decode(token, fresh), atol=0, rtol=0)


@torch.inference_mode()
def test_the_next_turn_copies_the_channels_that_changed_and_a_new_prompt_all(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_weights, "FEW_CHANGED", 1.0)
    tokens, _ = left_padded([30], SIZES["vocab_size"])
    state = model.new_state(1, 64, resolved(model, SETTINGS["ffn"]))
    networks = [(layer.ffn, layer.ffn.weights) for layer in state.layers]
    turns = ((tokens[:, :20], 0), (tokens[:, 20:], 20), (tokens[:, :20], 0))
    for number, (turn, kept) in enumerate(turns):
        before = [ffn.partition.active for ffn, _ in networks]
        for _, weights in networks:
            weights.up.weight.fill_(7.0)
        model.prefill(model.embed(turn), state, kept=kept)
        for layer, (ffn, weights), old in zip(model.model.layers, networks, before, strict=True):
            new = ffn.partition.active
            stays = (new == old) if number == 1 else torch.zeros_like(new, dtype=torch.bool)
            assert number != 1 or 0 < stays.sum() < len(stays), "these turns test nothing"
            assert bool((weights.up.weight[stays] == 7).all()), "a channel that stays was copied"
            assert torch.equal(weights.up.weight[~stays], layer.mlp.up_proj.values()[new[~stays]])
            assert number == 1 or torch.equal(ffn.partition.retained, ffn.partition.retained.sort().values)


def test_padding_and_ends_are_forgotten_with_their_prompt(model: LlamaForCausalLM) -> None:
    padded, real = left_padded([12, 7], SIZES["vocab_size"], seed=3)
    tokens, _ = left_padded([9, 9], SIZES["vocab_size"])
    with torch.inference_mode():
        _, state = prefilled(model, padded, SETTINGS["both"], real)
        state.end(1)
        wanted, fresh = prefilled(model, tokens, SETTINGS["both"])
        assert torch.equal(model.prefill(model.embed(tokens), state), wanted)
        token = torch.tensor([4, 5])
        assert torch.equal(model.decode(token, state), model.decode(token, fresh))


def test_a_full_cache_is_an_error_not_a_wrong_answer(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    with torch.inference_mode():
        _, state = prefilled(model, tokens, DENSE, capacity=10)
        model.decode(torch.tensor([1]), state)
        with pytest.raises(ValueError, match="does not fit in 10 slots, 10 are taken"):
            model.decode(torch.tensor([1]), state)


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("width", [0.0, 0.3])
def test_a_slow_implementation_with_hooks_gives_the_same_tokens(tmp_path: Path, prefill: Any, width: float) -> None:
    reference, model = saved_pair(tmp_path, MODELS["grouped_query"])
    prompt = left_padded([14], SIZES["vocab_size"])[0]
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=width, prefill=prefill)
    tokens = greedy(model, prompt[0].tolist(), 30, settings)
    assert tokens == SlowPOP(reference, 0.4, width, prefill).generate(prompt[0].tolist(), 30)
    assert len(set(tokens)) > 5         # a sequence that repeats one token would prove little


def test_columns_of_losing_candidates_are_not_read(model: LlamaForCausalLM) -> None:
    model = stored_by_columns(model)
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    pruning = resolved(model, SETTINGS["ffn"])
    with torch.inference_mode():
        _, state = prefilled(model, tokens, pruning)
        layer, active = model.model.layers[0], state.layers[0].ffn
        _, step = model.begin(tokens[:, 0], state)
        x = torch.randn(1, 1, model.config.hidden_size, dtype=model.dtype)
        wanted = active.decode(x, step)
        assert_same(wanted, masked_network(layer.mlp, x, active.partition, step.live[:, 0]))
        h = layer.mlp.activation(x)[0, 0, active.partition.candidate]
        keep = active.partition.pick(h.abs() * active.candidate_norms)
        losing = active.sizes.retained + (~keep).nonzero().flatten()
        assert len(losing) == active.sizes.candidate - active.sizes.pick > 0
        active.down.weight[:, losing] = torch.nan
        assert torch.equal(active.decode(x, step), wanted)
        read = bytes_per_token(model, pruning)
        dense = bytes_per_token(model, resolved(model, DENSE))
        unread = 3 * active.sizes.pruned + len(losing)
        assert dense - read == model.dtype.itemsize * len(model.model.layers) * model.config.hidden_size * unread


@pytest.mark.numeric
def test_storing_weights_by_columns_changes_nothing(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    pruning = resolved(model, SETTINGS["both"])
    by_columns, model = stored_by_columns(model), deepcopy(model).float()
    assert not by_columns.lm_head.weight.is_contiguous()
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        again, other = prefilled(by_columns, tokens, pruning)
        for _ in range(4):
            assert_same(again, logits)
            chosen = logits.argmax(-1)
            logits, again = model.decode(chosen, state), by_columns.decode(chosen, other)
        for one, two in zip(state.layers, other.layers, strict=True):
            pairs = [(getattr(one.ffn, name), getattr(two.ffn, name)) for name in ("gate", "up", "down")]
            pairs += [
                (getattr(one.attention, name), getattr(two.attention, name)) for name in ("active_qkv", "active_o")
            ]
            for rows, columns in pairs:
                assert torch.equal(rows.weight, columns.weight)
                assert rows.weight.stride() != columns.weight.stride()
