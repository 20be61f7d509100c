"""Gemma-3 held to Hugging Face's, from tiny random models that the real loader reads: text, and text with pictures."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders import SIZES, greedy, left_padded, ours, prefilled, resolved, saved_pair
from slow_pop import SlowPOP
from slow_prefill import SlowPrefillOnly
from transformers import Gemma3TextConfig

from models.gemma3 import GLOBAL_THETA, LOCAL_THETA, Gemma3ForCausalLM, read_gemma3_text_config
from models.pruning.settings import DENSE, PruningSettings
from weights.errors import InputError

TEXT = SIZES | {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 3}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
VARIANTS: dict[str, Any] = {
    "every third sees all": Gemma3TextConfig(**TEXT),
    "layer types": Gemma3TextConfig(**TEXT, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "rope scaling": Gemma3TextConfig(**TEXT, rope_parameters=LINEAR),
    "own scale": Gemma3TextConfig(**TEXT | {"num_key_value_heads": 1}, query_pre_attn_scalar=5),
    "biases, untied": Gemma3TextConfig(**TEXT, attention_bias=True, tie_word_embeddings=False),
    "window over all": Gemma3TextConfig(**TEXT | {"sliding_window": 64, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_equal_hugging_face_with_and_without_cache(name: str, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS[name])
    assert isinstance(model, Gemma3ForCausalLM)
    assert not model.config.unknown_fields
    tokens, real = left_padded([24, 17, 14], SIZES["vocab_size"])
    wanted = reference(tokens[:1]).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(model(tokens[:1]), wanted, atol=1e-4, rtol=0)
    positions, prompt = (real.cumsum(1) - 1).clamp(min=0), 12
    wanted = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
    torch.testing.assert_close(model(tokens, real)[real], wanted[real], atol=1e-4, rtol=0)
    logits, state = prefilled(model, tokens[:, :prompt], DENSE, real[:, :prompt])
    for slot in range(prompt, tokens.shape[1]):
        torch.testing.assert_close(logits, wanted[:, slot - 1], atol=1e-4, rtol=0)
        logits = model.decode(tokens[:, slot], state)


@torch.inference_mode()
def test_half_precision_rounds_where_hugging_face_does(tmp_path: Path) -> None:
    """Norms are float32 to the end, and the embedding's scale is rounded first."""
    reference, _ = saved_pair(tmp_path, VARIANTS["every third sees all"])
    tokens, _ = left_padded([24], SIZES["vocab_size"])
    model, theirs = ours(tmp_path, torch.bfloat16), reference.bfloat16()
    assert torch.equal(model.embed(tokens), theirs.model.embed_tokens(tokens))
    x = model.embed(tokens)
    assert torch.equal(model.model.layers[0].input_layernorm(x), theirs.model.layers[0].input_layernorm(x))


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_pop_gives_the_tokens_of_a_slow_implementation(
    ratio: float, prefill: Literal["pruned", "dense"], tmp_path: Path
) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS["biases, untied"])
    pruning = resolved(model, PruningSettings(prune_ratio=ratio, candidate_width=0.3, prefill=prefill))
    prompt, _ = left_padded([14], SIZES["vocab_size"])
    tokens = greedy(model, prompt[0].tolist(), 48, pruning)
    assert tokens == SlowPOP(reference, pruning.ffn_ratio, 0.3, prefill).generate(prompt[0].tolist(), 48)
    assert len(set(tokens)) > 5     # a sequence that repeats one token would prove little


@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("skipped", [1, 2])
def test_prefill_only_gives_the_tokens_of_a_slow_implementation(boundary: int, skipped: int, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS["biases, untied"])
    prompt = left_padded([14], SIZES["vocab_size"])[0][0].tolist()
    settings = PruningSettings(prune_ratio=0, prefill_skip=f"{skipped}/3", boundary_tokens=boundary)
    tokens = greedy(model, prompt, 48, settings)
    assert tokens == SlowPrefillOnly(reference, skipped, boundary).generate(prompt, 48)
    assert len(set(tokens)) > 5


def test_a_config_that_says_almost_nothing_takes_the_defaults() -> None:
    """text_config of the 4 billion model, as it is released, and of one that says nothing at all."""
    released = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    for raw in ({}, released):
        config, full = read_gemma3_text_config(raw), Gemma3TextConfig(**raw)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                      "tie_word_embeddings", "query_pre_attn_scalar"):
            assert getattr(config, field) == getattr(full, field), field
        assert config.hidden_act == full.hidden_activation
        assert list(config.windows) == [
            full.sliding_window if kind == "sliding_attention" else None for kind in full.layer_types
        ]
        for rope, kind in ((config.rope, "full_attention"), (config.local_rope, "sliding_attention")):
            theirs = full.rope_parameters[kind]
            assert (rope.theta, rope.rope_type) == (theirs["rope_theta"], theirs["rope_type"])
            assert rope.factor == theirs.get("factor", 1.0)
        assert not config.unknown_fields
    assert (config.rope.theta, config.local_rope.theta) == (GLOBAL_THETA, LOCAL_THETA)


def test_both_spellings_of_rope_read_alike() -> None:
    new = json.loads(VARIANTS["rope scaling"].to_json_string(use_diff=False))
    old = {name: value for name, value in new.items() if name != "rope_parameters"} | {
        "rope_theta": 1e4, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert read_gemma3_text_config(new) == read_gemma3_text_config(old)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not one of gemma3_text"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not implemented"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_type is not a kind of layer"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "RoPE type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number"),
        ({"rope_local_base_freq": "high"}, "rope_local_base_freq must be a positive number"),
        ({"sliding_window": 0}, "sliding_window must be an integer"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ({"hidden_activation": "mish"}, "'mish' is not implemented"),
        ({"head_dim": 15}, "head_dim must be even"),
    ],
)
def test_what_is_not_implemented_or_cannot_be_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named), torch.device("meta"):
        Gemma3ForCausalLM(read_gemma3_text_config(TEXT | change))
