"""The method on whole models: what must be equal to what, whatever the weights are."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_pop import SlowPOP
from tiny_models import SIZES, left_padded, saved_pair
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from models.layers import Linear
from models.llama import LlamaForCausalLM
from models.products import lay_columns_together
from models.pruning.partition import channel_scores, keep_best
from models.pruning.settings import DENSE, Pruning, PruningSettings, resolve
from models.state import DecodeState
from weights.errors import InputError

MODELS: dict[str, Any] = {
    "grouped_query": LlamaConfig(**SIZES | {"num_attention_heads": 8, "hidden_size": 64}),
    "multi_head": LlamaConfig(**SIZES | {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2_window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "query_key_norm": Qwen3Config(**SIZES, head_dim=16),
}
SETTINGS = {
    "ffn": PruningSettings(ffn_ratio=0.4, candidate_width=0.3),
    "ffn_dense_prefill": PruningSettings(ffn_ratio=0.4, candidate_width=0.3, prefill="dense"),
    "heads": PruningSettings(ffn_ratio=0.0, head_ratio=0.5, candidate_width=0.6),
    "both": PruningSettings(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6),
    "frozen": PruningSettings(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.0),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), MODELS[request.param])[1]


def prefilled(
    model: LlamaForCausalLM, tokens: Tensor, pruning: Pruning, real: Tensor | None = None, capacity: int = 64
) -> tuple[Tensor, DecodeState]:
    state = model.new_state(len(tokens), capacity, pruning)
    return model.prefill(model.embed(tokens), state, real), state


def masked_decode(model: LlamaForCausalLM, tokens: Tensor, partitions: DecodeState, state: DecodeState) -> Tensor:
    """One step on the full weights with zeros, by the partitions of another state."""
    x = model.embed(tokens.unsqueeze(1))
    step = model.decode_step(x, state)
    for layer, own, other in zip(model.model.layers, state.layers, partitions.layers, strict=True):
        normed = layer.input_layernorm(x)
        x = x + layer.self_attn.decode_masked(normed, own.keys, own.values, other.heads.partition, step)
        x = x + layer.mlp.decode_masked(layer.post_attention_layernorm(x), other.ffn.partition, step.live)
    state.cache.advance()
    return model.lm_head(model.model.norm(x[:, -1]))


def in_model_order(state: DecodeState, copy: DecodeState) -> None:
    """Copy a cache, undoing the order that pruned heads of multi-head attention give it."""
    copy.start(state.cache.filled, None)
    copy.cache.padding.copy_(state.cache.padding)
    for source, target in zip(state.layers, copy.layers, strict=True):
        order = source.heads.cache_order
        back = slice(None) if order is None else order.argsort()
        target.keys.copy_(source.keys[:, back])
        target.values.copy_(source.values[:, back])


@pytest.mark.parametrize("name", SETTINGS)
def test_masked_and_active_decode_agree(model: LlamaForCausalLM, name: str) -> None:
    # In float64: over 32 steps and 3 layers some two candidates come within float32's rounding of each other, and
    # then the two ways, which add in different orders, may rightly pick differently.
    model = deepcopy(model).double()
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    pruning = resolve(SETTINGS[name], model.layer_weights())
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning, real)
        masked = model.new_state(2, 64, resolve(DENSE, model.layer_weights()))
        in_model_order(state, masked)
        for _ in range(32):
            chosen = logits.argmax(-1)
            logits = model.decode(chosen, state)
            torch.testing.assert_close(masked_decode(model, chosen, state, masked), logits, atol=1e-5, rtol=1e-5)


def test_ratio_zero_is_the_dense_network(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([20], SIZES["vocab_size"])
    with torch.inference_mode():
        wanted = model(tokens)
        _, state = prefilled(model, tokens[:, :10], resolve(DENSE, model.layer_weights()))
        for slot in range(10, 20):
            logits = model.decode(tokens[:, slot], state)
            torch.testing.assert_close(logits, wanted[:, slot], atol=1e-5, rtol=1e-5)
        assert state.partition_bytes() == 0


def test_dense_prefill_gives_the_dense_models_first_token(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([20], SIZES["vocab_size"])
    pruning = resolve(SETTINGS["both"], model.layer_weights())
    with torch.inference_mode():
        wanted = model(tokens)[:, -1]
        logits, _ = prefilled(model, tokens, replace(pruning, prefill="dense"))
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        logits, _ = prefilled(model, tokens, pruning)
        assert (logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("all_channels", [False, True])
def test_the_widest_width_chooses_among_all_channels(model: LlamaForCausalLM, all_channels: bool) -> None:
    """At r = 0.5 the widest candidate region is everything: each step keeps the best half of all channels."""
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    settings = PruningSettings(ffn_ratio=0.5, candidate_width=2.0, all_channels=all_channels)
    pruning = resolve(settings, model.layer_weights())
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        reference = model.new_state(1, 64, resolve(DENSE, model.layer_weights()))
        in_model_order(state, reference)
        for _ in range(8):
            chosen = logits.argmax(-1)
            logits = model.decode(chosen, state)
            x = model.embed(chosen.unsqueeze(1))
            step = model.decode_step(x, reference)
            for layer, own in zip(model.model.layers, reference.layers, strict=True):
                normed = layer.input_layernorm(x)
                x = x + layer.self_attn.decode(normed, own.keys, own.values, own.heads, step)
                h = layer.mlp.activation(layer.post_attention_layernorm(x))
                best = keep_best(channel_scores(h, layer.mlp.down_norms()), h.shape[-1] // 2)
                x = x + layer.mlp.down_proj(h * best)
            reference.cache.advance()
            torch.testing.assert_close(model.lm_head(model.model.norm(x[:, -1])), logits, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    padded = torch.cat([torch.full((1, 6), 7), tokens], dim=1)
    real = torch.arange(15)[None] >= 6
    pruning = resolve(SETTINGS["both"], model.layer_weights())
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        padded_logits, padded_state = prefilled(model, padded, pruning, real)
        for _ in range(8):
            torch.testing.assert_close(padded_logits, logits, atol=1e-5, rtol=1e-5)
            chosen = logits.argmax(-1)
            logits, padded_logits = model.decode(chosen, state), model.decode(chosen, padded_state)
        for one, other in zip(state.layers, padded_state.layers, strict=True):
            assert torch.equal(one.ffn.partition.order, other.ffn.partition.order)
            assert torch.equal(one.heads.partition.order, other.heads.partition.order)


def test_a_sequence_that_has_ended_no_longer_counts(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    others, _ = left_padded([9], SIZES["vocab_size"], seed=5)
    both = torch.cat([tokens, others])
    pruning = resolve(SETTINGS["both"], model.layer_weights())
    with torch.inference_mode():
        # The same partition for both runs: from both prompts. Then the second sequence ends.
        _, state = prefilled(model, both, pruning)
        state.live[1] = False
        _, again = prefilled(model, both, pruning)
        again.live[1] = False
        for token in (3, 5, 7):
            logits = model.decode(torch.tensor([token, 11]), state)
            changed = model.decode(torch.tensor([token, 60]), again)
            torch.testing.assert_close(changed[0], logits[0], atol=1e-6, rtol=1e-6)


def test_buffers_serve_the_next_prompt_as_if_they_were_new(model: LlamaForCausalLM) -> None:
    first, _ = left_padded([30], SIZES["vocab_size"], seed=3)
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    pruning = resolve(SETTINGS["both"], model.layer_weights())
    with torch.inference_mode():
        _, state = prefilled(model, first, pruning)
        model.decode(torch.tensor([1]), state)
        wanted, fresh = prefilled(model, tokens, pruning)
        torch.testing.assert_close(model.prefill(model.embed(tokens), state), wanted, atol=0, rtol=0)
        token = torch.tensor([4])
        torch.testing.assert_close(model.decode(token, state), model.decode(token, fresh), atol=0, rtol=0)


def test_a_full_cache_is_an_error_not_a_wrong_answer(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    with torch.inference_mode():
        _, state = prefilled(model, tokens, resolve(DENSE, model.layer_weights()), capacity=10)
        model.decode(torch.tensor([1]), state)
        with pytest.raises(ValueError, match="all 10 slots"):
            model.decode(torch.tensor([1]), state)


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("width", [0.0, 0.3])
def test_a_slow_implementation_with_hooks_gives_the_same_tokens(tmp_path: Path, prefill: Any, width: float) -> None:
    reference, model = saved_pair(tmp_path, MODELS["grouped_query"])
    prompt = left_padded([14], SIZES["vocab_size"])[0]
    pruning = resolve(PruningSettings(ffn_ratio=0.4, candidate_width=width, prefill=prefill), model.layer_weights())
    with torch.inference_mode():
        logits, state = prefilled(model, prompt, pruning)
        tokens = [int(logits.argmax())]
        while len(tokens) < 30:
            tokens.append(int(model.decode(torch.tensor(tokens[-1:]), state).argmax()))
    assert tokens == SlowPOP(reference, 0.4, width, prefill).generate(prompt[0].tolist(), 30)
    assert len(set(tokens)) > 5         # a sequence that repeats one token would prove little


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_reordering_in_place_gives_what_copies_give(model: LlamaForCausalLM, prefill: Any, columns: bool) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    others, _ = left_padded([9], SIZES["vocab_size"], seed=4)
    copied = resolve(replace(SETTINGS["both"], prefill=prefill), model.layer_weights())
    model = deepcopy(model).double()        # in float32 sums in another order may tip a near tie between candidates
    reordered = stored_by_columns(model) if columns else deepcopy(model)
    with torch.inference_mode():
        state = model.new_state(1, 64, copied)
        in_place = reordered.new_state(1, 64, replace(copied, in_place=True))
        for prompt in (tokens, others, tokens):         # each prompt finds the weights as the last one left them
            logits = model.prefill(model.embed(prompt), state)
            again = reordered.prefill(reordered.embed(prompt), in_place)
            for _ in range(8):
                torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
                chosen = logits.argmax(-1)
                logits, again = model.decode(chosen, state), reordered.decode(chosen, in_place)
        torch.testing.assert_close(reordered(tokens), model(tokens), atol=1e-5, rtol=1e-5)      # still the same model
        assert all(layer.ffn.copied_bytes() == 0 for layer in in_place.layers)


def test_in_place_refuses_a_second_run_instead_of_mixing_them_up(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    pruning = replace(resolve(SETTINGS["ffn"], model.layer_weights()), in_place=True)
    model = deepcopy(model)
    with torch.inference_mode():
        _, first = prefilled(model, tokens, pruning)
        _, second = prefilled(model, tokens, pruning)
        model.decode(torch.tensor([1]), second)
        with pytest.raises(InputError, match="one run at a time"):
            model.decode(torch.tensor([1]), first)


def stored_by_columns(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the model with weights as eager steps on a CPU have them."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            lay_columns_together(module)
    return model


def test_columns_of_losing_candidates_are_not_read(model: LlamaForCausalLM) -> None:
    model = stored_by_columns(model)
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    pruning = resolve(SETTINGS["ffn"], model.layer_weights())
    with torch.inference_mode():
        _, state = prefilled(model, tokens, pruning)
        layer, active = model.model.layers[0], state.layers[0].ffn
        step = model.decode_step(model.embed(tokens[:, :1]), state)
        x = torch.randn(1, 1, model.config.hidden_size)
        wanted = layer.mlp.decode(x, active, step)
        torch.testing.assert_close(wanted, layer.mlp.decode_masked(x, active.partition, step.live))
        h = layer.mlp.activation(x)[0, 0, active.partition.candidate]
        losing = active.sizes.retained + (~active.partition.pick(h.abs() * active.candidate_norms)).nonzero().flatten()
        assert len(losing) == active.sizes.candidate - active.sizes.pick > 0
        active.down[:, losing] = torch.nan
        assert torch.equal(layer.mlp.decode(x, active, step), wanted)
        read = model.weight_bytes_per_token(pruning)
        dense = model.weight_bytes_per_token(resolve(DENSE, model.layer_weights()))
        unread = 3 * active.sizes.pruned + len(losing)
        assert dense - read == 4 * len(model.model.layers) * model.config.hidden_size * unread


def test_storing_weights_by_columns_changes_nothing(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    pruning = resolve(SETTINGS["both"], model.layer_weights())
    by_columns = stored_by_columns(model)
    assert not by_columns.lm_head.weight.is_contiguous()
    with torch.inference_mode():
        logits, state = prefilled(model, tokens, pruning)
        again, other = prefilled(by_columns, tokens, pruning)
        for _ in range(4):
            torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
            chosen = logits.argmax(-1)
            logits, again = model.decode(chosen, state), by_columns.decode(chosen, other)
        for one, two in zip(state.layers, other.layers, strict=True):
            for name in ("gate", "up", "down"):
                assert torch.equal(getattr(one.ffn, name), getattr(two.ffn, name))
                assert getattr(two.ffn, name).stride() != getattr(one.ffn, name).stride()
            assert torch.equal(one.heads.qkv, two.heads.qkv)
            assert torch.equal(one.heads.o, two.heads.o)
