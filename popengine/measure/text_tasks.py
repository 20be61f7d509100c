"""Synthetic text tasks with exact answers, made from a seed: what the small Mixtral in weights/mixtral-tiny/ learnt.

A prompt shows a few solved examples of one task and ends with a question; the answer is the text up to end of sequence:

    sort 52713=12357; sort 9140=0149; sort 2264?                   -> 2246

The examples come first because online pruning decides from the prompt which channels stay: a prompt of tens of tokens
is evidence, a bare question is hardly any. Everything is printable ASCII on one line, one token per character.
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tokenizers

from weights.errors import InputError

HELD_OUT_SHARE = 10  # one question in ten is held out: it never appears in training, neither asked nor as an example
BRACKETS = {"(": ")", "[": "]", "{": "}"}
BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"


@dataclass(frozen=True)
class Example:
    """One solved question.

    `identity` is what the held-out split looks at: two questions that give each other away share it (47+85 and 85+47).
    """

    question: str
    answer: str
    identity: str


@dataclass(frozen=True)
class TaskPrompt:
    """Solved examples of one task and a question that waits for its answer."""

    task: str
    prompt: str
    answer: str
    examples: tuple[Example, ...]  # the solved ones in order, then the one that is asked


def _letters(rng: random.Random, shortest: int, longest: int, alphabet: str = string.ascii_lowercase) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))


def _copy(rng: random.Random) -> Example:
    word = _letters(rng, 4, 8)
    return Example(f"copy {word}", word, word)


def _reverse(rng: random.Random) -> Example:
    word = _letters(rng, 3, 6)
    return Example(f"reverse {word}", word[::-1], min(word, word[::-1]))


def _sort(rng: random.Random) -> Example:
    digits = _letters(rng, 3, 6, string.digits)
    return Example(f"sort {digits}", "".join(sorted(digits)), digits)


def _add(rng: random.Random) -> Example:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return Example(f"add {left}+{right}", str(left + right), f"{min(left, right)}+{max(left, right)}")


def _count(rng: random.Random) -> Example:
    word = _letters(rng, 4, 9, "abcd")
    letter = rng.choice("abcd")
    return Example(f"count {word}:{letter}", str(word.count(letter)), f"{letter} {word}")


def _close(rng: random.Random) -> Example:
    opened: list[str] = []
    text = ""
    for _ in range(rng.randint(3, 8)):
        if opened and rng.random() < 0.4:
            text += BRACKETS[opened.pop()]
        else:
            opened.append(rng.choice("([{"))
            text += opened[-1]
    if not opened:
        opened.append(rng.choice("([{"))
        text += opened[-1]
    return Example(f"close {text}", "".join(BRACKETS[bracket] for bracket in reversed(opened)), text)


def _find(rng: random.Random) -> Example:
    keys = rng.sample(string.ascii_lowercase, rng.randint(3, 5))
    values = [rng.choice(string.digits) for _ in keys]
    wanted = rng.randrange(len(keys))
    pairs = "".join(key + value for key, value in zip(keys, values, strict=True))
    return Example(f"find {pairs}:{keys[wanted]}", values[wanted], f"{keys[wanted]} {pairs}")


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "add": _add,
    "count": _count,
    "close": _close,
    "find": _find,
}


def is_held_out(task: str, example: Example) -> bool:
    """Whether a question belongs to the held-out split: decided by the question alone, so no seed can mix the two."""
    return zlib.crc32(f"{task} {example.identity}".encode()) % HELD_OUT_SHARE == 0


def make_example(task: str, rng: random.Random, held_out: bool) -> Example:
    """Draw one solved question of `task` from the held-out split or from the training split."""
    if task not in TASKS:
        raise InputError(f"unknown task '{task}'; the tasks are {', '.join(TASKS)}")
    while True:
        example = TASKS[task](rng)
        if is_held_out(task, example) == held_out:
            return example


def make_prompt(task: str, rng: random.Random, shots: int, held_out: bool) -> TaskPrompt:
    """Draw a prompt with `shots` solved examples and one question, all from the same split, no question twice."""
    examples: list[Example] = []
    while len(examples) < shots + 1:
        example = make_example(task, rng, held_out)
        if example.identity not in {earlier.identity for earlier in examples}:
            examples.append(example)
    solved = "".join(f"{example.question}={example.answer}; " for example in examples[:-1])
    return TaskPrompt(task, f"{solved}{examples[-1].question}?", examples[-1].answer, tuple(examples))


def held_out_prompts(task: str, count: int, shots: int = 4, seed: int = 0) -> Iterator[TaskPrompt]:
    """The evaluation set of one task: the same `count` prompts for the same seed, none of whose questions were trained.

    Prompts have 30 to 130 characters with the default of four solved examples.
    """
    rng = random.Random(f"{task} {seed}")
    for _ in range(count):
        yield make_prompt(task, rng, shots, held_out=True)


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token per printable ASCII character, `<s>` in front; anything else is `<unk>`. Saved as tokenizer.json."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN])}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer
