"""What every rank runs in test_ranks.py: prompts on a share of each model, and what came of them from the first.

Arguments: a JSON file of cases, and where the first rank saves its answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from models.families.picture_model import PictureModel
from popengine.engine.distributed import ranks
from popengine.engine.engine import Engine
from popengine.engine.loading import load, load_model
from popengine.engine.processes import is_first
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint


def answers(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, the dense logits after a prompt, and the bytes that a step reads."""
    engine = load(case["checkpoint"], dtype=case["dtype"], weights=case["weights"], compile=case["compile"])
    settings = PruningSettings.paper(**case["settings"])
    made = engine.generate(
        case["prompt"], images=case["images"], max_new_tokens=case["tokens"], pruning=settings, raw=case["raw"],
        ignore_eos=True,
    )[0]
    held = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
    with torch.inference_mode():
        ids = case["ids"] or engine.prompts.ids(case["prompt"], raw=True)
        logits = exact(case, engine)(torch.tensor([ids]))[0]
    return {
        "tokens": made.token_ids, "logits": logits, "held_bytes": held,
        "bytes": made.statistics.weight_bytes_per_token,
    }


def exact(case: dict[str, Any], engine: Engine) -> Any:
    """The language model in float64: in float32 sums in another order alone make 2e-5 of SmolLM2's largest logit."""
    if case["dtype"] != "float32":
        return engine.model
    with open_checkpoint(case["checkpoint"]) as opened:
        model, _ = load_model(opened, torch.float32, engine.device, ranks=ranks())
    return (model.language_model if isinstance(model, PictureModel) else model).double()


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = [answers(case) for case in cases]
    if is_first():
        torch.save(found, sys.argv[2])
    if ranks().count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
