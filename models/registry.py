"""The table of model families, by the model_type of config.json. A new family is one file and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.families.gemma3 import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    read_gemma3_config,
    read_gemma3_text_config,
)
from models.families.llava import LlavaForConditionalGeneration, read_llava_config
from models.families.picture_model import PictureModel
from models.families.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, read_qwen2_5_vl_config
from models.families.qwen2_vl import Qwen2VLForConditionalGeneration, read_qwen2_vl_config
from models.families.qwen3_vl import Qwen3VLForConditionalGeneration, read_qwen3_vl_config
from models.llama import LlamaForCausalLM
from models.mixtral import MixtralForCausalLM, read_mixtral_config
from models.read_config import read_llama_config
from weights.errors import InputError
from weights.json_files import shown


@dataclass(frozen=True)
class ModelFamily:
    """A model class, and how its config is read.

    architecture  the name in the `architectures` of config.json
    model         called with what read_config returns
    read_config   takes a parsed config.json; raises InputError for one that is not supported
    """

    architecture: str
    model: type[LlamaForCausalLM] | type[PictureModel]
    read_config: Callable[[Any], Any]

    def from_config(self, raw: Any) -> LlamaForCausalLM | PictureModel:
        """Build a model with uninitialised weights from a parsed config.json."""
        return self.model(self.read_config(raw))


FAMILIES = {
    "llama": ModelFamily("LlamaForCausalLM", LlamaForCausalLM, read_llama_config),
    "mistral": ModelFamily("MistralForCausalLM", LlamaForCausalLM, read_llama_config),
    "qwen2": ModelFamily("Qwen2ForCausalLM", LlamaForCausalLM, read_llama_config),
    "qwen3": ModelFamily("Qwen3ForCausalLM", LlamaForCausalLM, read_llama_config),
    "mixtral": ModelFamily("MixtralForCausalLM", MixtralForCausalLM, read_mixtral_config),
    "qwen2_moe": ModelFamily("Qwen2MoeForCausalLM", MixtralForCausalLM, read_mixtral_config),
    "qwen3_moe": ModelFamily("Qwen3MoeForCausalLM", MixtralForCausalLM, read_mixtral_config),
    "gemma3_text": ModelFamily("Gemma3ForCausalLM", Gemma3ForCausalLM, read_gemma3_text_config),
    "gemma3": ModelFamily("Gemma3ForConditionalGeneration", Gemma3ForConditionalGeneration, read_gemma3_config),
    "llava": ModelFamily("LlavaForConditionalGeneration", LlavaForConditionalGeneration, read_llava_config),
    "qwen2_vl": ModelFamily("Qwen2VLForConditionalGeneration", Qwen2VLForConditionalGeneration, read_qwen2_vl_config),
    "qwen2_5_vl": ModelFamily(
        "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration, read_qwen2_5_vl_config
    ),
    "qwen3_vl": ModelFamily("Qwen3VLForConditionalGeneration", Qwen3VLForConditionalGeneration, read_qwen3_vl_config),
}


def architecture(config: dict[str, Any], where: str) -> ModelFamily:
    """Return the family of a config.json: by its model_type, as in transformers, else by its architectures.

    Raises InputError if the model is not supported, or if the two contradict each other. A name that only begins like
    the family's (LlamaModel, LLaMAForCausalLM) is no contradiction.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or None
    name = names[0] if isinstance(names, list) else names
    by_name = {family.architecture: family for family in FAMILIES.values()}
    for kind, family in FAMILIES.items():
        begins_alike = str(name).lower().startswith(family.architecture.split("For")[0].lower())
        if kind == model_type and (name is None or name in [*by_name] or begins_alike):
            return family
    if not isinstance(name, str) or name not in by_name:
        what = f"model type {shown(model_type)}" if name is None else f"architecture {shown(name)}"
        raise InputError(f"{where}: {what} is not supported; supported are {', '.join(by_name)}")
    return by_name[name]
