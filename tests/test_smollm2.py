"""The default checkpoint, SmolLM2-135M-Instruct, against Hugging Face: live, and from numbers that were kept.

The kept numbers (tools/write_goldens.py) hold for the .gguf file; the live comparison for whichever was fetched.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import generated, ours, resolved
from builders import greedy as greedy_tokens
from safetensors.torch import load_file
from slow_evidence import SlowEvidence, mean_squares
from slow_pop import SlowPOP
from smollm2_text import CHAT_PROMPT, TEXT
from tolerance import SMOLLM2, assert_same

from models.llama import LlamaForCausalLM
from models.pruning.pop import Prior
from models.pruning.settings import DENSE, PruningSettings
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from weights.default_checkpoint import FROM_PACKAGE

GOLDENS = Path(__file__).parent / "goldens" / "smollm2.safetensors"
POP_RUNS = [(ratio, prefill) for ratio in (0.2, 0.4) for prefill in ("pruned", "dense")]


@pytest.fixture(scope="module")
def engine(default_checkpoint_path: Path) -> Engine:
    return load(default_checkpoint_path, dtype="float32")


@pytest.fixture(scope="module")
def goldens(default_checkpoint_path: Path) -> dict[str, Any]:
    if default_checkpoint_path.name != FROM_PACKAGE:
        pytest.skip("the kept numbers are those of the .gguf file, and the Hub's own files were fetched")
    return load_file(GOLDENS)


def greedy(engine: Engine, prompt: list[int], count: int, pruning: PruningSettings) -> list[int]:
    return [token for (token,) in generated(engine, [prompt], count, pruning, ignore_eos=False) if token is not None]


def test_tokens_equal_those_kept(engine: Engine, goldens: dict[str, Any]) -> None:
    assert engine.prompts.ids(TEXT, raw=True)[:256] == goldens["tokens"].tolist()
    assert engine.prompts.ids(CHAT_PROMPT) == goldens["prompt"].tolist()


def test_logits_equal_those_kept(engine: Engine, goldens: dict[str, Any]) -> None:
    with torch.inference_mode():
        logits = engine.model(goldens["tokens"][None].long())[0]                    # [256, V]
    assert torch.equal(logits.argmax(-1).int(), goldens["argmax"])
    sampled = logits[:, goldens["sampled_ids"].long()]
    assert_same(sampled, goldens["sampled_logits"], SMOLLM2)


def test_greedy_tokens_equal_those_kept(engine: Engine, goldens: dict[str, Any]) -> None:
    assert greedy(engine, goldens["prompt"].tolist(), 64, DENSE) == goldens["greedy"].tolist()


@pytest.mark.parametrize(("ratio", "prefill"), POP_RUNS)
def test_pop_tokens_equal_those_kept(engine: Engine, goldens: dict[str, Any], ratio: float, prefill: Any) -> None:
    settings = PruningSettings(ratio, prefill=prefill)
    assert greedy(engine, goldens["prompt"].tolist(), 48, settings) == goldens[f"pop_{ratio}_{prefill}"].tolist()


def test_logits_equal_transformers(engine: Engine, default_model_of_transformers: Any) -> None:
    tokens = torch.tensor([engine.prompts.ids(TEXT, raw=True)[:256]])
    assert tokens.shape[1] == 256
    with torch.inference_mode():
        wanted, logits = default_model_of_transformers(tokens).logits, engine.model(tokens)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert_same(logits, wanted, SMOLLM2)


def test_greedy_tokens_equal_transformers(engine: Engine, default_model_of_transformers: Any) -> None:
    prompt = engine.prompts.ids(CHAT_PROMPT)
    with torch.inference_mode():
        wanted = default_model_of_transformers.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    assert greedy(engine, prompt, 64, DENSE) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("ratio", "prefill"), POP_RUNS)
def test_pop_tokens_equal_transformers(
    engine: Engine, default_model_of_transformers: Any, ratio: float, prefill: Any
) -> None:
    prompt = engine.prompts.ids(CHAT_PROMPT)
    settings = PruningSettings(ratio, prefill=prefill)
    slow = SlowPOP(default_model_of_transformers, engine.resolve(settings).ffn_ratio, 0.1, prefill)
    wanted = slow.generate(prompt, 48)
    slow.remove_hooks()
    assert greedy(engine, prompt, 48, settings) == wanted


@pytest.fixture(scope="module")
def pair_in_float64(default_checkpoint_path: Path, default_model_of_transformers: Any) -> tuple[Any, LlamaForCausalLM]:
    return deepcopy(default_model_of_transformers).double(), ours(default_checkpoint_path).double()


@pytest.mark.parametrize("changes", [
    {"min_evidence": 24, "dense_every": 4, "redraw_every": 8}, {"rule": "up"},
    {"rule": "up", "retained_share": 0.2, "min_evidence": 24, "dense_every": 4, "redraw_every": 8},
], ids=["evidence", "up", "up_retained_evidence"])
def test_evidence_and_cheap_scores_give_the_tokens_of_the_slow_way(
    engine: Engine, pair_in_float64: tuple[Any, LlamaForCausalLM], changes: dict[str, Any]
) -> None:
    """A prior of 32 tokens throughout, made of the text by Hugging Face's modules; a prompt of few tokens.

    In float64: among 1,536 candidates of 30 layers some two always come within float32's rounding of each other.
    """
    reference, model = pair_in_float64
    settings = PruningSettings(ffn_ratio=0.4, candidate_width=0.3, **changes)
    prompt = engine.prompts.ids("The harbour master kept two books. In the", raw=True)
    assert len(prompt) < 16
    usual = mean_squares(reference, engine.prompts.ids(TEXT, raw=True)[:256])
    slow = SlowEvidence(reference, settings, [one.clone() for one in usual], 32)
    wanted = slow.generate(prompt, 48)
    if "min_evidence" in changes:
        assert slow.counts["drawn"] > 3
        assert slow.counts["dense"] > 20
    of = {
        (layer.mlp, part): squares.float()
        for layer, one in zip(model.model.layers, usual, strict=True)
        for part, squares in zip(("h", "gate"), one, strict=True)
    }
    plain = resolved(model, settings)
    assert greedy_tokens(model, prompt, 48, replace(plain, rule=plain.rule.with_prior(Prior(of, 32)))) == wanted
