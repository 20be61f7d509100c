"""Time the second turn of a conversation, and a single prompt with the same number of tokens.

    python tools/measure_turns.py [--ckpt DIR] [--dtype DTYPE] [--rounds N]
"""

import argparse
import statistics
import time

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import DENSE, PruningSettings

QUESTIONS = ("Name three trees that grow by the sea.", "Which of them grows tallest?")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--ckpt")
    flags.add_argument("--dtype", default="auto")
    flags.add_argument("--rounds", type=int, default=7)
    given = flags.parse_args()
    engine = load(given.ckpt, dtype=given.dtype)
    for name, pruning in (("dense", DENSE), ("recommended", PruningSettings())):
        turns = [second_turn(engine, pruning) for _ in range(given.rounds + 1)][1:]     # the first warms up
        first_token, following, alone = (statistics.median(times) * 1000 for times in zip(*turns, strict=True))
        print(
            f"{name}: first token {first_token:.0f} ms after the second question; prefill {following:.0f} ms, "
            f"of as many tokens alone {alone:.0f} ms ({following / alone:.2f})"
        )


def second_turn(engine: Engine, pruning: PruningSettings) -> tuple[float, float, float]:
    """Seconds to the first token, and of the prefill with its partition: of the turn, and of its tokens alone."""
    conversation = engine.chat(pruning=pruning, max_new_tokens=48)
    conversation.say(QUESTIONS[0])
    began = time.perf_counter()
    pieces = conversation.stream(QUESTIONS[1])
    next(pieces)
    first_token = time.perf_counter() - began
    *_, last = pieces
    assert last.statistics is not None and last.prompt_token_ids is not None
    alone = engine.run([last.prompt_token_ids[last.statistics.kept_tokens :]], 1, pruning)
    list(alone)
    following = (last.statistics.prefill_ms + last.statistics.partition_ms) / 1000
    return first_token, following, alone.prefill_s


if __name__ == "__main__":
    main()
