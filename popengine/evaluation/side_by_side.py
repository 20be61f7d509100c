"""Dense and pruned answers to one prompt, generated step by step in turns, on a terminal and as a table."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from statistics import median
from textwrap import wrap
from typing import TextIO

from popengine.engine.conversation import common_prefix
from popengine.engine.engine import Engine
from popengine.engine.results import Statistics
from popengine.studies.settings import DENSE, PruningSettings

NAMES = ("dense", "pruned")
# Narrower terminals show one answer after the other.
LEAST_WIDTH = 90


@dataclass(frozen=True)
class Answer:
    """One answer. milliseconds: of every decode step; token_ids end with the end-of-sequence token, if there is one."""

    text: str
    token_ids: list[int]
    milliseconds: list[float]
    statistics: Statistics


class Screen:
    """Shows the answers while they grow: as two columns if the terminal is wide enough, else only the dense one."""

    def __init__(self, out: TextIO) -> None:
        self.out, (self.width, self.height) = out, shutil.get_terminal_size()
        self.two_columns, self.drawn, self.shown = self.width >= LEAST_WIDTH, 0, ""

    def show(self, texts: Sequence[str], last: bool = False) -> None:
        """Draw both texts; the last time in full, even if they are higher than the terminal."""
        if not self.two_columns:
            self.out.write(printable(texts[0])[len(self.shown) :])
            self.shown = printable(texts[0])
        else:
            lines = columns(texts, self.width)
            if not last:
                lines = lines[-(self.height - 2) :]
            up = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
            self.out.write(up + "".join(f"{line}\n" for line in lines))
            self.drawn = len(lines)
        self.out.flush()


def printable(text: str) -> str:
    """Drop control characters, so that no answer can steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def columns(texts: Sequence[str], width: int) -> list[str]:
    """Lay out two texts side by side, each under its name; return the lines."""
    one = (width - 5) // 2
    found = [
        [name, "-" * one, *(part for line in printable(text).splitlines() for part in wrap(line, one) or [""])]
        for name, text in zip(NAMES, texts, strict=True)
    ]
    return [f"{left:{one}}  |  {right}".rstrip() for left, right in zip_longest(*found, fillvalue="")]


class Growing:
    """An answer that is being generated."""

    def __init__(self, engine: Engine, ids: list[int], max_new_tokens: int, pruning: PruningSettings) -> None:
        self.run = engine.run([ids], max_new_tokens, pruning)
        self.pieces = engine.pieces(self.run)
        self.text, self.token_ids, self.seconds = "", list[int](), list[float]()
        self.statistics: Statistics | None = None

    def step(self) -> None:
        """Generate one token, unless the answer has ended."""
        if self.statistics is not None:
            return
        piece = next(self.pieces)
        self.text += piece.text
        self.statistics = piece.statistics
        if piece.token_id is not None:
            self.token_ids.append(piece.token_id)
            self.seconds.append(self.run.decode_s)                  # 0 after the first token, which needs no step

    def answer(self) -> Answer:
        """Return the finished answer."""
        assert self.statistics is not None
        steps = [1000 * (later - before) for before, later in pairwise(self.seconds)]
        return Answer(self.text, self.token_ids, steps, self.statistics)


def begun(engine: Engine, prompt: str, max_new_tokens: int, pruning: PruningSettings) -> tuple[Growing, Growing]:
    """Check a prompt, and start its dense and its pruned answer. Raises InputError for bad input."""
    ids = engine.prompts.ids(prompt)
    return Growing(engine, ids, max_new_tokens, DENSE), Growing(engine, ids, max_new_tokens, pruning)


def answer_in_turns(dense: Growing, pruned: Growing, screen: Screen | None) -> tuple[Answer, Answer]:
    """Generate a dense and a pruned answer, one step of each after the other."""
    while dense.statistics is None or pruned.statistics is None:
        dense.step()
        pruned.step()
        if screen is not None:
            screen.show([dense.text, pruned.text])
    if screen is not None:
        screen.show([dense.text, pruned.text], last=True)
    return dense.answer(), pruned.answer()


def table(pairs: Sequence[tuple[Answer, Answer]]) -> list[str]:
    """Write the table of all answers as lines, and a short conclusion."""
    lines = [f"{'prompt':8}{'':8}{'tokens':>8}{'ms per token':>22}{'MB per token':>18}  same tokens"]
    for number, (dense, pruned) in enumerate(pairs, 1):
        for name, one in zip(NAMES, (dense, pruned), strict=True):
            step, read = typical(one), one.statistics.weight_bytes_per_token
            of_dense = of_bytes = same = ""
            if one is pruned:
                of_dense = f"({step / typical(dense):.2f} of dense)" if one.milliseconds and dense.milliseconds else ""
                of_bytes = f"({read / dense.statistics.weight_bytes_per_token:.2f})"
                same = f"the first {common_prefix(dense.token_ids, one.token_ids)} of {len(dense.token_ids)}"
            lines.append(
                f"{number if one is dense else '':<8}{name:8}{len(one.token_ids):>8}{step:>8.1f} {of_dense:>13}"
                f"{read / 1e6:>11.0f} {of_bytes:>6}  {same}".rstrip()
            )
    return [*lines, "", meaning(pairs)]


def typical(one: Answer) -> float:
    """Return the median time of a step, in milliseconds; nan without steps."""
    return median(one.milliseconds) if one.milliseconds else float("nan")


def meaning(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    """Write the conclusion of the table, from the longest answer."""
    dense, pruned = max(pairs, key=lambda pair: len(pair[1].milliseconds))
    if pruned.statistics.pruning.why_dense:
        return f"Nothing was pruned: {pruned.statistics.pruning.why_dense}."
    if not (dense.milliseconds and pruned.milliseconds):
        return "No step was timed: the answers are one token long."
    bytes_read = pruned.statistics.weight_bytes_per_token / dense.statistics.weight_bytes_per_token
    time = typical(pruned) / typical(dense)
    said = f"On the longest answer a pruned step reads {bytes_read:.2f} of the bytes and takes {time:.2f} of the time."
    if time >= 1:
        said += " It saves no time here: other work than reading weights takes most of a step."
    least = pruned.statistics.pruning.settings.min_evidence
    waits = [number for number, (_, one) in enumerate(pairs, 1) if one.statistics.prompt_tokens < least]
    if waits:
        said += (
            f" Prompt {' and '.join(map(str, waits))} is short: steps ran dense until {least} tokens had been seen, so "
            "that the answer stays sound."
        )
    return said
