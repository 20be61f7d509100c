"""The synthetic text tasks: right answers, an honest held-out split, text that survives the tokenizer."""

import random

import pytest

from popengine.measure.text_tasks import (
    BRACKETS,
    TASKS,
    build_tokenizer,
    held_out_prompts,
    is_held_out,
    make_example,
    make_prompt,
)
from weights.errors import InputError


def solve(question: str) -> str:
    """Each task once more, from the text of its question alone."""
    task, rest = question.split(" ", 1)
    if task == "copy":
        return rest
    if task == "reverse":
        return "".join(reversed(rest))
    if task == "sort":
        return "".join(digit * rest.count(digit) for digit in "0123456789")
    if task == "add":
        return str(sum(map(int, rest.split("+"))))
    if task == "count":
        word, letter = rest.split(":")
        return str(len(word.split(letter)) - 1)
    if task == "find":
        pairs, key = rest.split(":")
        return dict(zip(pairs[::2], pairs[1::2], strict=True))[key]
    remaining = rest
    while any(pair in remaining for pair in ("()", "[]", "{}")):
        remaining = remaining.replace("()", "").replace("[]", "").replace("{}", "")
    return "".join(BRACKETS[bracket] for bracket in reversed(remaining))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    rng = random.Random(1)
    for _ in range(300):
        example = make_example(task, rng, held_out=False)
        assert solve(example.question) == example.answer
        assert example.answer


@pytest.mark.parametrize("task", TASKS)
def test_training_never_shows_a_held_out_question(task: str) -> None:
    rng = random.Random(2)
    trained = {example.identity for _ in range(200) for example in make_prompt(task, rng, 5, held_out=False).examples}
    asked = {example.identity for prompt in held_out_prompts(task, 100) for example in prompt.examples}
    assert not trained & asked


def test_a_sum_and_its_mirror_image_are_in_the_same_split() -> None:
    rng = random.Random(3)
    for _ in range(100):
        example = make_example("add", rng, held_out=True)
        left, right = example.question.removeprefix("add ").split("+")
        assert example.identity in (f"{left}+{right}", f"{right}+{left}")
        assert is_held_out("add", example)


def test_the_same_seed_gives_the_same_prompts() -> None:
    assert list(held_out_prompts("sort", 20, seed=4)) == list(held_out_prompts("sort", 20, seed=4))
    assert list(held_out_prompts("sort", 20, seed=4)) != list(held_out_prompts("sort", 20, seed=5))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_one_line_of_ascii_that_survives_the_tokenizer(task: str) -> None:
    tokenizer = build_tokenizer()
    for prompt in held_out_prompts(task, 50):
        assert prompt.prompt.isascii() and prompt.prompt.isprintable()
        assert 30 <= len(prompt.prompt) <= 130
        ids = tokenizer.encode(prompt.prompt).ids
        assert len(ids) == len(prompt.prompt) + 1                           # <s> in front
        assert tokenizer.decode(ids) == prompt.prompt


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown task 'divide'.*copy, reverse"):
        next(held_out_prompts("divide", 1))
