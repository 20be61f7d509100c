"""What two ranks and one process compute alike: test_ranks_together.py runs it in both."""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.pruning.pruning import Pruning
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.run import next_logits
from popengine.engine.sampling import Sampling
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import Calibration, calibrate
from popengine.studies.settings import PruningSettings

# Those of builders.py, which imports transformers: seconds of every rank.
WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
LLAVA_TINY, MIXTRAL_TINY = WEIGHTS / "llava-tiny", WEIGHTS / "mixtral-tiny"

POP = {"ffn_ratio": 0.4, "candidate_width": 0.3}
EVIDENCE = {"min_evidence": 30, "dense_every": 4, "redraw_every": 8, "prior": 16}
# Chosen in advance, from what a text showed, by scores that a rank has of its own channels alone.
STATIC = ("random", "magnitude", "wanda-sp", "flap", "cfsp")
TALLYING = "tally dbbd=d1b1b2d2; tally cabbacdafe?"

# A name, the checkpoint (None: the tiny one that a test made), how it is loaded, what is pruned (and by which method).
CASES: list[tuple[str, Path | None, dict[str, Any], dict[str, Any]]] = [
    ("dense", None, {}, {"prune_ratio": 0.0}),
    ("pop", None, {}, POP),
    ("heads", None, {}, POP | {"head_ratio": 0.5, "candidate_width": 0.5}),
    ("evidence", None, {}, POP | EVIDENCE),
    ("draft", None, {}, POP | {"rule": "draft", "candidate_width": 1.0}),
    ("glass", None, {}, POP | {"rule": "glass", "prior": 16}),
    ("prefill skip", None, {}, POP | {"prefill_skip": "1/3"}),
    *((method, None, {}, {"method": method, "prune_ratio": 0.2}) for method in STATIC),
    ("left out", None, {}, POP | {"leave_out": "1.attention+2.mlp"}),
    # Pruned, copies of four bits' columns are of eight, with a scale over a rank's own: near, and not equal.
    ("int4", None, {"weights": "int4"}, {"prune_ratio": 0.0}),
    ("mixtral dense", MIXTRAL_TINY, {}, {"prune_ratio": 0.0}),
    ("mixtral", MIXTRAL_TINY, {}, POP),
    ("mixtral evidence", MIXTRAL_TINY, {}, POP | EVIDENCE),
    ("mixtral flap", MIXTRAL_TINY, {}, {"method": "flap", "prune_ratio": 0.2}),
    ("llava dense", LLAVA_TINY, {}, {"prune_ratio": 0.0}),
    ("llava", LLAVA_TINY, {}, POP),
    ("llava thin", LLAVA_TINY, {}, POP | {"visual_tokens": 12, "visual_tokens_layer": 1}),
    ("llava skip", LLAVA_TINY, {}, POP | {"prefill_skip": "1/4"}),
]


def pruning_of(engine: Engine, groups: int, method: str = "", **settings: Any) -> Pruning:
    wanted = PruningSettings.paper(**settings, groups=groups)
    if not method:
        return engine.resolve(wanted)
    return pruning_for(method, Request(engine.model, wanted, calibration_of(engine), resolve=engine.resolve))


@lru_cache
def calibration_of(engine: Engine) -> Calibration:
    draws = torch.Generator().manual_seed(0)
    windows = torch.randint(5, engine.model.config.vocab_size, (4, 48), generator=draws).tolist()
    return calibrate(engine.model, windows, "numbers")


@torch.inference_mode()
def compute(tiny: Path, groups: int) -> dict[str, tuple[Tensor, list[int]]]:
    """Of every case: logits of the prompt and of the first 8 greedy tokens, and 24 of those (of static masks 12)."""
    found, engine, loaded = {}, None, None
    for name, checkpoint, how, settings in CASES:
        path = tiny if checkpoint is None else checkpoint
        if loaded != (path, how):
            engine, loaded = load(path, dtype="float32", device="cpu", **how), (path, how)
        assert engine is not None
        images = [LLAVA_TINY / "example.png"] if path == LLAVA_TINY else []
        pruning = pruning_of(engine, groups, **settings)
        count = 12 if "method" in settings else 24
        pieces = list(engine.stream(
            TALLYING, images=images, max_new_tokens=count, pruning=pruning, sampling=Sampling(), ignore_eos=True
        ))
        ids = pieces[-1].prompt_token_ids
        tokens = [piece.token_id for piece in pieces[:-1]]
        state = engine.model.new_state(1, len(ids) + count + 1, pruning)
        given = torch.tensor([[token % engine.model.config.vocab_size for token in ids]])
        logits = [engine.model.prefill(engine.model.embed(given), state)]                       # [1, V]
        logits += [next_logits(engine.model, torch.tensor([token]), state) for token in tokens[:8]]
        found[name] = torch.cat(logits), tokens
    return found


if __name__ == "__main__":
    found = compute(Path(sys.argv[1]), 1)
    # Every rank says what it has found: they must not differ.
    torch.save(found, Path(sys.argv[2]) / f"{torch.distributed.get_rank()}.pt")
