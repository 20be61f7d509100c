"""Questions with exact answers, generated and not teacher-forced: what a pruned model still gets right.

They are the synthetic tasks that the small checkpoints of this project have learnt (text_tasks, picture_tasks), asked
from their held-out splits. Each question is a prompt of its own, with a partition of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from popengine.engine import Engine
from popengine.measure.picture_tasks import KINDS, picture_questions
from popengine.measure.text_tasks import LEARNT, held_out_prompts, make_prompt
from popengine.pictures.images import ImageSource
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

MAX_ANSWER_TOKENS = 64
# Of every kind: they are all made before the first is asked.
MOST_QUESTIONS = 10_000


@dataclass(frozen=True)
class Question:
    """One prompt, its images if any, and the only right answer. task says what kind of question it is."""

    task: str
    prompt: str
    answer: str
    images: tuple[ImageSource, ...] = ()


def text_questions(count: int, seed: int) -> list[Question]:
    """`count` of every text task that was learnt."""
    return [
        Question(task, one.prompt, one.answer)
        for task in LEARNT
        for one in held_out_prompts(task, count, seed=seed)
    ]


def questions_about_pictures(count: int, seed: int) -> list[Question]:
    """`count` of every kind."""
    asked = picture_questions(count * len(KINDS), seed)
    return [Question(one.kind, one.question, one.answer, (one.picture(),)) for one in asked]


def training_questions(task_set: str, count: int, seed: int = 0) -> list[Question]:
    """`count` of every kind from the split that was trained on: what methods may learn from.

    Raises InputError for an unknown set of tasks.
    """
    check_task_set(task_set)
    if task_set == "pictures":
        trained = picture_questions(count * len(KINDS), seed, "train", KINDS)
        return [Question(one.kind, one.question, one.answer, (one.picture(),)) for one in trained]
    made = (make_prompt(task, Random(f"{task} {seed} {index}"), 1, False) for task in LEARNT for index in range(count))
    return [Question(one.task, one.prompt, one.answer) for one in made]


TASK_SETS: dict[str, Callable[[int, int], list[Question]]] = {
    "text": text_questions,
    "pictures": questions_about_pictures,
}


def check_task_set(task_set: str) -> None:
    if task_set not in TASK_SETS:
        raise InputError(f"unknown tasks {task_set!r}; there are {', '.join(TASK_SETS)}")


def questions_for(task_set: str, count: int, seed: int) -> list[Question]:
    """Raises InputError for an unknown set of tasks."""
    check_task_set(task_set)
    if not 1 <= count <= MOST_QUESTIONS:
        raise InputError(f"questions per task must be at least 1 and at most {MOST_QUESTIONS}, not {count}")
    return TASK_SETS[task_set](count, seed)


def is_answered(engine: Engine, question: Question, pruning: StudyPruning) -> bool:
    """Whether the greedy answer up to the end of sequence is exactly the right one. What goes wrong is not finished."""
    said = ""
    for piece in engine.stream(
        question.prompt, images=question.images, max_new_tokens=MAX_ANSWER_TOKENS, pruning=pruning
    ):
        said += piece.text
        if not question.answer.startswith(said.strip()):
            return False
    return said.strip() == question.answer
