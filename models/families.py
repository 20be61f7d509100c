"""The one table of architectures, by the name that config.json gives: another family is one file and one line here."""

from typing import Any

from models.gemma3 import Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from models.llama import LlamaForCausalLM
from models.llava import LlavaForConditionalGeneration
from models.mixtral import MixtralForCausalLM
from models.picture_model import PictureModel
from models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from models.qwen2_vl import Qwen2VLForConditionalGeneration
from models.qwen3_vl import Qwen3VLForConditionalGeneration
from weights.errors import InputError
from weights.json_files import shown

ARCHITECTURES: dict[str, type[LlamaForCausalLM] | type[PictureModel]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2MoeForCausalLM": MixtralForCausalLM,
    "Qwen3MoeForCausalLM": MixtralForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "Gemma3ForConditionalGeneration": Gemma3ForConditionalGeneration,
    "LlavaForConditionalGeneration": LlavaForConditionalGeneration,
    "Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLForConditionalGeneration,
    "Qwen3VLForConditionalGeneration": Qwen3VLForConditionalGeneration,
}


def architecture(config: dict[str, Any], where: str) -> type[LlamaForCausalLM] | type[PictureModel]:
    """The class of a config.json. Raises InputError for one that is not supported."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{where}: architecture {shown(name)} is not supported; supported are {known}")
    return ARCHITECTURES[name]
