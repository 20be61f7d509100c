"""Measure which share of the active channels stays in its region from one partition to the next.

    python tools/measure_partitions.py --text FILE [--ckpt DIR] [--weights FORM]
    python tools/measure_partitions.py --times [--ckpt DIR] [--weights FORM]

Prints the share that stays active, and the share that stays in its region, whose weights are not copied again. Between
two turns of a conversation, two unrelated prompts, and two partitions 16 steps apart. With --times, the time of the
partition of a second turn: all active channels copied, and only those that changed.
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import combinations, pairwise, product

import torch

from models.pruning import active_weights
from models.pruning.partition import ChannelPartition
from models.state import DecodeState
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import PruningSettings

TURNS = (
    ("Name three trees that grow by the sea.", "Which of them grows tallest?"),
    ("Explain how a hash table works.", "Now write one in Python, with linear probing."),
    ("Write a Python function that parses a CSV file with quoted fields.", "Add a docstring and two unit tests."),
)
TOKENS = 32     # of an answer
LETTERS = 1000  # of a prompt
ROUNDS = 2


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--text")
    flags.add_argument("--times", action="store_true")
    flags.add_argument("--ckpt")
    flags.add_argument("--weights", default="auto")
    given = flags.parse_args()
    engine = load(given.ckpt, weights=given.weights, dtype="bfloat16", compile=False)
    if given.times:
        for ratio in (0.2, 0.4):
            whole, part = copy_times(engine, PruningSettings.paper(prune_ratio=ratio))
            print(f"prune ratio {ratio}, width 0.1, partition of the next turn: {whole:.0f} ms, {part:.0f} ms")
        return
    if given.text is None:
        flags.error("give --text or --times")
    with open(given.text, encoding="utf-8") as file:
        prompts = [line[:LETTERS] for line in file if len(line) > LETTERS][:4]
    for ratio in (0.2, 0.4):
        for width in (0.1, 0.5):
            settings = PruningSettings(prune_ratio=ratio, candidate_width=width)
            redrawn = PruningSettings(prune_ratio=ratio, candidate_width=width, dense_every=8, redraw_every=16)
            for name, found in (
                ("next turn", turns(engine, settings)), ("unrelated prompts", unrelated(engine, settings, prompts)),
                ("16 steps later", later(engine, redrawn, prompts[0])),
            ):
                active, same = torch.tensor([stays(*two) for two in found]).mean(dim=0).tolist()
                print(f"prune ratio {ratio}, width {width}, {name}: {active:.3f} active, {same:.3f} in its region")


# Partitions of all layers before and after: each yields pairs.
Pairs = Iterator[tuple[ChannelPartition, ChannelPartition]]


def partitions(state: DecodeState | None) -> list[ChannelPartition]:
    assert state is not None
    return [layer.ffn.partition for layer in state.layers]  # type: ignore[attr-defined]


def turns(engine: Engine, settings: PruningSettings) -> Pairs:
    for first, second in TURNS:
        conversation = engine.chat(pruning=settings, max_new_tokens=TOKENS)
        conversation.say(first)
        before = partitions(conversation.state)
        conversation.say(second)
        for one, other in zip(before, partitions(conversation.state), strict=True):
            if not torch.equal(one.order, torch.arange(one.sizes.channels)):    # too little evidence: not made yet
                yield one, other


def unrelated(engine: Engine, settings: PruningSettings, prompts: list[str]) -> Pairs:
    found = []
    for prompt in prompts:
        engine.generate(prompt, pruning=settings, max_new_tokens=1, raw=True)
        found.append(partitions(engine.idle_state))
    for before, after in combinations(found, 2):
        yield from zip(before, after, strict=True)


def later(engine: Engine, settings: PruningSettings, prompt: str) -> Pairs:
    found = []
    for tokens in (20, 36, 52):
        engine.generate(prompt, pruning=settings, max_new_tokens=tokens, raw=True)
        found.append(partitions(engine.idle_state))
    for before, after in pairwise(found):
        yield from zip(before, after, strict=True)


def copy_times(engine: Engine, settings: PruningSettings) -> tuple[float, float]:
    """Median time of the partition of a second turn, in ms: all channels copied, and those that changed."""
    usual, found = active_weights.FEW_CHANGED, dict[float, list[float]]()
    for round_, few in product(range(ROUNDS + 1), (0.0, usual)):
        active_weights.FEW_CHANGED = few
        for first, second in TURNS:
            conversation = engine.chat(pruning=settings, max_new_tokens=8)
            conversation.say(first)
            taken = conversation.say(second).statistics.partition_ms
            if round_:                          # the first warms up
                found.setdefault(few, []).append(taken)
    active_weights.FEW_CHANGED = usual
    return statistics.median(found[0.0]), statistics.median(found[usual])


def stays(before: ChannelPartition, after: ChannelPartition) -> tuple[float, float]:
    """Shares of the active channels after that were active before, and that were in the same region."""
    kept = [torch.isin(new, old).sum() for new, old in (
        (after.active, before.active), (after.retained, before.retained), (after.candidate, before.candidate)
    )]
    count = after.sizes.active
    return float(kept[0] / count), float((kept[1] + kept[2]) / count)


if __name__ == "__main__":
    main()
