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

    Cases that follow each other share what they load alike: a checkpoint of the default's size takes seconds.
    """
    found: list[dict[str, Any]] = []
    engine, loaded, logits, computed = None, None, None, None
    for case in cases:
        how = {name: case[name] for name in ("dtype", "weights", "compile")}
        if loaded != (case["checkpoint"], how):
            engine = None                                   # freed before the next one is there
            engine, loaded = load(case["checkpoint"], **how), (case["checkpoint"], how)
        assert engine is not None
        settings = PruningSettings.paper(**case["settings"])
        made = engine.generate(
            case["prompt"], images=case["images"], max_new_tokens=case["tokens"], pruning=settings, raw=case["raw"],
            ignore_eos=True,
        )[0]
        held = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
        ids = case["ids"] or engine.prompts.ids(case["prompt"], raw=True)
        if computed != (case["checkpoint"], case["dtype"], ids):
            logits, computed = dense_logits(case, engine, ids), (case["checkpoint"], case["dtype"], ids)
        found.append({
            "tokens": made.token_ids, "logits": logits, "held_bytes": held,
            "bytes": made.statistics.weight_bytes_per_token,
        })
    return found


@torch.inference_mode()
def dense_logits(case: dict[str, Any], engine: Engine, ids: list[int]) -> Tensor:
    """Those of a prompt, [T, V], of float32 in float64: else sums in another order alone make 2e-5 of the largest."""
    if case["dtype"] != "float32":
        return engine.model(torch.tensor([ids]))[0]
    with open_checkpoint(case["checkpoint"]) as opened:
        model, _ = load_model(opened, torch.float32, engine.device, ranks=ranks())
    return (model.language_model if isinstance(model, PictureModel) else model).double()(torch.tensor([ids]))[0]


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
