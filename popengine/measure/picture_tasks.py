"""Picture questions with exact answers: coloured shapes on a 3 x 3 grid, drawn with Pillow from a seed.

The small vision-language checkpoint is trained on them (tools/train_llava.py) and pruned answers are scored on them.
A scene is *held out* by a hash of what is in it (which shape, which colour, which cell), so no scene of the held-out
split is ever drawn in training, not even with another background, size or position inside the cell.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from weights.errors import InputError

KINDS = ("colour", "shape", "count", "place", "presence", "list")
SPLITS = ("train", "held-out")
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 170),
    "orange": (245, 135, 30),
}
BACKGROUNDS = ((255, 255, 255), (225, 225, 220), (205, 220, 230), (90, 90, 95), (25, 25, 30))
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MOST_SHAPES = 5
HELD_OUT_SHARE = 8  # one scene in eight


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; `radius`, `right` and `down` are in units of a grid cell's side."""

    kind: str
    colour: str
    row: int
    column: int
    radius: float = 0.36
    right: float = 0.0
    down: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: shapes in reading order (row by row, left to right) on a plain background."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]

    @property
    def held_out(self) -> bool:
        content = ";".join(f"{shape.kind},{shape.colour},{shape.row},{shape.column}" for shape in self.shapes)
        return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class PictureQuestion:
    """A question about a scene and the one answer that counts as right."""

    kind: str
    scene: Scene
    question: str
    answer: str

    def picture(self, size: int = 96) -> Image.Image:
        return draw(self.scene, size)

    def is_right(self, answer: str) -> bool:
        return answer.strip() == self.answer


def picture_questions(
    count: int, seed: int, split: str = "held-out", kinds: Sequence[str] = KINDS
) -> list[PictureQuestion]:
    """`count` questions, the kinds in turn, each about a scene of its own; the same for the same arguments.

    Raises InputError for an unknown split or kind.
    """
    for given, known, what in [(split, SPLITS, "split"), *((kind, KINDS, "kind of question") for kind in kinds)]:
        if given not in known:
            raise InputError(f"unknown {what} {given!r}; there are {', '.join(known)}")
    random = Random(f"{split} {seed}")
    questions: list[PictureQuestion] = []
    while len(questions) < count:
        question = ask(random_scene(random, split), kinds[len(questions) % len(kinds)], random)
        if question is not None:
            questions.append(question)
    return questions


def random_scene(random: Random, split: str) -> Scene:
    """One to five shapes in cells of their own, with few kinds and colours so that counting is worth a question."""
    while True:
        kinds = random.sample(SHAPES, random.randint(1, 4))
        colours = random.sample(list(COLOURS), random.randint(1, 5))
        cells = sorted(random.sample(range(9), random.randint(1, MOST_SHAPES)))
        shapes = tuple(
            Shape(
                kind=random.choice(kinds),
                colour=random.choice(colours),
                row=cell // 3,
                column=cell % 3,
                radius=random.uniform(0.30, 0.40),
                right=random.uniform(-0.08, 0.08),
                down=random.uniform(-0.08, 0.08),
            )
            for cell in cells
        )
        scene = Scene(shapes, random.choice(BACKGROUNDS))
        if scene.held_out == (split == "held-out"):
            return scene


def ask(scene: Scene, kind: str, random: Random) -> PictureQuestion | None:
    """A question of this kind about the scene, or None where it would have no single answer."""
    question_and_answer = ASKING[kind](scene, random)
    return PictureQuestion(kind, scene, *question_and_answer) if question_and_answer else None


def ask_colour(scene: Scene, random: Random) -> tuple[str, str] | None:
    alone = [shape for shape in scene.shapes if sum(other.kind == shape.kind for other in scene.shapes) == 1]
    if not alone:
        return None
    shape = random.choice(alone)
    question = random.choice(
        ["What colour is the {}?", "What color is the {}?", "Which colour is the {}?", "Which color does the {} have?"]
    )
    return question.format(shape.kind), f"The {shape.kind} is {shape.colour}."


def ask_shape(scene: Scene, random: Random) -> tuple[str, str] | None:
    alone = [shape for shape in scene.shapes if sum(other.colour == shape.colour for other in scene.shapes) == 1]
    if not alone:
        return None
    shape = random.choice(alone)
    question = random.choice(["What shape is {}?", "Which shape is {}?", "What is the {} shape?"])
    return question.format(shape.colour), f"The {shape.colour} shape is a {shape.kind}."


def ask_count(scene: Scene, random: Random) -> tuple[str, str]:
    what = random.choice(["any", "kind", "colour"])
    if what == "any":
        noun, count = "shape", len(scene.shapes)
    elif what == "kind":
        # Three times in four something that is there: "none" would be too good a guess otherwise.
        noun = random.choice(scene.shapes).kind if random.random() < 0.75 else random.choice(SHAPES)
        count = sum(shape.kind == noun for shape in scene.shapes)
    else:
        colour = random.choice(scene.shapes).colour if random.random() < 0.75 else random.choice(list(COLOURS))
        noun, count = f"{colour} shape", sum(shape.colour == colour for shape in scene.shapes)
    plural = plural_of(noun)
    question = random.choice(["How many {} are there?", "How many {} do you see?", "How many {} are in the picture?"])
    answer = f"There is one {noun}." if count == 1 else f"There are {NUMBERS[count]} {plural}."
    return question.format(plural), answer


def ask_place(scene: Scene, random: Random) -> tuple[str, str] | None:
    alone = [shape for shape in scene.shapes if sum(other.name == shape.name for other in scene.shapes) == 1]
    if not alone:
        return None
    shape = random.choice(alone)
    question = random.choice(["Where is the {}?", "Where do you see the {}?", "Where in the picture is the {}?"])
    return question.format(shape.name), f"The {shape.name} is {PLACES[shape.row][shape.column]}."


def ask_presence(scene: Scene, random: Random) -> tuple[str, str]:
    names = {shape.name for shape in scene.shapes}
    absent = [f"{colour} {kind}" for colour in COLOURS for kind in SHAPES if f"{colour} {kind}" not in names]
    # Half of the absent ones share a shape or a colour with something present, so that neither alone gives it away.
    near = [name for name in absent if any(set(name.split()) & set(there.split()) for there in names)]
    there = random.random() < 0.5
    name = random.choice(sorted(names)) if there else random.choice(near if near and random.random() < 0.5 else absent)
    question = random.choice(["Is there {}?", "Do you see {}?", "Is {} in the picture?"])
    answer = f"Yes, there is {with_article(name)}." if there else f"No, there is no {name}."
    return question.format(with_article(name)), answer


def ask_list(scene: Scene, random: Random) -> tuple[str, str]:
    names = [with_article(shape.name) for shape in scene.shapes]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    question = random.choice(
        ["What is in the picture?", "What do you see?", "Describe the picture.", "List the shapes."]
    )
    return question, f"I see {listed}."


ASKING = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "place": ask_place,
    "presence": ask_presence,
    "list": ask_list,
}


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural_of(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def draw(scene: Scene, size: int = 96) -> Image.Image:
    """The scene as a square RGB picture of `size` pixels: drawn four times larger and reduced, for smooth edges."""
    large = 4 * size
    cell = large / 3
    picture = Image.new("RGB", (large, large), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        x = (shape.column + 0.5 + shape.right) * cell
        y = (shape.row + 0.5 + shape.down) * cell
        draw_shape(pen, shape.kind, x, y, shape.radius * cell, COLOURS[shape.colour])
    return picture.resize((size, size), Image.Resampling.BOX)


def draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    if kind == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    elif kind == "square":
        side = 0.85 * radius
        pen.rectangle([x - side, y - side, x + side, y + side], fill=colour)
    elif kind == "cross":
        arm = 0.3 * radius
        pen.rectangle([x - radius, y - arm, x + radius, y + arm], fill=colour)
        pen.rectangle([x - arm, y - radius, x + arm, y + radius], fill=colour)
    else:
        # A triangle has three corners at the full radius; a star five, with five more at 0.4 of it between them.
        reaches = [radius] * 3 if kind == "triangle" else [radius, 0.4 * radius] * 5
        turns = [2 * math.pi * corner / len(reaches) - math.pi / 2 for corner in range(len(reaches))]
        corners = [
            (x + reach * math.cos(turn), y + reach * math.sin(turn)) for reach, turn in zip(reaches, turns, strict=True)
        ]
        pen.polygon(corners, fill=colour)
