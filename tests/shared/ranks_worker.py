"""What every rank runs in test_ranks.py: prompts on a share of each model, and what came of them from the first.

Arguments: a JSON file of cases, and where the first rank saves its answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.families.picture_model import PictureModel
from popengine.engine.distributed import ranks
from popengine.engine.engine import Engine
from popengine.engine.loading import load, load_model
from popengine.engine.processes import is_first
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint


def answers(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case greedy tokens, the dense logits after a prompt, and the bytes that a step reads.

    Cases that follow each other share what they load alike, and no two models are in memory at once.
    """
    found: list[dict[str, Any]] = []
    engine: Engine | None = None
    loaded, computed = None, None
    for case in cases:
        how = {name: case[name] for name in ("dtype", "weights", "compile")}
        if loaded != (case["checkpoint"], how):
            engine, loaded = None, (case["checkpoint"], how)
        if case["dtype"] == "float32" and computed != (case["checkpoint"], case["ids"]):
            logits, computed = exact_logits(case), (case["checkpoint"], case["ids"])
        engine = engine or load(case["checkpoint"], **how)
        settings = PruningSettings.paper(**case["settings"])
        made = engine.generate(
            case["prompt"], images=case["images"], max_new_tokens=case["tokens"], pruning=settings, raw=case["raw"],
            ignore_eos=True,
        )[0]
        if case["dtype"] != "float32":
            with torch.inference_mode():
                logits = engine.model(torch.tensor([engine.prompts.ids(case["prompt"], raw=True)]))[0]
        held = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
        found.append({
            "tokens": made.token_ids, "logits": logits, "held_bytes": held,
            "bytes": made.statistics.weight_bytes_per_token,
        })
    return found


@torch.inference_mode()
def exact_logits(case: dict[str, Any]) -> Tensor:
    """Those of token ids, in float64 [T, V]: in float32 sums in another order alone make 2e-5 of SmolLM2's largest."""
    with open_checkpoint(case["checkpoint"]) as opened:
        model, _ = load_model(opened, torch.float64, torch.device("cpu"), ranks=ranks())
    return (model.language_model if isinstance(model, PictureModel) else model)(torch.tensor([case["ids"]]))[0]


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = answers(cases)
    if is_first():
        torch.save(found, sys.argv[2])
    if ranks().count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
