"""Keys of the same weights under other names, family by family; and what transformers makes of those files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import tiny_llava
import tiny_qwen_vl
import torch
from builders import MIXTRAL, MODELS, QWEN2_MOE, ours, random_reference
from safetensors.torch import load_file, save_file
from tolerance import assert_same
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config

from weights.errors import InputError

Rename = Callable[[str], str]
TEXT: dict[str, Any] = {
    **{name: MODELS[name] for name in ("grouped_query", "biases", "query_key_norm", "gemma3")},
    "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE,
}  # fmt: skip
GEMMA = Gemma3Config(
    text_config=json.loads(MODELS["gemma3"].to_json_string(use_diff=False)), vision_config=tiny_gemma.VISION,
    mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
)
PICTURE: dict[str, Callable[[], Any]] = {
    "llava": lambda: tiny_llava.reference_model(tiny_llava.VARIANTS["grouped"]),
    "llava mixtral": lambda: tiny_llava.reference_model(tiny_llava.VARIANTS["mixtral"]),
    "gemma3": lambda: tiny_gemma.reference_model(GEMMA),
    "qwen2_vl": lambda: tiny_qwen_vl.reference_model("qwen2"),
    "qwen3_vl": lambda: tiny_qwen_vl.reference_model("qwen3"),
}
# What stands before embed_tokens, layers and norm, and before the head, if that is not what transformers writes.
TEXT_PREFIXES = [
    ("", ""), ("model.model.", "model."), ("language_model.model.", "language_model."),
    ("model.language_model.", ""), ("model.language_model.model.", "model.language_model."),
]  # fmt: skip


def prefixed(text: str, head: str, tower: str) -> Rename:
    def rename(key: str) -> str:
        if matched := re.fullmatch(r"(?!.*(?:vision|visual))(?:.*?\.)??((?:embed_tokens|layers|norm)\..*)", key):
            return text + matched[1]
        return head + key if key.startswith("lm_head.") else tower + key.removeprefix("model.")

    return rename


def renamed(folder: Path, to: Path, rename: Rename, **extra: Tensor) -> Path:
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({rename(key): t for key, t in load_file(folder / "model.safetensors").items()} | extra,
              to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("family", TEXT)
def test_a_text_model_loads_whatever_stands_before_its_keys(tmp_path: Path, family: str) -> None:
    reference = random_reference(TEXT[family])
    reference.save_pretrained(tmp_path / "as it is")
    tokens, read_alike = torch.arange(20)[None], 0
    with torch.inference_mode():
        want = ours(tmp_path / "as it is")(tokens)
        for number, (text, head) in enumerate(TEXT_PREFIXES):
            folder = renamed(tmp_path / "as it is", tmp_path / str(number), prefixed(text, head, ""))
            assert torch.equal(ours(folder)(tokens), want), text
            theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            if not info["missing_keys"]:
                read_alike += 1
                assert_same(theirs(tokens).logits, want)
    assert read_alike


@pytest.mark.parametrize("family", PICTURE)
def test_a_model_that_reads_pictures_loads_whatever_stands_before_its_keys(tmp_path: Path, family: str) -> None:
    PICTURE[family]().save_pretrained(tmp_path / "as it is")
    want = ours(tmp_path / "as it is").state_dict()
    for number, (text, head) in enumerate(TEXT_PREFIXES):
        for tower in ("", "model."):
            folder = renamed(tmp_path / "as it is", tmp_path / f"{number}{tower}", prefixed(text, head, tower))
            got = ours(folder).state_dict()
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want), text


def test_what_no_model_needs_may_be_there_and_what_is_twice_may_not(tmp_path: Path) -> None:
    reference = random_reference(MODELS["grouped_query"])
    reference.save_pretrained(tmp_path / "as it is")
    extra = {
        name: torch.ones(4) for name in (
            "v_head.summary.weight", "v_head.summary.bias", "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.self_attn.rotary_emb.cos_cached", "model.rotary_emb.sin_cached",
            "layers.2.self_attn.rotary_emb.inv_freq", "model.position_ids",
        )
    }
    folder = renamed(tmp_path / "as it is", tmp_path / "more", str, **extra)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.inference_mode():
        tokens = torch.arange(20)[None]
        assert_same(ours(folder)(tokens), theirs(tokens).logits)
    twice = renamed(tmp_path / "as it is", tmp_path / "twice", str, **{"norm.weight": torch.ones(64)})
    with pytest.raises(InputError, match=r"1 unexpected: norm\.weight"):
        ours(twice)
