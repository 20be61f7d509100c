"""The synthetic picture questions: the same from the same seed, exact answers, a held-out split that is held out."""

from random import Random

import pytest

from popengine.measure.picture_tasks import (
    COLOURS,
    KINDS,
    Scene,
    Shape,
    ask,
    ask_count,
    ask_list,
    ask_place,
    draw,
    picture_questions,
    random_scene,
)
from weights.errors import InputError


def contents(scene: Scene) -> tuple:
    return tuple((shape.kind, shape.colour, shape.row, shape.column) for shape in scene.shapes)


def test_same_seed_gives_the_same_questions_and_pictures() -> None:
    first, second = picture_questions(12, seed=3), picture_questions(12, seed=3)
    assert first == second
    assert first[0].picture().tobytes() == second[0].picture().tobytes()
    assert first != picture_questions(12, seed=4)


def test_no_held_out_scene_is_ever_drawn_in_training() -> None:
    train, held_out = Random("train"), Random("held out")
    seen = {contents(random_scene(train, "train")) for _ in range(3000)}
    assert not seen & {contents(random_scene(held_out, "held-out")) for _ in range(3000)}


def test_kinds_come_in_turn_and_every_answer_is_right_for_itself_only() -> None:
    questions = picture_questions(60, seed=0)
    assert [question.kind for question in questions[:6]] == list(KINDS)
    assert all(question.is_right(f" {question.answer}\n") for question in questions)
    assert not questions[0].is_right(questions[0].answer + " No.")
    assert {question.kind for question in picture_questions(4, seed=0, kinds=["count", "list"])} == {"count", "list"}


def test_answers_say_what_the_scene_holds() -> None:
    scene = Scene((Shape("circle", "red", 0, 0), Shape("star", "orange", 1, 1), Shape("star", "orange", 2, 1)))
    assert ask_list(scene, Random(0))[1] == "I see a red circle, an orange star and an orange star."
    answers = {ask_count(scene, Random(seed))[1] for seed in range(200)}
    assert {"There are three shapes.", "There are two stars.", "There is one circle."} <= answers
    assert "There are no crosses." in answers
    # The star is there twice, so only the circle's place is a question.
    assert {ask_place(scene, Random(seed)) and ask_place(scene, Random(seed))[1] for seed in range(9)} == {
        "The red circle is at the top left."
    }
    assert ask(Scene((Shape("star", "red", 0, 0),) * 2), "colour", Random(0)) is None


def test_a_shape_is_painted_in_its_colour_in_its_cell() -> None:
    for kind in ("circle", "square", "triangle", "star", "cross"):
        picture = draw(Scene((Shape(kind, "blue", 1, 2),)), size=96)
        assert picture.size == (96, 96)
        assert picture.getpixel((80, 48)) == COLOURS["blue"]
        assert picture.getpixel((16, 48)) == (255, 255, 255)


def test_unknown_split_and_kind_are_named() -> None:
    with pytest.raises(InputError, match="unknown split 'test'; there are train, held-out"):
        picture_questions(1, 0, split="test")
    with pytest.raises(InputError, match="unknown kind of question 'size'"):
        picture_questions(1, 0, kinds=["size"])
