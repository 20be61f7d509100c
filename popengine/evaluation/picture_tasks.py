"""Picture questions with exact answers: coloured shapes on a 6 x 6 grid, drawn with Pillow from a seed.

The small vision-language checkpoint is trained on them (tools/train_llava.py) and pruned answers are scored on them.
Answers are sentences of 20 to 60 tokens that state the facts before the conclusion. Some need knowledge that no picture
shows: words of other languages, and objects that a shape resembles.
A scene is *held out* by a hash of its shapes, colours and cells. So no scene of the held-out split is ever drawn in
training, not even with another background, size or position inside the cell.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from weights.errors import InputError

SPLITS = ("train", "held-out")
SIDE = 6  # cells on a side of the grid; the checkpoint's tower has a patch for each cell
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
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
FEWEST_SHAPES, MOST_SHAPES = 3, 6
HELD_OUT_SHARE = 8  # one scene in eight

# In the order of SHAPES.
LIKENESSES = {
    "red": ("tomato", "brick", "roof", "starfish", "bandage"),
    "green": ("melon", "hedge", "fir", "leaf", "cactus"),
    "blue": ("balloon", "pool", "sail", "snowflake", "windmill"),
    "yellow": ("lemon", "sponge", "beak", "sunflower", "key"),
    "purple": ("plum", "curtain", "tent", "thistle", "butterfly"),
    "orange": ("pumpkin", "carpet", "carrot", "lily", "lobster"),
}
# With the article, which decides the ending of the colour.
GERMAN_SHAPES = {
    "circle": ("einen", "Kreis"), "square": ("ein", "Quadrat"), "triangle": ("ein", "Dreieck"),
    "star": ("einen", "Stern"), "cross": ("ein", "Kreuz"),
}  # fmt: skip
GERMAN_COLOURS = {
    "red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett", "orange": "orangefarben"
}  # fmt: skip
FRENCH_SHAPES = {
    "circle": ("un", "cercle"), "square": ("un", "carré"), "triangle": ("un", "triangle"),
    "star": ("une", "étoile"), "cross": ("une", "croix"),
}  # fmt: skip
FRENCH_COLOURS = {
    "red": ("rouge", "rouge"), "green": ("vert", "verte"), "blue": ("bleu", "bleue"),
    "yellow": ("jaune", "jaune"), "purple": ("violet", "violette"), "orange": ("orange", "orange"),
}  # fmt: skip


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
    """The content of a picture: shapes in reading order (row by row, left to right) on a plain background."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]

    @property
    def held_out(self) -> bool:
        content = ";".join(f"{shape.kind},{shape.colour},{shape.row},{shape.column}" for shape in self.shapes)
        return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class PictureQuestion:
    """A question about a scene and its only right answer."""

    kind: str
    scene: Scene
    question: str
    answer: str

    def picture(self, size: int = 144) -> Image.Image:
        return draw(self.scene, size)


def random_scene(random: Random, split: str) -> Scene:
    """Draw three to six different shapes in separate cells, of few kinds and colours so that they form groups."""
    while True:
        kinds = random.sample(SHAPES, random.randint(2, 4))
        colours = random.sample(list(COLOURS), random.randint(2, 4))
        names = [(kind, colour) for kind in kinds for colour in colours]
        count = random.randint(FEWEST_SHAPES, min(MOST_SHAPES, len(names)))
        cells = sorted(random.sample(range(SIDE * SIDE), count))
        shapes = tuple(
            Shape(
                kind=kind,
                colour=colour,
                row=cell // SIDE,
                column=cell % SIDE,
                radius=random.uniform(0.32, 0.42),
                right=random.uniform(-0.08, 0.08),
                down=random.uniform(-0.08, 0.08),
            )
            for cell, (kind, colour) in zip(cells, random.sample(names, count), strict=True)
        )
        scene = Scene(shapes, random.choice(BACKGROUNDS))
        if scene.held_out == (split == "held-out"):
            return scene


def ask(scene: Scene, kind: str, random: Random) -> PictureQuestion | None:
    """Make a question of this kind about the scene; None if it would have no single answer."""
    question_and_answer = ASKING[kind](scene, random)
    return PictureQuestion(kind, scene, *question_and_answer) if question_and_answer else None


def ask_list(scene: Scene, random: Random) -> tuple[str, str]:
    """Ask for all shapes; the answer lists and counts them."""
    question = random.choice(
        ["What is in the picture?", "What do you see?", "Describe the picture.", "List the shapes."]
    )
    listed = joined(with_article(shape.name) for shape in scene.shapes)
    return question, f"I see {listed}, which makes {NUMBERS[len(scene.shapes)]} shapes in all."


def ask_rows(scene: Scene, random: Random) -> tuple[str, str]:
    """Ask for the shapes in each row."""
    question = random.choice(["What is in each row?", "Describe the picture row by row.", "Go through the rows."])
    taken = sorted({shape.row for shape in scene.shapes})
    rows = [
        f"row {NUMBERS[row + 1]} has {joined(with_article(shape.name) for shape in scene.shapes if shape.row == row)}"
        for row in taken
    ]
    empty = ["the other rows are empty"] if len(taken) < SIDE else []
    return question, sentence("; ".join(rows + empty))


def ask_places(scene: Scene, random: Random) -> tuple[str, str]:
    """Ask for the row and column of each shape."""
    question = random.choice(["Where is each shape?", "Where are the shapes?", "Say where everything is."])
    places = (f"the {shape.name} is in {row_of(shape)} {column_of(shape)}" for shape in scene.shapes)
    return question, sentence("; ".join(places))


def ask_kinds(scene: Scene, random: Random) -> tuple[str, str] | None:
    """Ask for the number of shapes of each kind; None if there is only one kind."""
    question = random.choice(["How many shapes of each kind are there?", "Count the kinds.", "How many of each shape?"])
    groups = [(kind, [shape.colour for shape in scene.shapes if shape.kind == kind]) for kind in SHAPES]
    found = [(kind, colours) for kind, colours in groups if colours]
    if len(found) < 2:
        return None
    told = joined(f"the {plural(kind, len(colours))} {be(len(colours))} {joined(colours)}" for kind, colours in found)
    counted = joined(f"{NUMBERS[len(colours)]} {plural(kind, len(colours))}" for kind, colours in found)
    return question, sentence(f"{told}, which makes {counted}")


def ask_likeness(scene: Scene, random: Random) -> tuple[str, str]:
    """Ask for an object that each shape resembles."""
    question = random.choice(["What do the shapes look like?", "What could each shape be?", "What are they like?"])
    told = (
        f"the {shape.name} looks like {with_article(LIKENESSES[shape.colour][SHAPES.index(shape.kind)])}"
        for shape in scene.shapes
    )
    return question, sentence(joined(told))


def ask_languages(scene: Scene, random: Random) -> tuple[str, str] | None:
    """Ask for the shapes in three languages; None if there are more than four."""
    if len(scene.shapes) > 4:
        return None
    question = random.choice(
        ["Say it in three languages.", "Describe it in three languages.", "Tell it in three languages."]
    )
    english = joined(with_article(shape.name) for shape in scene.shapes)
    german = joined(map(in_german, scene.shapes), "und")
    french = joined(map(in_french, scene.shapes), "et")
    return question, f"I see {english}. Ich sehe {german}. Je vois {french}."


ASKING = {
    "list": ask_list,
    "rows": ask_rows,
    "places": ask_places,
    "kinds": ask_kinds,
    "likeness": ask_likeness,
    "languages": ask_languages,
}
KINDS = tuple(ASKING)


def picture_questions(
    count: int, seed: int, split: str = "held-out", kinds: Sequence[str] = KINDS
) -> list[PictureQuestion]:
    """Make `count` questions, alternating kinds, each about its own scene; reproducible for equal arguments.

    Raises InputError for an unknown split or kind.
    """
    for given, known, what in [(split, SPLITS, "split"), *((kind, ASKING, "kind of question") for kind in kinds)]:
        if given not in known:
            raise InputError(f"unknown {what} {given!r}; there are {', '.join(known)}")
    random = Random(f"{split} {seed}")
    questions: list[PictureQuestion] = []
    while len(questions) < count:
        question = ask(random_scene(random, split), kinds[len(questions) % len(kinds)], random)
        if question is not None:
            questions.append(question)
    return questions


def row_of(shape: Shape) -> str:
    """Return the row in words: "row two"."""
    return f"row {NUMBERS[shape.row + 1]}"


def column_of(shape: Shape) -> str:
    """Return the column in words: "column two"."""
    return f"column {NUMBERS[shape.column + 1]}"


def in_german(shape: Shape) -> str:
    """Return the German name with article, in the accusative."""
    article, noun = GERMAN_SHAPES[shape.kind]
    return f"{article} {GERMAN_COLOURS[shape.colour]}{'en' if article == 'einen' else 'es'} {noun}"


def in_french(shape: Shape) -> str:
    """Return the French name with article."""
    article, noun = FRENCH_SHAPES[shape.kind]
    return f"{article} {noun} {FRENCH_COLOURS[shape.colour][article == 'une']}"


def with_article(name: str) -> str:
    """Return the name with "a" or "an" in front."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(noun: str, count: int) -> str:
    """Return the noun, in the plural unless the count is 1."""
    return noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def be(count: int) -> str:
    """Return "is" or "are" for a count."""
    return "is" if count == 1 else "are"


def joined(parts: Iterable[str], word: str = "and") -> str:
    """Join parts by commas, and the last one by `word`."""
    *most, last = parts
    return f"{', '.join(most)} {word} {last}" if most else last


def sentence(words: str) -> str:
    """Return the words with a capital and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def draw(scene: Scene, size: int = 144) -> Image.Image:
    """Draw the scene as a square RGB picture of `size` pixels: four times larger, then reduced, for smooth edges."""
    large = 4 * size
    cell = large / SIDE
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
    """Draw one shape with its centre at x, y; all lengths in pixels."""
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
        # A triangle has three corners at the full radius; a star has five, and between them five at 0.4 of the radius.
        reaches = [radius] * 3 if kind == "triangle" else [radius, 0.4 * radius] * 5
        turns = [2 * math.pi * corner / len(reaches) - math.pi / 2 for corner in range(len(reaches))]
        corners = [
            (x + reach * math.cos(turn), y + reach * math.sin(turn)) for reach, turn in zip(reaches, turns, strict=True)
        ]
        pen.polygon(corners, fill=colour)
