"""LLaVA (arXiv 2304.08485): pictures become tokens of a language model.

A vision tower turns each picture into P feature vectors, a projector of two linear layers brings them to the language
model's size, and they take the places of P image tokens in the prompt. From there on the language model runs as it
does on text: online pruning treats it exactly so, and leaves the tower and the projector alone.

B batch, T prompt tokens, P image tokens per picture, H hidden size of the language model, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.clip import VisionConfig, VisionTower, read_vision_config
from models.config import ConfigReader
from models.layers import activation_function
from models.llama import LlamaForCausalLM
from models.mixtral import MixtralForCausalLM
from weights.errors import InputError

LANGUAGE_MODELS: dict[str, type[LlamaForCausalLM]] = {
    "llama": LlamaForCausalLM,
    "mistral": LlamaForCausalLM,
    "qwen2": LlamaForCausalLM,
    "qwen3": LlamaForCausalLM,
    "mixtral": MixtralForCausalLM,
    "qwen2_moe": MixtralForCausalLM,
    "qwen3_moe": MixtralForCausalLM,
}

# The tower of a config that has no vision_config at all: CLIP ViT-L/14 at 336 pixels, LLaVA 1.5's own.
DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

# Fields that repeat what others say, or that matter only in training.
UNUSED_FIELDS = ("vocab_size", "ignore_index", "image_seq_length", "use_image_newline_parameter")


@dataclass(frozen=True)
class LlavaConfig:
    """What joins the tower to the language model. Field names are Hugging Face's.

    vision_feature_layer             hidden states of the tower that are read, side by side (see VisionTower)
    vision_feature_select_strategy   "default" drops each picture's first vector (CLIP's class token), "full" keeps it
    """

    vision: VisionConfig
    image_token_index: int
    vision_feature_layer: tuple[int, ...]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    multimodal_projector_bias: bool
    unknown_fields: tuple[str, ...] = ()

    @property
    def tokens_per_image(self) -> int:
        """P: feature vectors of one picture, each the place of one token."""
        return self.vision.positions - (self.vision_feature_select_strategy == "default")


def read_llava_config(raw: Mapping[str, Any], where: str = "config.json") -> LlavaConfig:
    """LlavaConfig from a parsed config.json, missing fields filled with LLaVA's defaults (text_config is read apart).

    Raises InputError for a field of the wrong type and for a tower that is not supported.
    """
    fields = ConfigReader(raw, where)
    fields.read.update(UNUSED_FIELDS, ("text_config", "tie_word_embeddings"))
    fields.section("vision_config")
    layers = fields.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise InputError(f"{where}: vision_feature_layer must be an integer or a list of integers, not {layers!r}")
    strategy = fields.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise InputError(f"{where}: vision_feature_select_strategy must be default or full, not {strategy!r}")
    return LlavaConfig(
        vision=read_vision_config(raw.get("vision_config") or DEFAULT_VISION, f"{where}: vision_config"),
        image_token_index=fields.integer("image_token_index", fields.integer("image_token_id", 32000, 0), 0),
        vision_feature_layer=tuple(layers),
        vision_feature_select_strategy=strategy,
        projector_hidden_act=fields.get("projector_hidden_act", "gelu"),
        multimodal_projector_bias=fields.boolean("multimodal_projector_bias", True),
        unknown_fields=fields.finish(),
    )


def language_model_from_config(raw: Mapping[str, Any], where: str = "config.json") -> LlamaForCausalLM:
    """The language model of a LLaVA config, of empty weights: any of the Llama family or a mixture of experts."""
    text = dict(ConfigReader(raw, where).section("text_config").raw)
    model_type = text.setdefault("model_type", "llama")
    if model_type not in LANGUAGE_MODELS:
        raise InputError(f"{where}: text_config: model_type {model_type!r} is not one of {', '.join(LANGUAGE_MODELS)}")
    # Older checkpoints say in text_config whether the output projection is tied, newer ones beside it.
    if raw.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    return LANGUAGE_MODELS[model_type].from_config(text)


class Projector(nn.Module):
    """From the tower's size to the language model's: two linear layers and an activation between."""

    def __init__(self, config: LlavaConfig, hidden_size: int) -> None:
        super().__init__()
        features = config.vision.hidden_size * len(config.vision_feature_layer)
        self.linear_1 = nn.Linear(features, hidden_size, bias=config.multimodal_projector_bias)
        self.act = activation_function(config.projector_hidden_act)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=config.multimodal_projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaForConditionalGeneration(nn.Module):
    """Vision tower, projector and language model.

    To generate: `encode_images` once per picture, `embed` once per prompt, then `language_model.prefill` and
    `language_model.decode` as for any text model.
    """

    def __init__(self, config: LlavaConfig, language_model: LlamaForCausalLM) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config, language_model.config.hidden_size)
        self.language_model = language_model
        unbuilt = range(len(self.vision_tower.encoder.layers), config.vision.num_hidden_layers)
        # What lies beyond the deepest hidden state that is read, and buffers that follow from the config.
        self.ignored_keys = (
            r".*rotary_emb\.inv_freq",
            r".*vision_tower\..*position_ids",
            r".*vision_tower\.(vision_model\.)?(post_layernorm|head)\..*",
            rf".*vision_tower\.(vision_model\.)?encoder\.layers\.({'|'.join(map(str, unbuilt))})\..*",
        )

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> "LlavaForConditionalGeneration":
        """A model of empty weights from a parsed config.json."""
        return cls(read_llava_config(raw), language_model_from_config(raw))

    def locate(
        self, parameter_names: list[str], checkpoint_names: list[str]
    ) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Where each parameter stands in a checkpoint, whichever release of transformers has written it."""
        stored_as = {our_name(key): key for key in checkpoint_names}
        prefix = "language_model."
        of_text = self.language_model.locate(
            [name.removeprefix(prefix) for name in parameter_names if name.startswith(prefix)],
            [name.removeprefix(prefix) for name in stored_as if name.startswith(prefix)],
        )
        places: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name in parameter_names}
        places |= {prefix + name: (prefix + key, index) for name, (key, index) in of_text.items()}
        return {name: (stored_as.get(key, key), index) for name, (key, index) in places.items()}

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Pictures as the language model reads them: pixel_values [pictures, 3, Y, X] -> [pictures, P, H]"""
        x = self.vision_tower(pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype))
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        return self.multi_modal_projector(x)

    def embed(self, tokens: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Prompts with their pictures in place: int64 [B, T] -> [B, T, H], what `language_model.prefill` takes.

        image_features  [pictures, P, H] from encode_images, in the order in which their image tokens stand in the
                        batch, prompt by prompt; None: no pictures
        Raises InputError when the image tokens are not as many as the feature vectors.
        """
        is_image = self.is_image(tokens)                                            # [B, T]
        places = int(is_image.sum())
        features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if places != features:
            raise InputError(f"the prompts have {places} image tokens, and the images have {features} feature vectors")
        # The image token's id may lie beyond the vocabulary: it is never looked up.
        x = self.language_model.embed(tokens.masked_fill(is_image, 0))              # [B, T, H]
        if image_features is None:
            return x
        return x.masked_scatter(is_image.unsqueeze(-1), image_features.to(x.dtype))

    def is_image(self, tokens: Tensor) -> Tensor:
        """Which tokens are image tokens: int64 [B, T] -> bool [B, T]"""
        return tokens == self.config.image_token_index

    def forward(self, tokens: Tensor, pixel_values: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """The dense network without a cache.

        tokens int64 [B, T]; pixel_values [pictures, 3, Y, X]; real bool [B, T], False for padding -> logits [B, T, V]
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        return self.language_model.forward_embedded(self.embed(tokens, features), real)


# Names that releases of transformers have given to the same weights, and ours.
SPELLINGS: Sequence[tuple[str, str]] = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)


def our_name(key: str) -> str:
    """The parameter that a checkpoint's key stands for; names that are ours already, or nobody's, stay."""
    for pattern, ours in SPELLINGS:
        matched = re.match(pattern, key)
        if matched:
            return ours + key[matched.end() :]
    return key
