"""Tiny random LLaVAs in transformers and as the real loader reads them, with prompts and pictures for them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from models.families.llava import LlavaForConditionalGeneration as OurLlava
from popengine.engine.loading import load_model
from weights.checkpoint import open_checkpoint

IMAGE, PADDING = 90, 0
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
CLIP, SIGLIP = CLIPVisionConfig(**VISION), SiglipVisionConfig(**VISION)
GROUPED = LlamaConfig(**TEXT, num_key_value_heads=2)


def config(text: PreTrainedConfig = GROUPED, vision: PreTrainedConfig = CLIP, **fields: object) -> LlavaConfig:
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **fields)


VARIANTS = {
    "as many key heads": config(LlamaConfig(**TEXT, num_key_value_heads=4)),
    "grouped": config(),
    "full": config(vision_feature_select_strategy="full"),
    "last layer": config(vision_feature_layer=-1),
    "several layers": config(vision_feature_layer=[-2, 0, 1]),
    "siglip full": config(vision=SIGLIP, vision_feature_select_strategy="full"),
    "siglip default": config(vision=SIGLIP),
    "no projector bias": config(multimodal_projector_bias=False, projector_hidden_act="relu"),
    "mistral": config(MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=9)),
    "qwen2 tied": config(Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)),
    "mixtral": config(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=3)),
}


def reference_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Weights large enough that a wrong detail shows: norms, biases and all."""
    torch.manual_seed(0)
    config.text_config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def load_ours(directory: Path) -> OurLlava:
    with open_checkpoint(directory) as checkpoint:
        model, _ = load_model(checkpoint, torch.float32, torch.device("cpu"))
    assert isinstance(model, OurLlava)
    return model


def prompt(model: OurLlava, *parts: int) -> list[int]:
    """Text tokens, as many as each number says (0: a picture)."""
    tokens: list[int] = []
    for part in parts:
        if part:
            tokens += [(7 * len(tokens) + i) % 80 + 1 for i in range(part)]
        else:
            tokens += [IMAGE] * model.config.tokens_per_image
    return tokens


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[PADDING] * (longest - len(ids)) + ids for ids in prompts])
    real = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompts])
    return tokens, real
