"""LLaVA (arXiv 2304.08485): pictures become tokens of a language model.

A vision tower turns each picture into P feature vectors. A projector of two linear layers maps them to the language
model's size, and they replace P image tokens in the prompt. From there on the language model runs as on text, and so
does online pruning. The tower and the projector are never pruned.

B batch, T prompt tokens, P image tokens per picture, H hidden size of the language model, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.config import LlamaConfig
from models.families.clip import VisionConfig, VisionTower, read_vision_config
from models.families.picture_model import Grid, PictureConfig, PictureModel
from models.key_names import INNER_TEXT_SPELLINGS
from models.layers import activation_function
from models.llama import LlamaForCausalLM
from models.mixtral import FAMILIES as MIXTURE_FAMILIES
from models.mixtral import MixtralConfig, MixtralForCausalLM, read_mixtral_config
from models.read_config import FAMILIES as LLAMA_FAMILIES
from models.read_config import MOST_LAYERS, ConfigReader, read_llama_config, refuse_rope_outside
from weights.errors import InputError

# The tower of a config without a vision_config: CLIP ViT-L/14 at 336 pixels, LLaVA 1.5's own.
DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

# Fields that repeat others, or that matter only in training.
UNUSED_FIELDS = ("vocab_size", "ignore_index", "image_seq_length", "use_image_newline_parameter")


@dataclass(frozen=True)
class LlavaConfig(PictureConfig):
    """Configuration of tower, projector and language model. Field names are Hugging Face's.

    vision_feature_layer             hidden states of the tower to read, concatenated (see VisionTower)
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
    def tokens_per_image(self) -> int:
        """Feature vectors of one picture (P), each in the place of one token."""
        return self.vision.positions - (self.vision_feature_select_strategy == "default")


def read_llava_config(raw: Mapping[str, Any], where: str = "config.json") -> LlavaConfig:
    """Read a LlavaConfig from a parsed config.json; missing fields get LLaVA's defaults.

    Raises InputError for a field of the wrong type and for a tower that is not supported.
    """
    fields = ConfigReader(raw, where)
    fields.read.update(UNUSED_FIELDS)
    layers = fields.integers("vision_feature_layer", (-2,))
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise InputError(f"{where}: vision_feature_layer names {len(layers)} layers; at least one is needed")
    text = read_text_config(fields)
    refuse_rope_outside(fields, text.rope)
    return LlavaConfig(
        text=text,
        vision=read_vision_config(fields.section("vision_config").raw or DEFAULT_VISION, f"{where}: vision_config"),
        image_token_index=fields.integer("image_token_index", fields.integer("image_token_id", 32000, 0), 0),
        vision_feature_layer=tuple(layers),
        vision_feature_select_strategy=fields.text("vision_feature_select_strategy", "default", ("default", "full")),
        projector_hidden_act=fields.text("projector_hidden_act", "gelu"),
        multimodal_projector_bias=fields.boolean("multimodal_projector_bias", True),
        unknown_fields=fields.finish(),
    )


def read_text_config(fields: ConfigReader) -> LlamaConfig:
    """Read the config of the language model: any of the Llama family, or a mixture of experts."""
    text = fields.section("text_config")
    model_type = text.text("model_type", "llama", (*LLAMA_FAMILIES, *MIXTURE_FAMILIES))
    raw = {**text.raw, "model_type": model_type}
    # Older checkpoints have tie_word_embeddings in text_config, newer ones beside it.
    if fields.boolean("tie_word_embeddings", False):
        raw["tie_word_embeddings"] = True
    return (read_mixtral_config if model_type in MIXTURE_FAMILIES else read_llama_config)(raw, text.where)


class Projector(nn.Module):
    """Two linear layers and an activation, from the tower's size to the language model's."""

    def __init__(self, config: LlavaConfig, hidden_size: int) -> None:
        super().__init__()
        features = config.vision.hidden_size * len(config.vision_feature_layer)
        self.linear_1 = nn.Linear(features, hidden_size, bias=config.multimodal_projector_bias)
        self.act = activation_function(config.projector_hidden_act)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=config.multimodal_projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class LlavaForConditionalGeneration(PictureModel):
    """Vision tower, projector and language model."""

    spellings = (
        (r"(model\.)*vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"(model\.)*multi_modal_projector\.", "multi_modal_projector."),
        *INNER_TEXT_SPELLINGS,
    )

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config, config.text.hidden_size)
        text = config.text
        self.language_model = MixtralForCausalLM(text) if isinstance(text, MixtralConfig) else LlamaForCausalLM(text)
        unbuilt = range(len(self.vision_tower.encoder.layers), config.vision.num_hidden_layers)
        # Weights beyond the deepest hidden state that is read.
        self.ignored_keys = (
            r".*vision_tower\.(vision_model\.)?(post_layernorm|head)\..*",
            rf".*vision_tower\.(vision_model\.)?encoder\.layers\.({'|'.join(map(str, unbuilt))})\..*",
        )

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Tensor:
        """Encode pictures as embeddings of the language model. pixel_values [pictures, 3, Y, X] -> [pictures, P, H]"""
        x = self.vision_tower(pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype))
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        return self.multi_modal_projector(x)
