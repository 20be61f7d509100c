"""Answers on a terminal: words wrap, keys wait for the prompt, and an answer that repeats itself is stopped."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders import ENDLESS, REPOSITORY, endless_checkpoint

from popengine.dialogue.answers import Dialogue
from popengine.dialogue.repetition import LEAST_TOKENS, MOST_TOKENS, TIMES, repeated
from popengine.dialogue.wrapping import WordWrap, columns_of
from popengine.engine.loading import load
from popengine.engine.results import Piece, lines


def wrapped(text: str, width: int, cuts: list[int] | None = None) -> str:
    """The text as a terminal of that width shows it, arriving in pieces that end at `cuts`."""
    wrap, ends = WordWrap(lambda: width), [0, *(range(1, len(text)) if cuts is None else cuts), len(text)]
    return "".join(wrap.add(text[start:end]) for start, end in pairwise(ends)) + wrap.finish()


def test_words_wrap_between_words() -> None:
    text = "The quick brown fox\n\n    jumps over  the lazy dog"
    assert wrapped(text, 12) == "The quick\nbrown fox\n\n    jumps\nover  the\nlazy dog"
    assert wrapped(text, 1000) == text
    assert wrapped("exactly four", 7) == "exactly\nfour"
    assert wrapped("a " + 25 * "x" + " b", 10) == "a\n" + 10 * "x" + "\n" + 10 * "x" + "\n" + 5 * "x" + " b"


def test_wide_characters_fill_two_columns_and_may_end_a_line_anywhere() -> None:
    assert columns_of("\u4f60\u597d") == 4 and columns_of("e\u0301") == 1 and columns_of("\t", 3) == 5
    assert wrapped("\u4f60\u597d\u4e16\u754c", 5) == "\u4f60\u597d\n\u4e16\u754c"
    assert wrapped("ab\u4f60\u597d", 4) == "ab\u4f60\n\u597d"
    marked = "\u304b\u3099"                                         # a mark stays with its letter
    assert wrapped(3 * marked, 4) == f"{2 * marked}\n{marked}"


def test_no_line_is_too_long_and_no_word_is_lost() -> None:
    draw = Random(0)
    for _ in range(300):
        words = ["".join(draw.choices("abc\u4f60\u00e9", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 30))]
        text = "".join(word + draw.choice([" ", " ", "  ", "\n", "\n\n"]) for word in words)
        width = draw.randint(18, 40)
        cuts = sorted(draw.sample(range(1, len(text)), min(len(text) - 1, draw.randint(0, 9)))) if len(text) > 1 else []
        shown = wrapped(text, width, cuts)
        assert all(columns_of(line.rstrip(" ")) <= width for line in shown.split("\n")), (text, width)
        assert "".join(shown.split()) == "".join(text.split())
        assert shown.rstrip() == wrapped(text, width).rstrip()                      # however it arrives
        assert wrapped(text, 0, cuts) == text                                       # no terminal


def test_a_terminal_that_changes_its_width_is_followed() -> None:
    widths = iter([20, 20, 8, 8, 30, 30, 30])
    wrap = WordWrap(lambda: next(widths))
    shown = [wrap.add(part) for part in ("one two ", "three ", "four ", "five ", "six seven ", "eight ")]
    assert "".join([*shown, wrap.finish()]) == "one two three\nfour\nfive six seven eight "


def test_an_answer_cannot_steer_the_terminal() -> None:
    wrap = WordWrap(lambda: 40)
    shown = wrap.add("a\x1b[2Jb\x9b2J\r\x07 and\tc\n") + wrap.finish()
    assert not set("\x1b\x9b\r\x07") & set(shown) and "a[2Jb2J and" in shown and "c\n" in shown
    assert WordWrap(lambda: 0).add("\x1b[2J") == "\x1b[2J"       # into a pipe an answer goes as it is


def test_words_are_shown_when_the_next_begins() -> None:
    wrap = WordWrap(lambda: 80)
    assert [wrap.add(part) for part in ("Hel", "lo", " wor", "ld", "\n", "\u4f60", "x")] == [
        "", "", "Hello", "", " world\n", "\u4f60", "",
    ]
    assert wrap.finish() == "x"


@pytest.mark.parametrize("size", [LEAST_TOKENS, 11, MOST_TOKENS])
def test_a_phrase_that_comes_again_and_again_is_found_at_the_fourth_time(size: int) -> None:
    phrase = Random(0).sample(range(10**6), size)
    tokens, found = [1, 2, 3, *TIMES * phrase], []
    for end in range(1, len(tokens) + 1):
        found.append(repeated(tokens[:end]))
    assert found[-1] == size and not any(found[:-1])


def test_what_good_answers_repeat_is_not_found() -> None:
    assert repeated([]) == 0
    assert repeated(31 * [7]) == 0 and repeated(32 * [7]) == LEAST_TOKENS           # a short loop, by its multiple
    row = [*range(7)]
    assert repeated([token for line in range(9) for token in (*row, 100 + line)]) == 0         # lines that differ
    long = [*range(MOST_TOKENS + 1)]
    assert repeated(TIMES * long) == 0


class Parrot:
    """A conversation whose answers say the same tokens for ever."""

    max_new_tokens = 1000

    def __init__(self) -> None:
        self.closed = self.said = 0

    def stream(self, text: str, images: Any) -> Iterator[Piece]:
        try:
            while True:
                self.said += 1
                yield Piece(f"{self.said % 9} ", self.said % 9)
        finally:
            self.closed += 1


def test_an_answer_that_repeats_itself_is_stopped_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot()
    Dialogue(None, parrot, shows_statistics=True).answer("Hello", nullcontext([]))             # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert (parrot.said, parrot.closed) == (9 * TIMES, 1) and out.split() == [str(n % 9) for n in range(1, 37)]
    assert err.startswith("stopped after 36 tokens: the last 9 came 4 times in a row; ") and err.count("\n") == 1


def test_statistics_name_the_reason_of_an_end(checkpoint: Path) -> None:
    engine = load(checkpoint, dtype="float32")
    *_, last = engine.stream("Hello", max_new_tokens=6, ignore_eos=True)
    assert last.finish_reason == "length" and last.statistics is not None
    assert "6 tokens (as many as asked for)" in "\n".join(lines(last.statistics, "length", 0))
    text = "".join(piece.text for piece in engine.stream("Hello", max_new_tokens=20, ignore_eos=True))
    stop = next(letter for letter in text if letter.isalnum())
    *_, last = engine.stream("Hello", max_new_tokens=20, ignore_eos=True, stop=(stop,))
    assert last.finish_reason == "stop" and last.statistics is not None
    assert "(a stop string)" in "\n".join(lines(last.statistics, "stop", 0))
    assert "(end of sequence)" in "\n".join(lines(replace(last.statistics, stop_string=False), "stop", 0))


class Terminal:
    """Python on a terminal of its own."""

    def __init__(self, state: Path, *words: str, columns: int = 60) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(columns)
        environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment, cwd=REPOSITORY,
        )
        os.close(theirs)
        self.shown = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def write(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def until(self, words: str) -> str:
        """Read until these words, and return what came before them."""
        began = time.monotonic()
        while words not in self.shown:
            assert select.select([self.ours], [], [], 60)[0] and time.monotonic() - began < 120, self.shown[-500:]
            self.shown += os.read(self.ours, 65536).decode("utf-8", "replace")
        before, _, self.shown = self.shown.partition(words)
        return before


def test_keys_during_an_answer_wait_for_the_next_prompt(tmp_path: Path) -> None:
    folder, kept = endless_checkpoint(tmp_path), tmp_path / "kept.json"
    terminal = Terminal(
        tmp_path, "-m", "popengine", "chat", "--ckpt", str(folder), "--prune-ratio", "0", "-n", "1500", *ENDLESS
    )
    terminal.until("> ")
    terminal.write("Hello\n")
    terminal.until("Hello")
    terminal.until("\n")
    while len(terminal.shown.strip()) < 20:                         # the answer has begun
        assert select.select([terminal.ours], [], [], 60)[0]
        terminal.shown += os.read(terminal.ours, 65536).decode("utf-8", "replace")
    terminal.write("zebras @@ typoo\x7f")
    answer = terminal.until("of the dense model's bytes; /stats says more]")
    assert "zebras" not in answer and "@@" not in answer
    terminal.until("> ")
    assert "zebras @@ typo" in terminal.until("typo") + "typo"
    terminal.write(f"\n/save {kept}\n/quit\n")
    terminal.until("/quit")
    assert terminal.process.wait(timeout=60) == 0
    os.close(terminal.ours)
    said = [one["content"] for one in json.loads(kept.read_text())["messages"] if one["role"] == "user"]
    assert said == ["Hello", "zebras @@ typo"]


TOLD = """
import sys
from contextlib import nullcontext
from popengine.dialogue.answers import Dialogue
from popengine.engine.results import Piece

class Told:
    max_new_tokens = 100
    def stream(self, text, images):
        for number in range(18):
            if number == 9:
                yield Piece(" half", number)
                print("", flush=True)
                sys.stdin.readline()
            yield Piece(f" word{number:02}", 100 + number)

Dialogue(None, Told()).answer("", nullcontext([]))
"""


def test_an_answer_on_a_terminal_wraps_at_its_width_also_after_a_resize(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "-c", TOLD, columns=24)
    first = terminal.until("word08")
    terminal.until("\r\n")
    terminal.resize(40)
    terminal.write("\n")
    second = terminal.until("word17")
    assert terminal.process.wait(timeout=60) == 0
    os.close(terminal.ours)
    lines = f"{first}word08".replace("\r", "").split("\n")
    assert lines == [" word00 word01 word02", "word03 word04 word05", "word06 word07 word08"]
    assert max(len(line) for line in second.split("\r\n")) > 24


def test_an_answer_into_a_pipe_is_not_wrapped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOLD], input="\n", capture_output=True, text=True, cwd=REPOSITORY, check=True,
        env=os.environ | {"COLUMNS": "24"},
    )
    words = [f" word{number:02}" for number in range(18)]
    assert done.stdout == "".join(words[:9]) + " half\n" + "".join(words[9:]) + "\n"
