"""Mixtures of experts against Hugging Face's own: logits of tiny random models that go through the real loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from models.llama import LlamaForCausalLM
from popengine.engine import load_model
from popengine.pruning import DENSE, resolve
from weights.checkpoint import open_checkpoint

TOLERANCE = 1e-4
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def mixtral(**changes: Any) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SHAPE | {"num_local_experts": 5} | changes))


def qwen2_moe(**changes: Any) -> PreTrainedModel:
    config = Qwen2MoeConfig(**SHAPE | QWEN | {"shared_expert_intermediate_size": 56} | changes)
    return Qwen2MoeForCausalLM(config)


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE | QWEN | {"head_dim": 16} | changes))


MODELS = {
    "mixtral": (mixtral, {}),
    "mixtral-top-1": (mixtral, {"num_experts_per_tok": 1}),
    "mixtral-top-all": (mixtral, {"num_experts_per_tok": 5}),
    "mixtral-one-expert": (mixtral, {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "mixtral-sliding-window": (mixtral, {"sliding_window": 7}),
    "mixtral-tied-head-dim": (mixtral, {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen2-moe": (qwen2_moe, {}),
    "qwen2-moe-renormalised": (qwen2_moe, {"norm_topk_prob": True, "qkv_bias": False}),
    "qwen2-moe-every-second-layer": (qwen2_moe, {"decoder_sparse_step": 2}),
    "qwen2-moe-sliding-window": (
        qwen2_moe,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3-moe": (qwen3_moe, {"norm_topk_prob": True}),
    "qwen3-moe-dense-layer": (qwen3_moe, {"mlp_only_layers": [1], "attention_bias": True}),
    "qwen3-moe-sliding-window": (qwen3_moe, {"use_sliding_window": True, "sliding_window": 7}),
}


def reference(make: Any, changes: dict[str, Any]) -> PreTrainedModel:
    """A random model whose every weight matters: routers and norms included."""
    torch.manual_seed(0)
    model = make(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() > 1 else 0.1)
    return model.eval()


def ours(model: PreTrainedModel, directory: Path, **how: Any) -> LlamaForCausalLM:
    model.save_pretrained(directory, **how)
    with open_checkpoint(directory) as checkpoint:
        return load_model(checkpoint, torch.float32, torch.device("cpu"))


def logits(model: PreTrainedModel, tokens: Tensor, real: Tensor | None = None) -> Tensor:
    """Hugging Face's logits [B, T, V], positions counted from the first real token."""
    if real is None:
        return model(tokens).logits
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    return model(tokens, attention_mask=real.long(), position_ids=positions).logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_hugging_face(name: str, tmp_path: Path) -> None:
    model = reference(*MODELS[name])
    mine = ours(model, tmp_path)
    tokens = torch.randint(96, (2, 24))
    assert (mine(tokens) - logits(model, tokens)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe])
@torch.no_grad()
def test_both_checkpoint_layouts_load_alike(make: Any, tmp_path: Path) -> None:
    """One tensor per expert, and one for all experts of a layer, as transformers 5 writes on request."""
    model = reference(make, {})
    per_expert = ours(model, tmp_path / "per_expert")
    fused = ours(model, tmp_path / "fused", save_original_format=False)
    with open_checkpoint(tmp_path / "fused") as checkpoint:
        assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.entries
    for name, value in per_expert.state_dict().items():
        assert torch.equal(value, fused.state_dict()[name]), name


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe])
@torch.no_grad()
def test_prefill_and_decode_equal_the_forward_pass_with_padding(make: Any, tmp_path: Path) -> None:
    model = reference(make, {})
    mine = ours(model, tmp_path)
    tokens = torch.randint(96, (3, 20))
    real = torch.arange(12) >= torch.tensor([[0], [5], [9]])
    whole_real = torch.cat([real, torch.ones(3, 8, dtype=torch.bool)], dim=1)
    expected = logits(model, tokens, whole_real)
    assert ((mine(tokens, whole_real) - expected).abs() * whole_real.unsqueeze(-1)).max() <= TOLERANCE
    state = mine.new_state(3, 20, resolve(DENSE, mine.layer_weights()))
    steps = [mine.prefill(mine.embed(tokens[:, :12]), state, real)]
    steps += [mine.decode(tokens[:, position], state) for position in range(12, 20)]
    assert (torch.stack(steps[:-1], dim=1) - expected[:, 11:-1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("favourite", [None, 2])
@torch.no_grad()
def test_an_expert_without_tokens_and_one_with_all_of_them(favourite: int | None, tmp_path: Path) -> None:
    """Routers made to send every token to expert 2, or none to expert 0."""
    model = reference(mixtral, {"num_experts_per_tok": 1})
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(3.0)                           # every token leans one way,
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(1.0)
            if favourite is None:
                layer.mlp.gate.weight[0] = -10.0                            # away from expert 0,
            else:
                layer.mlp.gate.weight[favourite] = 10.0                     # or towards the favourite
    mine = ours(model, tmp_path)
    tokens = torch.randint(96, (1, 16))
    expected = logits(model, tokens)
    state = mine.new_state(1, 16, resolve(DENSE, mine.layer_weights()))
    last = mine.prefill(mine.embed(tokens), state)
    assert (mine(tokens) - expected).abs().max() <= TOLERANCE
    assert (last - expected[:, -1]).abs().max() <= TOLERANCE
    counts = state.layers[0].ffn.prompt_tokens
    assert counts[0] == 0
    if favourite is not None:
        assert counts[favourite] == 16
