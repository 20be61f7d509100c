"""The synthetic picture questions: the same from the same seed, exact answers, a held-out split that is held out."""

from random import Random

import pytest

from popengine.measure.picture_tasks import (
    COLOURS,
    KINDS,
    SHAPES,
    SIDE,
    Scene,
    Shape,
    ask,
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
    questions = picture_questions(10 * len(KINDS), seed=0)
    assert [question.kind for question in questions[: len(KINDS)]] == list(KINDS)
    assert all(question.is_right(f" {question.answer}\n") for question in questions)
    assert not questions[0].is_right(questions[0].answer + " No.")
    assert {question.kind for question in picture_questions(4, seed=0, kinds=["rows", "list"])} == {"rows", "list"}


SCENE = Scene((Shape("circle", "red", 0, 0), Shape("star", "orange", 1, 1), Shape("cross", "red", 1, 5)))


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("list", "I see a red circle, an orange star and a red cross: three shapes in all."),
        ("rows", "Row one has a red circle; row two has an orange star and a red cross."),
        ("places", "The red circle is in row one column one; the orange star is in row two column two; "
                   "the red cross is in row two column six."),
        ("kinds", "The circle is red, the star is orange and the cross is red, "
                  "which makes one circle, one star and one cross."),
        ("most", "A circle and a cross are red and a star is orange; "
                 "two red and one orange makes red the most frequent."),
        ("likeness", "The red circle looks like a tomato, the orange star looks like a lily "
                     "and the red cross looks like a bandage."),
        ("languages", "I see a red circle, an orange star and a red cross. "
                      "Ich sehe einen roten Kreis, einen orangefarbenen Stern und ein rotes Kreuz. "
                      "Je vois un cercle rouge, une étoile orange et une croix rouge."),
    ],
)
def test_answers_say_what_the_scene_holds(kind: str, answer: str) -> None:
    question = ask(SCENE, kind, Random(0))
    assert question is not None
    assert question.answer == answer


def test_reasons_come_before_conclusions() -> None:
    found = [question.answer for seed in range(200) if (question := ask(SCENE, "compare", Random(seed)))]
    reason = "The red circle is in row one and the red cross is in row two, so the "
    assert {f"{reason}red circle is further up.", f"{reason}red cross is further down."} <= set(found)
    assert not any("row two and the red cross is in row two" in answer for answer in found)     # neither is further
    found = [question.answer for seed in range(200) if (question := ask(SCENE, "presence", Random(seed)))]
    assert "I see an orange star in row two, so yes, there is an orange star." in found
    assert "I see a red cross in row two, so no, there is no blue cross." in found
    assert any(answer.startswith("I see no square, so no, there is no ") for answer in found)


def test_a_question_without_a_single_answer_is_not_asked() -> None:
    two_each = Scene((*SCENE.shapes, Shape("square", "orange", 2, 2)))
    assert ask(two_each, "most", Random(0)) is None
    assert ask(Scene((Shape("star", "red", 0, 0), Shape("star", "blue", 0, 1))), "most", Random(0)) is None


def test_a_shape_is_painted_in_its_colour_in_its_cell() -> None:
    cell = 16
    for kind in SHAPES:
        picture = draw(Scene((Shape(kind, "blue", 1, 2),)), size=cell * SIDE)
        assert picture.size == (cell * SIDE, cell * SIDE)
        assert picture.getpixel((2 * cell + 8, cell + 8)) == COLOURS["blue"]
        assert picture.getpixel((cell + 8, cell + 8)) == (255, 255, 255)


def test_unknown_split_and_kind_are_named() -> None:
    with pytest.raises(InputError, match="unknown split 'test'; there are train, held-out"):
        picture_questions(1, 0, split="test")
    with pytest.raises(InputError, match="unknown kind of question 'size'"):
        picture_questions(1, 0, kinds=["size"])
