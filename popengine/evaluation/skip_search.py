"""A greedy search for the layers that a prompt can skip at the least loss of what follows it.

Prefill-Only pruning (arXiv 2602.03295) skips the deepest layers. The virtual gates rank layers one by one, but do not
say what several of them cost together. Here every round adds the layer whose skipping, with those found so far, loses
the least likelihood of the continuations of calibration windows. Decode steps are dense.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from popengine.engine.loaded import LoadedModel
from popengine.evaluation.by_position import cell, of_windows
from popengine.evaluation.progress_file import ProgressFile
from popengine.evaluation.scoring import Window, log_probabilities
from popengine.studies.resolve import StudyPruning
from popengine.studies.skipped_layers import written_layers


@dataclass
class SkipSearch:
    """The inputs of a search.

    dense   the dense model's pruning
    until   the time (time.monotonic) after which no set is measured any more
    """

    engine: LoadedModel
    dense: StudyPruning
    windows: Sequence[Window]
    boundary: int
    progress: ProgressFile
    until: float
    show_progress: bool

    def rounds(self, count: int) -> list[dict[str, Any]]:
        """Return the best set of 1, 2, ... `count` layers, beside the same number of deepest ones.

        Fewer sets if the time is over. Measured sets are recorded, so a later call goes on where this one stopped.
        """
        layers = len(self.engine.model.model.layers)
        found: list[dict[str, Any]] = []
        chosen: tuple[int, ...] = ()
        total = sum(layers - number + 1 for number in range(count)) + 1             # and the dense model
        with tqdm(total=total, desc="skip search", unit="set", disable=not self.show_progress) as bar:
            dense = self.losses(())
            bar.update()
            for number in range(1, count + 1):
                measured: dict[tuple[int, ...], list[float] | None] = {}
                deepest = tuple(range(layers - number, layers))
                left = [layer for layer in reversed(range(layers)) if layer not in chosen]     # of equals the deeper
                candidates = [tuple(sorted([*chosen, layer])) for layer in left]
                for skipped in [*candidates, deepest]:
                    measured[skipped] = None if dense is None else self.losses(skipped)
                    bar.update()
                lost = {skipped: sum(own) for skipped, own in measured.items() if own is not None}
                if dense is None or len(lost) < len(measured):
                    return found
                chosen = min(candidates, key=lambda skipped: lost[skipped])
                found.append({
                    "layers": written_layers(chosen), "less_dense": difference(measured[chosen], dense),
                    "deepest_less_dense": difference(measured[deepest], dense),
                })
        return found

    @torch.inference_mode()
    def losses(self, skipped: tuple[int, ...]) -> list[float] | None:
        """Return each window's mean loss if its prompt skips these layers; None if the time is over."""
        key = written_layers(skipped)
        if key not in self.progress.records:
            if time.monotonic() >= self.until:
                return None
            pruning = replace(self.dense, skipped=skipped, boundary=self.boundary)
            self.progress.add(key, {"losses": [self.loss(window, pruning) for window in self.windows]})
        return self.progress.records[key]["losses"]

    def loss(self, window: Window, pruning: StudyPruning) -> float:
        """Return the mean negative log-probability of a window's continuation, in nats per token."""
        log_p = log_probabilities(self.engine, window, pruning)                      # [S, V]
        said = torch.tensor(window.continuation, device=log_p.device)               # [S]
        return float(-log_p.gather(1, said[:, None]).mean())


def difference(losses: Sequence[float] | None, dense: Sequence[float]) -> dict[str, float | None]:
    """Compute the mean and the standard error over windows of losses less the dense model's."""
    return of_windows([one - other for one, other in zip(losses or (), dense, strict=True)])


def is_sound(record: dict[str, Any], windows: int) -> bool:
    """Return True if a record of a progress file has all that `SkipSearch.losses` writes."""
    losses = record.get("losses")
    return isinstance(losses, list) and len(losses) == windows and all(
        type(one) is float and 0 <= one < 1e4 for one in losses
    )


def markdown(rounds: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Write the table of a search in Markdown."""
    lines = [
        "| layers skipped | loss less dense's, nats per token | the deepest ones instead | as a flag |",
        "|---|---|---|---|",
    ]
    for number, one in enumerate(rounds, 1):
        cells = f"{cell(one['less_dense'])} | {cell(one['deepest_less_dense'])}"
        lines.append(f"| {number} | {cells} | `--prefill-skip {one['layers']}` |")
    facts = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    return "\n".join([*lines, "", f"Measured with: {facts}.", ""])
