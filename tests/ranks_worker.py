"""What every rank runs in tests/test_ranks.py: prompts on a share of each model, and what came of them from the first.

Arguments: a JSON file of cases, and where the first rank saves its answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from models.pruning.settings import PruningSettings
from popengine.loading import load
from popengine.torchrun import is_first, ranks


def answers(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, the dense logits after a prompt, and the bytes that a step reads."""
    engine = load(case["checkpoint"], dtype=case["dtype"], weights=case["weights"], compile=case["compile"])
    settings = PruningSettings(**case["settings"])
    made = engine.generate(
        case["prompt"], images=case["images"], max_new_tokens=case["tokens"], pruning=settings, raw=case["raw"],
        ignore_eos=True,
    )[0]
    with torch.inference_mode():
        logits = engine.model(torch.tensor([case["ids"]]))[0]
    held = sum(tensor.numel() * tensor.element_size() for tensor in engine.model.state_dict().values())
    return {
        "tokens": made.token_ids, "logits": logits, "held_bytes": held,
        "bytes": made.statistics.weight_bytes_per_token,
    }


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
