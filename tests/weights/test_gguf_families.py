""".gguf files of every family: logits are those of the transformers model that the file was written from.

Names of tensors come from the gguf package's own table; metadata is spelled as llama.cpp's converter spells it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_gguf import write_gguf
from tolerance import assert_same
from torch import Tensor

from popengine.engine.loading import load_model
from weights.checkpoint import open_checkpoint
from weights.errors import InputError

transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CHANNELS, VOCABULARY, CONTEXT = 3, 64, 4, 2, 24, 96, 64, 128
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "intermediate_size": CHANNELS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "pad_token_id": None,
}
# Differs from the base that a file without one has.
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
TOKENS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
VOCABULARY_METADATA = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"<{number}>" for number in range(VOCABULARY - 3))],
}  # fmt: skip


def hugging_face_model(model_type: str, **changes: Any) -> Any:
    """A random transformers model, whose norms and biases are random too."""
    config = transformers.AutoConfig.for_model(model_type, **SIZES | {"rope_parameters": ROPE} | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1 if "norm" in name and model_type != "gemma3_text" else 0
            scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(around + scale * torch.randn(parameter.shape, generator=generator))
    return model


def metadata_of(config: Any, architecture: str) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
    }  # fmt: skip
    return {f"{architecture}.{key}": value for key, value in values.items()}


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head as llama.cpp rotates them: j and j + head_dim / 2 become neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: Any, architecture: str, merged: bool = True) -> dict[str, Tensor]:
    """The model's tensors as llama.cpp's converter writes them; merged: the experts of a layer in one tensor."""
    config, tensors = model.config, {}
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, experts = name.rpartition(".mlp.experts.")
        if layer:
            parts = dict(zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)) if "gate" in experts else {
                "down": tensor
            }
            for part, matrices in parts.items():                                    # [E, out, in]
                stem = f"{layer.replace('model.layers', 'blk')}.ffn_{part}"
                if merged:
                    tensors[f"{stem}_exps.weight"] = matrices.contiguous()
                else:
                    tensors |= {f"{stem}.{index}.weight": one.clone() for index, one in enumerate(matrices)}
            continue
        if architecture == "llama" and "q_proj" in name:
            tensor = in_pairs(tensor, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            tensor = in_pairs(tensor, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, name
        tensors[written] = tensor.squeeze(0) if "shexp" in written else tensor
    return tensors


def write(
    path: Path, model: Any, architecture: str, more: dict[str, Any] | None = None, merged: bool = True,
    **options: Any,
) -> Path:
    """A file of the model; more: metadata without the architecture's prefix."""
    metadata = metadata_of(model.config, architecture) | VOCABULARY_METADATA
    metadata |= {f"{architecture}.{key}": value for key, value in (more or {}).items()}
    return write_gguf(path, metadata, gguf_tensors(model, architecture, merged), architecture=architecture, **options)


@torch.inference_mode()
def logits_of(path: Path) -> Tensor:
    with open_checkpoint(path) as checkpoint:
        model, _ = load_model(checkpoint, torch.float32, torch.device("cpu"))
    assert model.config.unknown_fields == ()
    return model(TOKENS)


@torch.inference_mode()
def assert_same_logits(path: Path, model: Any) -> None:
    assert_same(logits_of(path), model(TOKENS).logits)


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", "mistral", {"sliding_window": None}),
        ("llama", "qwen2", {}),                                 # biases, and none of the output
        ("qwen2", "qwen2", {}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen2", "llama", {"attention_bias": True}),           # with one of the output
        ("qwen3", "qwen3", {"tie_word_embeddings": True}),
        ("qwen3", "qwen3", {"attention_bias": True}),
    ],
)
def test_families_without_experts(tmp_path: Path, architecture: str, model_type: str, changes: dict[str, Any]) -> None:
    model = hugging_face_model(model_type, **changes)
    assert_same_logits(write(tmp_path / "m.gguf", model, architecture), model)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, {}),
    "qwen2moe": (
        "qwen2moe", "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
        {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 40},
    ),
    "qwen2moe, tied, without biases": (
        "qwen2moe", "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 40, "qkv_bias": False, "tie_word_embeddings": True}, {
            "expert_feed_forward_length": 32,
        },
    ),
    "qwen3moe": (
        "qwen3moe", "qwen3_moe", EXPERTS | {"norm_topk_prob": True}, {"expert_feed_forward_length": 32},
    ),
    "qwen3moe, of the size that follows": (
        "qwen3moe", "qwen3_moe", EXPERTS | {"moe_intermediate_size": CHANNELS // 2, "norm_topk_prob": True}, {},
    ),
    "qwen3moe, weights as they are": (
        "qwen3moe", "qwen3_moe", EXPERTS | {"norm_topk_prob": False},
        {"expert_feed_forward_length": 32, "expert_weights_norm": False},
    ),
}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "one by one"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(tmp_path: Path, name: str, merged: bool) -> None:
    architecture, model_type, changes, more = MIXTURES[name]
    model = hugging_face_model(model_type, **changes)
    more = more | {"expert_count": 4, "expert_used_count": 2}
    assert_same_logits(write(tmp_path / "m.gguf", model, architecture, more, merged), model)


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "qwen2"])
def test_a_window_of_llama_is_in_every_layer(tmp_path: Path, model_type: str) -> None:
    window = {"sliding_window": 7}
    more: dict[str, Any] = {"attention.sliding_window": 7}
    if model_type == "mixtral":
        window |= {"num_local_experts": 4}
        more |= {"expert_count": 4, "expert_used_count": 2}
    if model_type == "qwen2":
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    model = hugging_face_model(model_type, **window)
    assert_same_logits(write(tmp_path / "m.gguf", model, "llama", more), model)


def gemma3_model(layers: int = 8, local: float = 200.0, pattern: int = 6, **changes: Any) -> Any:
    windowed = [pattern != 1 and index % pattern < pattern - 1 for index in range(layers)]
    rope = changes.pop("rope", ROPE)
    return hugging_face_model("gemma3_text", **{
        "num_hidden_layers": layers, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 7,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in windowed],
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}},
        **changes,
    })  # fmt: skip


GEMMAS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "as released": (lambda: gemma3_model(local=10000.0), {"attention.sliding_window": 7}),
    "with a scaled base": (
        lambda: gemma3_model(rope={"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}),
        {
            "attention.sliding_window": 7, "rope.freq_base_swa": 200.0, "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "another pattern": (
        lambda: gemma3_model(layers=4, pattern=2),
        {"attention.sliding_window": 7, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 200.0},
    ),
    "without a window": (lambda: gemma3_model(layers=2, pattern=1), {}),
    "separate head, bent logits": (
        lambda: gemma3_model(layers=2, local=10000.0, tie_word_embeddings=False, final_logit_softcapping=5.0),
        {"attention.sliding_window": 7, "final_logit_softcapping": 5.0},
    ),
    "27B": (
        lambda: gemma3_model(layers=62, local=10000.0, query_pre_attn_scalar=HIDDEN // HEADS),
        {"attention.sliding_window": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma3(tmp_path: Path, name: str) -> None:
    make, more = GEMMAS[name]
    model = make()
    assert_same_logits(write(tmp_path / "m.gguf", model, "gemma3", more), model)


LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
}  # fmt: skip
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "a factor without a type": (LINEAR, {"rope.scaling.factor": 4.0}),
    "the older key": (LINEAR, {"rope.scale_linear": 4.0}),
    "the newer key first": (LINEAR, {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}),
    "linear without a factor": (ROPE, {"rope.scaling.type": "linear"}),
    "a factor of 0": (ROPE, {"rope.scaling.factor": 0.0}),
    "none, whatever the factor": (ROPE, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "yarn": (YARN, YARN_KEYS),
    "yarn, every key": (
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
        YARN_KEYS | {
            "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_attn_factor": 1.2, "rope.scaling.attn_factor": 1.25,
        },
    ),
    "yarn, a logarithmic multiplier": (
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "model_type"), [("llama", "llama"), ("qwen3", "qwen3")])
@pytest.mark.parametrize("name", ROPES)
def test_scaled_positions(tmp_path: Path, architecture: str, model_type: str, name: str) -> None:
    rope, more = ROPES[name]
    model = hugging_face_model(model_type, rope_parameters=rope)
    assert_same_logits(write(tmp_path / "m.gguf", model, architecture, more), model)


def test_divisors_of_llama_3_and_a_factor_multiply(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = hugging_face_model("llama", rope_parameters=rope)
    plain = hugging_face_model("llama").model.rotary_emb.inv_freq
    metadata = metadata_of(model.config, "llama") | VOCABULARY_METADATA
    tensors = gguf_tensors(model, "llama") | {"rope_freqs.weight": plain / model.model.rotary_emb.inv_freq}
    assert_same_logits(write_gguf(tmp_path / "m.gguf", metadata, tensors), model)
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"] / 2
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert_same_logits(write_gguf(tmp_path / "both.gguf", metadata, tensors), model)


@pytest.mark.parametrize("more", [{}, {"rope.scaling.factor": 4.0}], ids=["plain", "linear"])
def test_attn_factor_scales_cos_and_sin(tmp_path: Path, more: dict[str, Any]) -> None:
    """Which scales products of queries and keys by its square, as larger queries do."""
    model = hugging_face_model("llama", rope_parameters=LINEAR if more else ROPE)
    path = write(tmp_path / "m.gguf", model, "llama", more | {"rope.scaling.attn_factor": 1.25})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 1.25**2
    assert_same_logits(path, model)


def test_files_in_parts_load_from_any_part(tmp_path: Path) -> None:
    model = hugging_face_model("qwen2")
    write(tmp_path / "m.gguf", model, "qwen2", tensors_per_part=9)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts][:2] == [f"m-0000{number}-of-0000{len(parts)}.gguf" for number in (1, 2)]
    for part in (parts[0], parts[1], parts[-1]):
        assert_same_logits(part, model)

    def message_of(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    renamed = parts[1].rename(tmp_path / "other.gguf")
    assert f"one of {len(parts)} parts, and m-00002-of-0000{len(parts)}.gguf is not beside it" in message_of(parts[0])
    assert "is not named like NAME-00001-of-" in message_of(renamed)
    parts[1].write_bytes(parts[2].read_bytes())
    assert f"is not part 2 of {len(parts)}" in message_of(parts[0])


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    def message_of(architecture: str, model_type: str, more: dict[str, Any]) -> str:
        path = write(tmp_path / "m.gguf", hugging_face_model(model_type), architecture, more)
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    assert "qwen2.attention.sliding_window is 7" in message_of("qwen2", "qwen2", {"attention.sliding_window": 7})
    assert "qwen3.logit_scale" in message_of("qwen3", "qwen3", {"logit_scale": 0.5})
    assert "'longrope'" in message_of("llama", "llama", {"rope.scaling.type": "longrope"})
    assert "rope.scaling.factor is -2" in message_of("llama", "llama", {"rope.scaling.factor": -2.0})
