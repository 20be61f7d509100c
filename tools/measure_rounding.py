"""Measure the distance between bfloat16 logits of the same network computed in different orders.

    python tools/measure_rounding.py FILE

Decodes 64 tokens of a text (UTF-8) with the default checkpoint after a prompt of 128, and prints the median distance
between the logits of two computations (l2, relative). Each starts from one prefill of its own dtype. One pair is
PyTorch with its library kernels switched off and on: it shows how close two correct bfloat16 computations come.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import DENSE

PROMPT, STEPS = 128, 64


@torch.inference_mode()
def logits(engine: Engine, ids: list[int], during: Callable[[], AbstractContextManager[object]]) -> Tensor:
    """Of the decode steps, float32 [STEPS, V]."""
    model = engine.model
    state = model.new_state(1, PROMPT + STEPS, engine.resolve(DENSE))
    engine.prepare(state)
    model.prefill(model.embed(torch.tensor([ids[:PROMPT]])), state)
    with during():
        return torch.cat([engine.decode(torch.tensor([token]), state) for token in ids[PROMPT:]]).float()


def distance(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).median())


def without_library() -> AbstractContextManager[object]:
    return torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-any-return]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    eager, compiled = load(dtype="bfloat16"), load(dtype="bfloat16", compile=True)
    exact, rows = load(dtype="float32"), load(dtype="bfloat16", compile=True)
    rows.compiled = None                # stored by rows, as compiled models are, and run eagerly: F.linear
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    ids = eager.tokenizer.encode(text, add_special_tokens=False)[: PROMPT + STEPS]
    found = {
        "eager": logits(eager, ids, nullcontext),
        "compiled": logits(compiled, ids, nullcontext),
        "F.linear": logits(rows, ids, nullcontext),
        "F.linear without oneDNN": logits(rows, ids, without_library),
    }
    truth = logits(exact, ids, nullcontext)
    for name, values in found.items():
        apart = distance(values, found["eager"])
        print(f"{name:24} from eager {apart:.2%}, from float32 {distance(values, truth):.2%}")
    pair = distance(found["F.linear without oneDNN"], found["F.linear"])
    print(f"F.linear with and without oneDNN: {pair:.2%}")


if __name__ == "__main__":
    main()
