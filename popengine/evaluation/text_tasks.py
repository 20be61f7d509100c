"""Synthetic text tasks with answers in steps, made from a seed. The small Mixtral in weights/mixtral-tiny/ learnt them.

A prompt is a question, after short solved examples of its task if any are asked for; the answer is the text up to the
end of sequence:

    tally bdacbbd?                                                  -> b1d1a1c1b2b3d2

Answers have 20 to 60 characters. Their steps (states, sums, carries, counts) are in no question. So online pruning,
which chooses channels from the prompt, sees little or nothing of what the answer needs. Everything is printable ASCII
on one line, one token per character.
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weights.errors import InputError

HELD_OUT_SHARE = 10  # one question in ten is held out: it never appears in training, neither asked nor as an example
LETTERS, DIGITS = string.ascii_lowercase, string.digits
BRACKETS = {"(": ")", "[": "]", "{": "}"}
# Commands of the task `run`: the new state for each of the states 0 to 9.
COMMANDS = {
    "a": "1234567890", "b": "9012345678", "c": "0246802468", "d": "9876543210", "e": "1032547698", "f": "5678901234",
    "g": "0369258147", "h": "0000055555",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One solved question.

    `identity` decides the split: two questions that give each other away share it (47+85 and 85+47).
    """

    question: str
    answer: str
    identity: str


@dataclass(frozen=True)
class Task:
    """A generator of solved questions of a given size, and the sizes of questions that are asked."""

    make: Callable[[random.Random, int], Example]
    least: int
    most: int


@dataclass(frozen=True)
class TaskPrompt:
    """Solved examples of one task, and a question with its answer."""

    task: str
    prompt: str
    answer: str
    examples: tuple[Example, ...]  # the solved ones in order, then the one that is asked


def _reverse(rng: random.Random, size: int) -> Example:
    word = "".join(rng.sample(LETTERS, size))
    return Example(word, word[::-1], min(word, word[::-1]))


def _pairs(rng: random.Random, size: int) -> list[str]:
    return [letter + rng.choice(DIGITS) for letter in rng.sample(LETTERS, size)]


def _sort(rng: random.Random, size: int) -> Example:
    pairs = _pairs(rng, size)
    return Example("".join(pairs), "".join(sorted(pairs)), "".join(pairs))


def _find(rng: random.Random, size: int) -> Example:
    pairs = _pairs(rng, size)
    found = rng.sample(pairs, size)
    question = "".join(pairs) + ":" + "".join(pair[0] for pair in found)
    return Example(question, "".join(found), question)


def _tally(rng: random.Random, size: int) -> Example:
    word = "".join(rng.choices("abcdef", k=size))
    counted = (letter + str(word[: place + 1].count(letter) % 10) for place, letter in enumerate(word))
    return Example(word, "".join(counted), word)


def _close(rng: random.Random, size: int) -> Example:
    text, opened, depths = "", "", ""
    for _ in range(size):
        if opened and rng.random() < 0.4:
            bracket, opened = BRACKETS[opened[-1]], opened[:-1]
        else:
            bracket = rng.choice("([{")
            opened += bracket
        text += bracket
        depths += f"{bracket}{len(opened) % 10}"
    return Example(text, depths + ">" + "".join(BRACKETS[bracket] for bracket in reversed(opened)), text)


def _run(rng: random.Random, size: int) -> Example:
    state = rng.choice(DIGITS)
    question, answer = state, ""
    for command in rng.choices(list(COMMANDS), k=size):
        state = COMMANDS[command][int(state)]
        question += command
        answer += command + state
    return Example(question, answer, question)


def _shift(rng: random.Random, size: int) -> Example:
    amount = rng.randrange(10)
    question, answer = str(amount), ""
    for letter in rng.choices(LETTERS, k=size):
        question += letter
        answer += f"{letter}{amount}{LETTERS[(LETTERS.index(letter) + amount) % 26]}"
        amount = (amount + 1) % 10
    return Example(question, answer, question)


def _written_out(pairs: list[tuple[int, int]], combine: Callable[[int, int], int]) -> str:
    """Write steps from the units on, `digit digit carry=result`, then the result: 47+85 is "750=12 481=13 >132"."""
    steps, result, carry = "", "", 0
    for left, right in reversed(pairs):
        total = combine(left, right) + carry
        steps += f"{left}{right}{carry}={total:02} "
        result, carry = str(total % 10) + result, total // 10
    return f"{steps}>{carry}{result}"


def _add(rng: random.Random, size: int) -> Example:
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(size)]
    left, right = ("".join(map(str, digits)) for digits in zip(*pairs, strict=True))
    return Example(f"{left}+{right}", _written_out(pairs, int.__add__), f"{min(left, right)}+{max(left, right)}")


def _times(rng: random.Random, size: int) -> Example:
    factor = rng.randrange(10)
    digits = [rng.randrange(10) for _ in range(size)]
    question = "".join(map(str, digits)) + f"*{factor}"
    return Example(question, _written_out([(digit, factor) for digit in digits], int.__mul__), question)


TASKS: dict[str, Task] = {
    "reverse": Task(_reverse, 20, 24),
    "sort": Task(_sort, 10, 14),
    "find": Task(_find, 10, 14),
    "tally": Task(_tally, 10, 20),
    "close": Task(_close, 10, 16),
    "run": Task(_run, 10, 20),
    "shift": Task(_shift, 8, 12),
    "add": Task(_add, 4, 6),
    "times": Task(_times, 4, 6),
}
# Tasks that the checkpoint nearly always answers right; comparisons ask these. The others were trained but not learnt.
LEARNT = ("sort", "find", "tally", "run", "shift", "add")


def is_held_out(task: str, example: Example) -> bool:
    """Return True if a question is in the held-out split. The question alone decides, so no seed can mix the splits."""
    return zlib.crc32(f"{task} {example.identity}".encode()) % HELD_OUT_SHARE == 0


def make_example(task: str, rng: random.Random, held_out: bool, least: int, most: int) -> Example:
    """Draw one solved question of a size between the bounds, from the held-out split or from the training split."""
    while True:
        example = TASKS[task].make(rng, rng.randint(least, most))
        if is_held_out(task, example) == held_out:
            return example


def make_prompt(task: str, rng: random.Random, shots: int, held_out: bool, share: float = 1.0) -> TaskPrompt:
    """Draw a prompt with `shots` solved examples and one question, all from the same split, no question twice.

    Solved examples have at most a third of the question's size. share < 1 scales all sizes down, for training.
    """
    if task not in TASKS:
        raise InputError(f"unknown task '{task}'; the tasks are {', '.join(TASKS)}")
    kind = TASKS[task]
    least, most = (max(2, round(share * size)) for size in (kind.least, kind.most))
    examples: list[Example] = []
    while len(examples) < shots + 1:
        bounds = (least, most) if len(examples) == shots else (2, max(2, most // 3))
        example = make_example(task, rng, held_out, *bounds)
        if example.identity not in {earlier.identity for earlier in examples}:
            examples.append(example)
    solved = "".join(f"{task} {example.question}={example.answer}; " for example in examples[:-1])
    return TaskPrompt(task, f"{solved}{task} {examples[-1].question}?", examples[-1].answer, tuple(examples))


def held_out_prompts(task: str, count: int, shots: int = 1, seed: int = 0) -> Iterator[TaskPrompt]:
    """Yield the evaluation set of one task: reproducible by the seed, without questions of the training split."""
    rng = random.Random(f"{task} {seed}")
    for _ in range(count):
        yield make_prompt(task, rng, shots, held_out=True)
