"""The default checkpoint, SmolLM2-135M-Instruct, against Hugging Face: live, and from numbers that were kept.

The kept numbers (tools/write_goldens.py) hold for the .gguf file; the live comparison for whichever was fetched.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import generated
from safetensors.torch import load_file
from slow_pop import SlowPOP
from smollm2_text import CHAT_PROMPT, TEXT

from models.pruning.settings import DENSE, PruningSettings
from popengine.engine import Engine
from popengine.loading import load
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
    torch.testing.assert_close(sampled, goldens["sampled_logits"], atol=2e-3, rtol=0)


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
    torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=0)


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
