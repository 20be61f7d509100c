"""The synthetic picture questions: the same from the same seed, exact answers, a held-out split that is held out."""

import re
from random import Random

import pytest

from popengine.evaluation.picture_tasks import (
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


def test_kinds_come_in_turn() -> None:
    questions = picture_questions(10 * len(KINDS), seed=0)
    assert [question.kind for question in questions[: len(KINDS)]] == list(KINDS)
    assert {question.kind for question in picture_questions(4, seed=0, kinds=["rows", "list"])} == {"rows", "list"}


SCENE = Scene((Shape("circle", "red", 0, 0), Shape("star", "orange", 1, 1), Shape("cross", "red", 1, 5)))


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("list", "I see a red circle, an orange star and a red cross, which makes three shapes in all."),
        ("rows", "Row one has a red circle; row two has an orange star and a red cross; the other rows are empty."),
        ("places", "The red circle is in row one column one; the orange star is in row two column two; "
                   "the red cross is in row two column six."),
        ("kinds", "The circle is red, the star is orange and the cross is red, "
                  "which makes one circle, one star and one cross."),
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


def test_answers_have_twenty_to_sixty_words_and_marks() -> None:
    """Tokens of the checkpoint's tokenizer are those, nearly: long enough for a frozen mask to go wrong on the way."""
    answers = [one.answer for seed in range(5) for one in picture_questions(600, seed)]
    lengths = [len(re.findall(r"\w+|[^\w\s]", answer)) for answer in answers]
    assert min(lengths) >= 20 and max(lengths) <= 60


def test_kinds_are_counted_where_there_are_several() -> None:
    stars = Scene((Shape("star", "red", 0, 0), Shape("star", "blue", 0, 1), Shape("star", "green", 0, 2)))
    assert ask(stars, "kinds", Random(0)) is None
    found = ask(Scene((*stars.shapes, Shape("cross", "red", 0, 3))), "kinds", Random(0))
    assert found is not None
    told = "The stars are red, blue and green and the cross is red, which makes three stars and one cross."
    assert found.answer == told


def test_rows_without_a_shape_are_empty() -> None:
    full = Scene(tuple(Shape("star", "red", row, 0) for row in range(SIDE)))
    found = ask(full, "rows", Random(0))
    assert found is not None and "empty" not in found.answer


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
