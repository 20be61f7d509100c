"""Mixtures of experts against Hugging Face's logits, read from disk by the real loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SIZES, left_padded, ours, prefilled, random_reference, saved_pair
from tolerance import assert_same
from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from popengine.studies.settings import DENSE
from weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.numeric

QWEN = SIZES | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}


def mixtral(**changes: Any) -> PreTrainedConfig:
    return MixtralConfig(**SIZES | {"num_local_experts": 5} | changes)


def qwen2_moe(**changes: Any) -> PreTrainedConfig:
    return Qwen2MoeConfig(**QWEN | {"shared_expert_intermediate_size": 56} | changes)


def qwen3_moe(**changes: Any) -> PreTrainedConfig:
    return Qwen3MoeConfig(**QWEN | {"head_dim": 16} | changes)


VARIANTS: dict[str, PreTrainedConfig] = {
    "mixtral": mixtral(),
    "mixtral_top_1": mixtral(num_experts_per_tok=1),
    "mixtral_top_all": mixtral(num_experts_per_tok=5),
    "mixtral_one_expert": mixtral(num_local_experts=1, num_experts_per_tok=1),
    "mixtral_window": mixtral(sliding_window=7),
    "mixtral_tied_head_dim": mixtral(tie_word_embeddings=True, head_dim=20),
    "qwen2_moe": qwen2_moe(),
    "qwen2_moe_renormalised": qwen2_moe(norm_topk_prob=True, qkv_bias=False),
    "qwen2_moe_every_second_layer": qwen2_moe(decoder_sparse_step=2),
    "qwen2_moe_window": qwen2_moe(**WINDOW, max_window_layers=2),
    "qwen3_moe": qwen3_moe(norm_topk_prob=True),
    "qwen3_moe_dense_layer": qwen3_moe(mlp_only_layers=[1], attention_bias=True),
    "qwen3_moe_window": qwen3_moe(**WINDOW),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_equal_hugging_face_with_and_without_cache(name: str, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS[name])
    tokens, real = left_padded([24, 17, 12], SIZES["vocab_size"])
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    wanted = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
    assert wanted.std() > 0.1
    assert_same(model(tokens, real)[real], wanted[real])
    last, state = prefilled(model, tokens[:, :16], DENSE, real[:, :16])
    steps = [last, *(model.decode(tokens[:, slot], state) for slot in range(16, 24))]
    assert_same(torch.stack(steps, dim=1), wanted[:, 15:])


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe])
def test_experts_of_their_own_and_experts_in_one_tensor_load_alike(make: Any, tmp_path: Path) -> None:
    """The two layouts that transformers 5 writes."""
    reference, model = saved_pair(tmp_path / "own", make())
    reference.save_pretrained(tmp_path / "one", save_original_format=False)
    with open_checkpoint(tmp_path / "one") as checkpoint:
        assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.entries
    fused = ours(tmp_path / "one").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, fused[name]), name


@pytest.mark.parametrize("favourite", [None, 2])
@torch.inference_mode()
def test_an_expert_without_tokens_and_one_with_all_of_them(favourite: int | None, tmp_path: Path) -> None:
    """Routers made to send no token to expert 0, or every token to expert 2."""
    reference = random_reference(mixtral(num_experts_per_tok=1))
    reference.model.embed_tokens.weight.add_(3.0)                           # every token leans one way:
    for layer in reference.model.layers:
        layer.post_attention_layernorm.weight.fill_(1.0)
        if favourite is None:
            layer.mlp.gate.weight[0] = -10.0                                # away from expert 0,
        else:
            layer.mlp.gate.weight[favourite] = 10.0                         # or towards the favourite
    reference.save_pretrained(tmp_path)
    model = ours(tmp_path)
    tokens, _ = left_padded([16], SIZES["vocab_size"])
    wanted = reference(tokens).logits
    last, state = prefilled(model, tokens, DENSE)
    assert_same(model(tokens), wanted)
    assert_same(last, wanted[:, -1])
    counts = state.layers[0].ffn.prompt_tokens
    assert counts[0] == 0
    if favourite is not None:
        assert counts[favourite] == 16
