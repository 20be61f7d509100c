"""Public model shapes with random weights, only for timing models without their checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from models.mixtral import MIXTRAL_NAMES
from models.registry import architecture
from weights.errors import InputError

# Fields that all Gemma-3 models share; models that read pictures are represented by their text model.
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262208, "head_dim": 256,
    "max_position_embeddings": 131072, "sliding_window": 1024, "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
SMALL_GEMMA3 = GEMMA3 | {
    "vocab_size": 262144, "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32768,
    "sliding_window": 512, "rope_scaling": None,
}  # fmt: skip

# Qwen2-VL, Qwen2.5-VL and Qwen3-VL: hidden size, FFN channels, layers, heads, key/value heads, vocabulary, and tied
# embeddings; then the tower's size, channels, depth and DeepStack blocks if they differ within the family.
QWEN_VL: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {"text": (1536, 8960, 28, 12, 2, 151936, True)},
    "qwen2-vl-7b": {"text": (3584, 18944, 28, 28, 4, 152064, False)},
    "qwen2.5-vl-3b": {"text": (2048, 11008, 36, 16, 2, 151936, True)},
    "qwen2.5-vl-7b": {"text": (3584, 18944, 28, 28, 4, 152064, False)},
    "qwen3-vl-2b": {"text": (2048, 6144, 28, 16, 8, 151936, True), "tower": (1024, 4096, 24, [5, 11, 17])},
    "qwen3-vl-4b": {"text": (2560, 9728, 36, 32, 8, 151936, True), "tower": (1024, 4096, 24, [5, 11, 17])},
    "qwen3-vl-8b": {"text": (4096, 12288, 36, 32, 8, 151936, False), "tower": (1152, 4304, 27, [8, 16, 24])},
}


def qwen_vl(family: str, text: tuple[Any, ...], tower: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the config.json of a model in QWEN_VL."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = dict(zip((*names, "vocab_size", "tie_word_embeddings"), text, strict=True))
    context = 32768 if family == "qwen2-vl" else 128000
    config |= {"max_position_embeddings": context, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
    sections: dict[str, Any] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision: dict[str, Any] = {"out_hidden_size": text[0], "hidden_size": 1280}
    architecture = "Qwen2_5_VLForConditionalGeneration"
    if family == "qwen2-vl":
        architecture, vision = "Qwen2VLForConditionalGeneration", {"hidden_size": text[0], "embed_dim": 1280}
    if family == "qwen3-vl":
        architecture = "Qwen3VLForConditionalGeneration"
        sections = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        config |= {"max_position_embeddings": 262144, "rope_theta": 5000000.0, "head_dim": 128}
        vision |= zip(("hidden_size", "intermediate_size", "depth", "deepstack_visual_indexes"), tower, strict=True)
    return config | {"architectures": [architecture], "rope_scaling": sections, "vision_config": vision}


# Fields of each model's config.json that determine its size.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "mixtral-8x50m": {      # not a public model: a mixture small enough to time anywhere
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 4096, "hidden_size": 512,
        "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "gemma-3-270m": SMALL_GEMMA3 | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "gemma-3-1b": SMALL_GEMMA3 | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "gemma-3-4b": GEMMA3 | {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gemma-3-12b": GEMMA3 | {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma-3-27b": GEMMA3 | {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    },
    **{name: qwen_vl(name.rpartition("-")[0], **sizes) for name, sizes in QWEN_VL.items()},
}  # fmt: skip


def write_random_checkpoint(shape: str, folder: Path) -> Path:
    """Write a checkpoint of a named shape in bfloat16, layer by layer so that it is never in memory as a whole.

    Its tokenizer knows only one word, as prompts are token ids. Raises InputError for an unknown shape.
    """
    if shape not in SHAPES:
        raise InputError(f"there is no shape named {shape!r}; shapes are {', '.join(SHAPES)}")
    config = SHAPES[shape] | {"torch_dtype": "bfloat16"}
    with torch.device("meta"):
        model = architecture(config, "shape").from_config(config)
    shapes = {checkpoint_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        shapes = {name: size for name, size in shapes.items() if not name.endswith("lm_head.weight")}

    layer_of = {name: name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest" for name in shapes}
    noise = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    files: dict[str, str] = {}
    for layer in dict.fromkeys(layer_of.values()):
        names = [name for name in shapes if layer_of[name] == layer]
        file = f"model-{layer}.safetensors"
        save_file({name: random_weight(name, shapes[name], noise) for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(folder / "tokenizer.json"))
    return folder


def checkpoint_name(name: str) -> str:
    """Return a parameter's name in a checkpoint, which differs from the module's in Mixtral."""
    for ours, theirs in MIXTRAL_NAMES.items():
        name = re.sub(rf"\.mlp\.experts\.(\d+)\.{ours}_proj\.", rf".block_sparse_moe.experts.\1.{theirs}.", name)
    return re.sub(r"\.mlp\.gate\.weight", ".block_sparse_moe.gate.weight", name)


def random_weight(name: str, shape: torch.Size, noise: Tensor) -> Tensor:
    """Make ones for norms; other weights repeat the same million random numbers, which does not affect their speed."""
    if "norm" in name:
        return torch.ones(shape, dtype=noise.dtype)
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()
