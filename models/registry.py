"""The table of model families, by the model_type of config.json. A new family is one file and one line here."""

from typing import Any

from models.families.gemma3 import Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from models.families.llava import LlavaForConditionalGeneration
from models.families.picture_model import PictureModel
from models.families.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from models.families.qwen2_vl import Qwen2VLForConditionalGeneration
from models.families.qwen3_vl import Qwen3VLForConditionalGeneration
from models.llama import LlamaForCausalLM
from models.mixtral import MixtralForCausalLM
from weights.errors import InputError
from weights.json_files import shown

FAMILIES: dict[str, tuple[str, type[LlamaForCausalLM] | type[PictureModel]]] = {
    "llama": ("LlamaForCausalLM", LlamaForCausalLM),
    "mistral": ("MistralForCausalLM", LlamaForCausalLM),
    "qwen2": ("Qwen2ForCausalLM", LlamaForCausalLM),
    "qwen3": ("Qwen3ForCausalLM", LlamaForCausalLM),
    "mixtral": ("MixtralForCausalLM", MixtralForCausalLM),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MixtralForCausalLM),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MixtralForCausalLM),
    "gemma3_text": ("Gemma3ForCausalLM", Gemma3ForCausalLM),
    "gemma3": ("Gemma3ForConditionalGeneration", Gemma3ForConditionalGeneration),
    "llava": ("LlavaForConditionalGeneration", LlavaForConditionalGeneration),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", Qwen3VLForConditionalGeneration),
}


def architecture(config: dict[str, Any], where: str) -> type[LlamaForCausalLM] | type[PictureModel]:
    """Return the model class for a config.json: by its model_type, as in transformers, else by its architectures.

    Raises InputError if the model is not supported, or if the two contradict each other. A name that only begins like
    the family's (LlamaModel, LLaMAForCausalLM) is no contradiction.
    """
    model_type, names = config.get("model_type"), config.get("architectures") or None
    name = names[0] if isinstance(names, list) else names
    families = dict(FAMILIES.values())
    for kind, (known, family) in FAMILIES.items():
        begins_alike = str(name).lower().startswith(known.split("For")[0].lower())
        if kind == model_type and (name is None or name in [*families] or begins_alike):
            return family
    if not isinstance(name, str) or name not in families:
        what = f"model type {shown(model_type)}" if name is None else f"architecture {shown(name)}"
        raise InputError(f"{where}: {what} is not supported; supported are {', '.join(families)}")
    return families[name]
