"""LLaVA held to Hugging Face's, from tiny random models that the real loader reads, and the method with pictures in."""

from pathlib import Path

import pytest
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

from models.llava import LlavaForConditionalGeneration as OurLlava
from models.llava import read_llava_config
from popengine.errors import InputError
from popengine.pruning import DENSE, PruningSettings, resolve
from weights.checkpoint import open_checkpoint
from weights.load import load_weights

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
    torch.manual_seed(0)
    config.text_config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        # Norms and biases start as ones and zeros, and weights so small that the layers hardly matter.
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.15)
    return model


def load_ours(directory: Path) -> OurLlava:
    with torch.device("meta"):
        checkpoint = open_checkpoint(directory)
        model = OurLlava.from_config(checkpoint.config)
    load_weights(
        model, checkpoint, torch.float32, torch.device("cpu"), locate=model.locate, ignored=model.ignored_keys
    )
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    reference = reference_model(VARIANTS[request.param])
    directory = tmp_path_factory.mktemp("llava")
    reference.save_pretrained(directory)
    return reference, load_ours(directory)


def prompt(model: OurLlava, *parts: int) -> list[int]:
    """Text tokens, as many as each number says (0: a picture)."""
    tokens: list[int] = []
    for part in parts:
        tokens += [(7 * len(tokens) + i) % 80 + 1 for i in range(part)] if part else [IMAGE] * model.config.tokens_per_image
    return tokens


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[PADDING] * (longest - len(ids)) + ids for ids in prompts])
    real = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompts])
    return tokens, real


def batches(model: OurLlava) -> dict[str, tuple[list[list[int]], int]]:
    return {
        "one picture": ([prompt(model, 3, 0, 6)], 1),
        "two pictures": ([prompt(model, 0, 4, 0, 5)], 2),
        "text only": ([prompt(model, 11)], 0),
        "a batch": ([prompt(model, 2, 0, 5), prompt(model, 9), prompt(model, 1, 0, 0, 3)], 3),
    }


@torch.no_grad()
def test_logits_equal_hugging_face_with_and_without_cache(pair: tuple) -> None:
    reference, ours = pair
    for prompts, count in batches(ours).values():
        tokens, real = padded(prompts)
        pixel_values = pictures(count) if count else None
        expected = reference(tokens, pixel_values=pixel_values, attention_mask=real.long())
        logits = ours(tokens, pixel_values, real)
        assert (logits - expected.logits)[real].abs().max() <= 1e-4

        state = ours.language_model.new_state(len(tokens), tokens.shape[1] + 4, resolve_settings(ours, DENSE))
        features = ours.encode_images(pixel_values) if count else None
        logits = ours.language_model.prefill(ours.embed(tokens, features), state, real)
        assert (logits - expected.logits[:, -1]).abs().max() <= 1e-4
        for step in range(4):
            new = torch.arange(len(tokens)) + 5 * step + 1
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
            expected = reference(tokens, pixel_values=pixel_values, attention_mask=real.long())
            logits = ours.language_model.decode(new, state)
            assert (logits - expected.logits[:, -1]).abs().max() <= 1e-4


def resolve_settings(model: OurLlava, settings: PruningSettings):  # noqa: ANN201
    return resolve(settings, model.language_model.layer_weights())
