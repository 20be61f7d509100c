"""Every variant of the Llama family against Hugging Face's logits, read from disk by the real loader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SIZES, left_padded, ours, prefilled, saved_pair
from tolerance import assert_rounds_no_worse, assert_same
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from models.llama import LlamaForCausalLM
from models.read_config import read_llama_config
from popengine.studies.settings import DENSE
from weights.errors import InputError

pytestmark = pytest.mark.numeric

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "multi_head": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "multi_query": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "explicit_head_dim": LlamaConfig(**SIZES, head_dim=20),
    "attention_bias": LlamaConfig(**SIZES, attention_bias=True),
    "mlp_bias": LlamaConfig(**SIZES, mlp_bias=True),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "rope_theta": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "rope_linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "rope_llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "rope_yarn": LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
    "rope_yarn_mscale": LlamaConfig(
        **SIZES,
        rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 16.0, "truncate": False},
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2_window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3_bias": Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_hugging_face(name: str, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS[name])
    tokens, real = left_padded([24, 17, 3], SIZES["vocab_size"])
    with torch.inference_mode():
        # Alone, without padding.
        wanted = reference(tokens[:1]).logits
        assert wanted.std() > 0.1
        assert_same(model(tokens[:1]), wanted)
        # A batch of different lengths.
        positions = (real.cumsum(1) - 1).clamp(min=0)
        wanted = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
        assert_same(model(tokens, real)[real], wanted[real])


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decode_equals_hugging_face(name: str, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS[name])
    tokens, real = left_padded([24, 17, 3], SIZES["vocab_size"])
    prompt = 12
    tokens, real = tokens[:2], real[:2]         # prompts of 12 and 5 tokens; of the third none would be left
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        wanted = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
        logits, state = prefilled(model, tokens[:, :prompt], DENSE, real[:, :prompt])
        assert_same(logits, wanted[:, prompt - 1])
        for slot in range(prompt, tokens.shape[1]):
            logits = model.decode(tokens[:, slot], state)
            assert_same(logits, wanted[:, slot])


def test_sharded_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path / "one", VARIANTS["llama"])
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    assert torch.equal(ours(tmp_path / "many")(tokens), model(tokens))


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float32_as_hugging_faces(tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS["llama"])
    tokens, _ = left_padded([24], SIZES["vocab_size"])
    exact, rounded = model(tokens), ours(tmp_path, torch.bfloat16)(tokens)
    assert rounded.dtype == torch.bfloat16
    assert_rounds_no_worse(rounded, reference.bfloat16()(tokens).logits, exact)


@pytest.mark.parametrize("name", ["rope_linear", "rope_llama3", "rope_yarn", "rope_theta"])
def test_both_spellings_of_rope_read_alike(name: str) -> None:
    new = json.loads(VARIANTS[name].to_json_string(use_diff=False))
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert read_llama_config(old).rope == read_llama_config(new).rope
    assert read_llama_config(new).rope.theta == VARIANTS[name].rope_parameters["rope_theta"]


def test_absent_fields_take_the_familys_defaults() -> None:
    for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config):
        full = kind()
        config = read_llama_config({"model_type": kind.model_type})
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings",
                      "tie_word_embeddings"):
            assert getattr(config, field) == getattr(full, field), (kind, field)
        assert config.head_dim == (getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads)
        assert config.rope.theta == full.rope_parameters["rope_theta"]
        assert config.windows[0] == (full.sliding_window if kind is MistralConfig else None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": "yes"}, "rope_scaling"),
        ({"layer_types": ["full_attention"], "model_type": "qwen2"}, "layer_types"),
        ({"hidden_act": "mish"}, "mish"),
    ],
)
def test_what_is_not_implemented_is_named(change: dict[str, Any], named: str) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES | change
    with pytest.raises(InputError, match=named), torch.device("meta"):
        LlamaForCausalLM(read_llama_config(raw))


def test_unknown_fields_are_reported_not_dropped() -> None:
    config = read_llama_config({"model_type": "llama", "made_up_field": 3, "torch_dtype": "float32"})
    assert config.unknown_fields == ("made_up_field",)


def test_a_head_that_its_config_ties_against_the_file_is_used_as_it_is(tmp_path: Path) -> None:
    """As transformers 5 does: a checkpoint that was trained untied, whose config was not told."""
    reference, model = saved_pair(tmp_path, LlamaConfig(**SIZES))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="ties .*lm_head.weight.*, which differ: each is used as it is"):
        tied = ours(tmp_path)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert_same(tied(tokens), reference(tokens).logits)
        assert torch.equal(tied(tokens), model(tokens))
