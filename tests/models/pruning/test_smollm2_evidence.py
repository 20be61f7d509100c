"""Evidence after the prompt, a prior and the rule `up` on layers of SmolLM2, against the slow way."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from builders import greedy, ours, resolved
from slow_evidence import SlowEvidence, mean_squares
from smollm2_text import TEXT
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from models.llama import LlamaForCausalLM
from popengine.engine.loading import open_text_side
from popengine.studies.evidence import Prior
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint

# Of 30: in float64 all of them twice would take 2 GB. With both ends the text still goes from word to word.
LAYERS = (0, 1, 2, 3, 26, 27, 28, 29)


@pytest.fixture(scope="module")
def pair(default_checkpoint_path: Path) -> tuple[Any, LlamaForCausalLM]:
    """Hugging Face's modules and ours with the same weights, which test_smollm2.py holds to transformers' reading."""
    model = ours(default_checkpoint_path)
    model.model.layers = nn.ModuleList([model.model.layers[index] for index in LAYERS])  # type: ignore[assignment]
    model.config = replace(model.config, num_hidden_layers=len(LAYERS), windows=(None,) * len(LAYERS))
    with open_checkpoint(default_checkpoint_path) as checkpoint:
        config = LlamaConfig(**checkpoint.config | {"num_hidden_layers": len(LAYERS)})
    reference: Any = AutoModelForCausalLM.from_config(config).eval()
    # The tensors themselves: both together take no more memory than one.
    apart = reference.load_state_dict(model.double().state_dict(), strict=False, assign=True)
    assert not apart.unexpected_keys and {*apart.missing_keys} <= {"lm_head.weight"}
    reference.tie_weights()
    return reference.double(), model


@pytest.fixture(scope="module")
def encode(default_checkpoint_path: Path) -> Callable[[str], list[int]]:
    with open_checkpoint(default_checkpoint_path) as checkpoint:
        tokenizer, _ = open_text_side(checkpoint)
    return partial(tokenizer.encode, add_special_tokens=False)


@pytest.fixture(scope="module")
def usual(pair: tuple[Any, LlamaForCausalLM], encode: Callable[[str], list[int]]) -> list[Any]:
    """The prior: what the text shows Hugging Face's modules."""
    return mean_squares(pair[0], encode(TEXT)[:256])


@pytest.mark.parametrize("changes", [
    {"min_evidence": 24, "dense_every": 4, "redraw_every": 8}, {"rule": "up"},
    pytest.param(
        {"rule": "up", "retained_share": 0.2, "min_evidence": 24, "dense_every": 4, "redraw_every": 8},
        marks=pytest.mark.slow,
    ),
], ids=["evidence", "up", "up_retained_evidence"])
def test_evidence_and_cheap_scores_give_the_tokens_of_the_slow_way(
    pair: tuple[Any, LlamaForCausalLM], encode: Callable[[str], list[int]], usual: list[Any], changes: dict[str, Any]
) -> None:
    """A prior of 32 tokens throughout; a prompt of few tokens.

    In float64: among 1,536 candidates of many layers some two always come within float32's rounding of each other.
    """
    reference, model = pair
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, **changes)
    prompt = encode("The harbour master kept two books. In the")
    assert len(prompt) < 16
    slow = SlowEvidence(reference, settings, [one.clone() for one in usual], 32)
    count = 48 if "min_evidence" in changes else 24     # dense steps and new partitions need the longer answer
    wanted = slow.generate(prompt, count)
    assert len(set(wanted)) > 5         # a sequence that repeats one token would prove little
    if "min_evidence" in changes:
        assert slow.counts["drawn"] > 3
        assert slow.counts["dense"] > 20
    of = {
        (layer.mlp, part): squares.float()
        for layer, one in zip(model.model.layers, usual, strict=True)
        for part, squares in zip(("h", "gate"), one, strict=True)
    }
    plain = resolved(model, settings)
    assert greedy(model, prompt, count, plain.with_prior(Prior(of, 32))) == wanted
