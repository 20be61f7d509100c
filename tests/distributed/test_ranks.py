"""A model over several ranks, real processes on gloo, held to one process that cuts as many groups of channels."""

import json
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import torch
from builders import LLAVA_TINY, MIXTRAL_TINY
from forked_ranks import run_ranks
from tolerance import assert_same, distance

from models.ranks import Ranks, share_of
from models.read_config import read_llama_config
from weights.errors import InputError

TALLY = "tally dbbd=d1b1b2d2; tally cabbacdafe?"


def case(checkpoint: Path, prompt: str, **changes: Any) -> dict[str, Any]:
    settings = {"candidate_width": 0.5} | changes.pop("settings", {})
    return {
        "checkpoint": str(checkpoint), "prompt": prompt, "dtype": "float32", "weights": "auto", "compile": False,
        "images": [], "tokens": 24, "raw": True, "ids": [1, 5, 9, 2, 30, 7], "settings": settings,
    } | changes


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_with_as_many_groups(
    count: int, tmp_path: Path, default_gguf: Path, checkpoint: Path
) -> None:
    """Dense logits within 1e-5 and the same greedy tokens: POP, Prefill-Only, evidence, pictures, packed, compiled."""
    if count == 3:                      # SmolLM2 has three key/value heads
        text = "The lighthouse at Orrin Point was built in 1858 from yellow brick, and"
        cases = [
            case(default_gguf, text, settings={"prune_ratio": ratio}) for ratio in (0.0, 0.4)
        ] + [case(default_gguf, text, dtype="bfloat16", settings={"prune_ratio": 0.0}, tokens=1)]
    else:
        more = {"prefill_skip": "1/4", "min_evidence": 20, "dense_every": 8, "redraw_every": 16, "min_tokens": 2}
        picture = {"images": [str(LLAVA_TINY / "example.png")], "raw": False}
        cases = [
            case(MIXTRAL_TINY, TALLY, settings={"prune_ratio": 0.2, **more}),
            case(LLAVA_TINY, "What do you see?", settings={"prune_ratio": 0.4, "prior": 32}, **picture),
            case(checkpoint, "Hello there", settings={"prune_ratio": 0.3, "rule": "all-channels"}),
            case(checkpoint, "Hello there", settings={"prune_ratio": 0.3}, compile=True),
        ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    said = run_ranks(tmp_path, count, ranks_worker.__file__, tmp_path / "cases.json", tmp_path / "out")
    assert said.statuses == [0] * count, said.err[-3000:]
    grouped = [one | {"settings": one["settings"] | {"groups": count}} for one in cases]
    by_ranks = torch.load(tmp_path / "out", weights_only=True)
    for one, found, alone in zip(cases, by_ranks, ranks_worker.answers(grouped), strict=True):
        packed = one["dtype"] == "bfloat16"
        if packed:      # a rank's scales and bfloat16's rounding are its own: near, as packed is to plain
            assert distance(found["logits"], alone["logits"].float()) < 0.05, one
        else:
            assert_same(found["logits"], alone["logits"])
        assert packed or found["tokens"] == alone["tokens"], one
        assert packed or found["held_bytes"] < 0.75 * alone["held_bytes"]
        assert found["bytes"] < 0.75 * alone["bytes"]


def test_what_ranks_do_not_divide_is_named(checkpoint: Path) -> None:
    config = read_llama_config(json.loads((checkpoint / "config.json").read_text()))
    with pytest.raises(InputError, match=r"cannot be shared out over 7 ranks; 1, 2.* ranks are possible"):
        share_of(config, Ranks(0, 7))
