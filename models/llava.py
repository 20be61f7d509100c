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
from models.config import FAMILIES as LLAMA_FAMILIES
from models.config import MOST_LAYERS, ConfigReader, LlamaConfig, read_llama_config
from models.layers import activation_function
from models.llama import LlamaForCausalLM
from models.mixtral import FAMILIES as MIXTURE_FAMILIES
from models.mixtral import MixtralConfig, MixtralForCausalLM, read_mixtral_config
from weights.errors import InputError

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

    text: LlamaConfig
    vision: VisionConfig
    image_token_index: int
    vision_feature_layer: tuple[int, ...]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    multimodal_projector_bias: bool
    unknown_fields: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[int, ...]:
        """As LlamaConfig's."""
        return self.text.sides + self.vision.sides

    @property
    def blocks(self) -> int:
        """As LlamaConfig's."""
        return self.text.blocks + self.vision.num_hidden_layers

    @property
    def tokens_per_image(self) -> int:
        """P: feature vectors of one picture, each the place of one token."""
        return self.vision.positions - (self.vision_feature_select_strategy == "default")


def read_llava_config(raw: Mapping[str, Any], where: str = "config.json") -> LlavaConfig:
    """LlavaConfig from a parsed config.json, missing fields filled with LLaVA's defaults.

    Raises InputError for a field of the wrong type and for a tower that is not supported.
    """
    fields = ConfigReader(raw, where)
    fields.read.update(UNUSED_FIELDS)
    layers = fields.integers("vision_feature_layer", (-2,))
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise InputError(f"{where}: vision_feature_layer names {len(layers)} layers; at least one is needed")
    return LlavaConfig(
        text=read_text_config(fields),
        vision=read_vision_config(fields.section("vision_config").raw or DEFAULT_VISION, f"{where}: vision_config"),
        image_token_index=fields.integer("image_token_index", fields.integer("image_token_id", 32000, 0), 0),
        vision_feature_layer=tuple(layers),
        vision_feature_select_strategy=fields.text("vision_feature_select_strategy", "default", ("default", "full")),
        projector_hidden_act=fields.text("projector_hidden_act", "gelu"),
        multimodal_projector_bias=fields.boolean("multimodal_projector_bias", True),
        unknown_fields=fields.finish(),
    )


def read_text_config(fields: ConfigReader) -> LlamaConfig:
    """The config of the language model: any of the Llama family or a mixture of experts."""
    text = fields.section("text_config")
    model_type = text.text("model_type", "llama", (*LLAMA_FAMILIES, *MIXTURE_FAMILIES))
    raw = {"model_type": model_type, **{name: value for name, value in text.raw.items() if value is not None}}
    # Older checkpoints say in text_config whether the output projection is tied, newer ones beside it.
    if fields.boolean("tie_word_embeddings", False):
        raw["tie_word_embeddings"] = True
    return (read_mixtral_config if model_type in MIXTURE_FAMILIES else read_llama_config)(raw, text.where)


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

    read_config = staticmethod(read_llava_config)

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config, config.text.hidden_size)
        text = config.text
        self.language_model = MixtralForCausalLM(text) if isinstance(text, MixtralConfig) else LlamaForCausalLM(text)
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
        return cls(read_llava_config(raw))

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
