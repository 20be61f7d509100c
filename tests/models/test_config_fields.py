"""config.json of every family, wherever its fields stand, beside transformers' own reading of the same file."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import models.read_config as config_file
from models.layers import RotaryEmbedding
from models.registry import architecture
from popengine.engine.loading import end_of_sequence_ids
from weights.errors import InputError

B, T = 2, 7
TEXT_FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    "mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig, "gemma3_text": Gemma3TextConfig,
}  # fmt: skip
PICTURE_FAMILIES: dict[str, Any] = {
    "llava": LlavaConfig, "gemma3": Gemma3Config, "qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3_vl": Qwen3VLConfig,
}  # fmt: skip
# The text family that a text_config is of.
INSIDE = {"llava": "mistral", "gemma3": "gemma3_text"}
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 24, "image_size": 64, "patch_size": 4, "num_attention_heads": 4},
    "qwen2_vl": {"hidden_size": 64}, "qwen2_5_vl": {"out_hidden_size": 64},
    "qwen3_vl": {"out_hidden_size": 64, "deepstack_visual_indexes": []},
}  # fmt: skip
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "head_dim": 16}
SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [4, 2, 2], "qwen3_vl": [4, 2, 2]}
CASES = 25                                      # per family


def read_both(family: str, text: dict[str, Any], flat: bool = False) -> tuple[Any, Any]:
    """transformers' and our config of the language model, from one config.json. flat: text fields beside the others"""
    if family in TEXT_FAMILIES:
        raw = {"model_type": family} | text
    else:
        inside = {"model_type": INSIDE[family]} if family in INSIDE else {}
        raw = {"model_type": family, "vision_config": TOWERS.get(family, {})}
        raw |= text if flat else {"text_config": inside | text}
    kind = TEXT_FAMILIES | PICTURE_FAMILIES
    whole = kind[family].from_dict(deep(raw))
    theirs = whole.get_text_config()
    theirs.tie_word_embeddings = whole.tie_word_embeddings
    ours = architecture(raw, family).read_config(deep(raw))
    return theirs, ours if family in TEXT_FAMILIES else ours.text


def deep(raw: Any) -> Any:
    """transformers changes what it is given."""
    return {name: deep(value) for name, value in raw.items()} if isinstance(raw, dict) else raw


def rope_of_any_type(source: random.Random, gemma: bool) -> dict[str, Any]:
    kind = source.choice(["default", "linear", "llama3", "yarn", "dynamic"])
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = source.choice([2.0, 4, 8.5])
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": source.choice([3.0, 4.0])}
    optional = {"original_max_position_embeddings": 32, "rope_theta": source.choice([77.0, 1e4])}
    if kind == "yarn":
        optional |= {"beta_fast": 16.0, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.1, "attention_factor": 1.5}
        optional |= {} if gemma else {"truncate": False}    # which transformers looks for in the wrong place there
    if kind == "linear":
        optional |= {"attention_factor": 1.5, "low_freq_factor": 2.0}       # of other types: no part of this one
    rope |= {name: value for name, value in optional.items() if source.random() < 0.4}
    # Gemma's older spelling is lost on transformers 5, which has a rope_type of its own there.
    spelling = "rope_type" if gemma else source.choice(["type", "rope_type", "both"])
    if spelling == "type":
        rope["type"] = rope.pop("rope_type")
    elif spelling == "both":
        rope["type"] = kind
    return rope


def rope_fields(source: random.Random, family: str) -> dict[str, Any]:
    """The fields of RoPE in one, two or three places."""
    gemma = family.startswith("gemma3")
    fields: dict[str, Any] = {}
    if source.random() < 0.5:
        fields["rope_theta"] = source.choice([55.0, 1e6])
    if not gemma and source.random() < 0.2:
        fields["original_max_position_embeddings"] = 16
    for name in ("rope_scaling", "rope_parameters"):
        chosen = source.random()
        if chosen < 0.2:
            fields[name] = None
        elif chosen < 0.3 and not gemma:
            fields[name] = {}
        elif chosen < 0.8:
            fields[name] = rope_of_any_type(source, gemma)
    if family in SECTIONS:
        for name in ("rope_scaling", "rope_parameters"):
            if fields.get(name) or name == "rope_parameters":
                fields[name] = (fields.get(name) or {}) | {"mrope_section": SECTIONS[family]}
    if gemma:
        if source.random() < 0.5:
            fields["rope_local_base_freq"] = 33.0
        if fields.get("rope_parameters") is not None:
            kinds = ("full_attention", "sliding_attention")
            fields["rope_parameters"] = {kind: rope_of_any_type(source, gemma) for kind in kinds}
    return fields


def hugging_face_rotary(family: str, text: Any, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """cos and sin; of Gemma's two kinds of layers, of layers that see all first."""
    x = torch.zeros(1)
    if family.startswith("gemma3"):
        module = Gemma3RotaryEmbedding(text)
        return [module(x, positions, kind) for kind in ("full_attention", "sliding_attention")]
    kinds: dict[str, Callable[..., Any]] = {"qwen2_vl": Qwen2VLRotaryEmbedding, "qwen2_5_vl": Qwen2VLRotaryEmbedding}
    kinds["qwen3_vl"] = Qwen3VLTextRotaryEmbedding
    return [kinds.get(family, LlamaRotaryEmbedding)(text)(x, positions)]


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *PICTURE_FAMILIES])
def test_rope_is_read_wherever_it_stands(family: str) -> None:
    source = random.Random(family)
    generator = torch.Generator().manual_seed(0)
    scaled = 0
    for case in range(CASES):
        fields = rope_fields(source, family)
        flat = family in ("qwen2_vl", "qwen2_5_vl") and case % 2 == 0
        text = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 128} | fields
        if flat:
            text.pop("original_max_position_embeddings", None)      # which transformers leaves out of the text's then
        streams = (3,) if family in SECTIONS else ()
        positions = torch.randint(0, 128, (*streams, B, T), generator=generator)
        try:
            theirs, ours = read_both(family, text, flat)
        except InputError as error:
            scaling, parameters = fields["rope_scaling"], fields["rope_parameters"]
            assert "replaces rope_parameters" in str(error), fields
            assert "rope_theta" in parameters and "rope_theta" not in scaling
            continue
        ropes = [ours.rope, ours.local_rope] if family.startswith("gemma3") else [ours.rope]
        for rope, (cos, sin) in zip(ropes, hugging_face_rotary(family, theirs, positions), strict=True):
            for our, their in zip(RotaryEmbedding(rope, 16)(positions, torch.float32), (cos, sin), strict=True):
                # Angles reach 128, and the two may round eight times differently on the way there.
                assert (our - their).abs().max() < 128 * 8 * 2**-24, fields
            scaled += rope.rope_type != "default"
    assert scaled > 5


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *PICTURE_FAMILIES])
def test_absent_and_null_fields_mean_what_transformers_takes_them_for(family: str) -> None:
    source = random.Random(family)
    for _ in range(40):
        text: dict[str, Any] = SIZES | {"num_hidden_layers": source.choice([6, 30])}
        del text["head_dim"]
        choices = {
            "sliding_window": [None, 6], "use_sliding_window": [True, False], "max_window_layers": [0, 2],
            "num_key_value_heads": [None, 2], "head_dim": [None, 24], "intermediate_size": [48], "rms_norm_eps": [1e-3],
            "max_position_embeddings": [64], "vocab_size": [96], "tie_word_embeddings": [True, False],
        }  # fmt: skip
        if family in ("qwen2", "qwen3", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"):
            choices["layer_types"] = [None, ["full_attention"] * text["num_hidden_layers"]]
        if family.startswith(("qwen3", "gemma3")) and family != "qwen3_moe":
            choices["head_dim"] = [24]                      # null is an error there, and so is below
        if family not in ("llama", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            choices["num_key_value_heads"] = [2]
        if family.startswith("gemma3"):
            choices["sliding_window"] = [6]
        text |= {name: source.choice(values) for name, values in choices.items() if source.random() < 0.5}
        if family != "llama":
            text.setdefault("num_key_value_heads", 2)       # of which the defaults of most families are no part
        if family == "qwen3_vl":
            # What transformers does not know there, and what it reads beside text_config alone.
            text |= {"head_dim": 16, "use_sliding_window": False, "tie_word_embeddings": False}
        if family in SECTIONS:
            half = (text.get("head_dim") or 16) // 2
            text["rope_scaling"] = {"type": "mrope", "mrope_section": [half - 4, 2, 2]}
        theirs, ours = read_both(family, text)
        heads = theirs.num_key_value_heads
        assert ours.num_key_value_heads == heads, text
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 4), text
        for name in ("intermediate_size", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
            assert getattr(ours, name) == getattr(theirs, name), (name, text)
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings, text
        assert list(ours.windows) == hugging_face_windows(family, theirs), text


def hugging_face_windows(family: str, theirs: Any) -> list[int | None]:
    """Per layer, as the modeling files choose their masks."""
    layers = theirs.num_hidden_layers
    if family in ("llama", "qwen3_vl"):
        return [None] * layers
    if family in ("mistral", "llava", "mixtral", "qwen3_moe"):
        return [theirs.sliding_window] * layers
    return [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "linear", "factor": 2.5}, 320),
        ({"rope_type": "linear", "factor": 4, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 128),
    ],
)
def test_the_context_is_that_of_scaled_positions(rope: dict[str, Any], context: int) -> None:
    for family in ("llama", "qwen2", "qwen3_moe"):
        raw = SIZES | {"max_position_embeddings": 128, "rope_scaling": rope, "num_key_value_heads": 2}
        assert read_both(family, raw)[1].context == context
    # Gemma-3 counts the scaled positions itself.
    assert read_both("gemma3_text", raw)[1].context == 128


def test_a_rope_that_nobody_would_read_is_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(InputError, match="rope_scaling replaces rope_parameters with its rope_theta of 55"):
        config_file.read_llama_config({"rope_scaling": yarn, "rope_parameters": {"rope_theta": 55.0}})
    for family in PICTURE_FAMILIES:
        raw = {"model_type": family, "vision_config": TOWERS.get(family, {}), "rope_scaling": yarn}
        inside = {"rope_scaling": {"type": "mrope", "mrope_section": SECTIONS[family]}} if family in SECTIONS else {}
        raw["text_config"] = SIZES | inside | {"num_key_value_heads": 2}
        with pytest.raises(InputError, match=r"rope_scaling \(yarn\) stands beside text_config"):
            architecture(raw, family).read_config(raw)


def test_ends_of_sequence_may_stand_in_text_config(tmp_path: Path) -> None:
    """Where nothing else names one: transformers takes them from there, too."""
    silent: Any = SimpleNamespace(eos_token=None)
    for generation, config, ids in (
        ({}, {"text_config": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"eos_token_id": 5}, {"text_config": {"eos_token_id": 3}}, {5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7, "text_config": None}, {5, 6, 7}),
        ({}, {"eos_token_id": None}, set()),
    ):
        checkpoint: Any = SimpleNamespace(generation_config=generation, config=config, path=tmp_path)
        assert end_of_sequence_ids(checkpoint, silent) == ids
