"""The synthetic text tasks: right answers, an honest held-out split, text that survives the tokenizer."""

import random
import re

import pytest
from train_mixtral import build_tokenizer

from popengine.evaluation.tasks import MAX_ANSWER_TOKENS
from popengine.evaluation.text_tasks import BRACKETS, COMMANDS, TASKS, held_out_prompts, is_held_out, make_prompt
from weights.errors import InputError


def fused_gemv(left: str, right: str, sign: str) -> str:
    """Addition, or multiplication by one digit, whose carries are counted back from the results."""
    operands = [(int(a), int(b)) for a, b in zip(left[::-1], right[::-1], strict=True)]
    steps, carry = "", 0
    for a, b in operands:
        result = (a + b if sign == "+" else a * b) + carry
        steps += f"{a}{b}{carry}={result:02} "
        carry = result // 10
    result = int(left) + int(right) if sign == "+" else int(left) * int(right[0])
    return f"{steps}>{result:0{len(left) + 1}}"


def solve(task: str, question: str) -> str:
    """Each task once more, from the text of its question alone."""
    if task == "reverse":
        return "".join(reversed(question))
    if task == "sort":
        return "".join(sorted(re.findall("..", question)))
    if task == "find":
        pairs, keys = question.split(":")
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return "".join(key + values[key] for key in keys)
    if task == "tally":
        return "".join(letter + str(question[:place].count(letter) + 1)[-1] for place, letter in enumerate(question))
    if task == "close":
        depths = "".join(
            f"{one}{(2 * sum(map(question[: place + 1].count, BRACKETS)) - place - 1) % 10}"
            for place, one in enumerate(question)
        )
        remaining = question
        while any(pair in remaining for pair in ("()", "[]", "{}")):
            remaining = remaining.replace("()", "").replace("[]", "").replace("{}", "")
        return depths + ">" + "".join(BRACKETS[one] for one in reversed(remaining))
    if task == "run":
        answer = question[0]
        for command in question[1:]:
            answer += command + COMMANDS[command][int(answer[-1])]
        return answer[1:]
    if task == "shift":
        turns = [(int(question[0]) + place) % 10 for place in range(len(question) - 1)]
        alphabet = "abcdefghijklmnopqrstuvwxyz" * 2
        shifted = (alphabet[alphabet.index(one) + turn] for one, turn in zip(question[1:], turns, strict=True))
        return "".join(f"{one}{turn}{new}" for one, turn, new in zip(question[1:], turns, shifted, strict=True))
    if task == "add":
        left, right = question.split("+")
        return fused_gemv(left, right, "+")
    left, factor = question.split("*")
    return fused_gemv(left, factor * len(left), "*")


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_long(task: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        shown, asked = make_prompt(task, rng, 1, held_out=False).examples
        assert solve(task, shown.question) == shown.answer
        assert solve(task, asked.question) == asked.answer
        assert len(shown.answer) < len(asked.answer)
        assert 20 <= len(asked.answer) < MAX_ANSWER_TOKENS                  # and the end


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_training_never_shows_a_held_out_question(task: str, share: float) -> None:
    rng = random.Random(2)
    trained = [example for _ in range(300) for example in make_prompt(task, rng, 2, False, share).examples]
    asked = [example for prompt in held_out_prompts(task, 100) for example in prompt.examples]
    assert not any(is_held_out(task, example) for example in trained)
    assert all(is_held_out(task, example) for example in asked)
    assert not {example.identity for example in trained} & {example.identity for example in asked}


def test_a_sum_and_its_mirror_image_are_in_the_same_split() -> None:
    rng = random.Random(3)
    for _ in range(100):
        example = make_prompt("add", rng, 0, held_out=True).examples[0]
        left, right = example.question.split("+")
        assert example.identity in (f"{left}+{right}", f"{right}+{left}")
        word = make_prompt("reverse", rng, 0, held_out=True).examples[0]
        assert word.identity == min(word.question, word.answer)


def test_the_same_seed_gives_the_same_prompts() -> None:
    assert list(held_out_prompts("sort", 20, seed=4)) == list(held_out_prompts("sort", 20, seed=4))
    assert list(held_out_prompts("sort", 20, seed=4)) != list(held_out_prompts("sort", 20, seed=5))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_one_line_of_ascii_that_survives_the_tokenizer(task: str) -> None:
    tokenizer = build_tokenizer()
    for prompt in held_out_prompts(task, 50):
        assert prompt.prompt.isascii() and prompt.prompt.isprintable()
        assert len(prompt.prompt) <= 90
        ids = tokenizer.encode(prompt.prompt).ids
        assert len(ids) == len(prompt.prompt) + 1                           # <s> in front
        assert tokenizer.decode(ids) == prompt.prompt


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown task 'divide'.*reverse, sort"):
        next(held_out_prompts("divide", 1))
