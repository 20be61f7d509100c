"""Questions with exact answers, generated and not teacher-forced: what a pruned model still gets right.

They are the synthetic tasks that the small checkpoints of this project have learnt (text_tasks, picture_tasks), asked
from their held-out splits. Each question is a prompt of its own, with a partition of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from models.pruning.resolve import Pruning
from popengine.engine import Engine
from popengine.measure.picture_tasks import KINDS, picture_questions
from popengine.measure.text_tasks import TASKS, held_out_prompts
from popengine.pictures.images import ImageSource
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
    """`count` of every text task."""
    return [
        Question(task, one.prompt, one.answer)
        for task in TASKS
        for one in held_out_prompts(task, count, seed=seed)
    ]


def questions_about_pictures(count: int, seed: int) -> list[Question]:
    """`count` of every kind."""
    asked = picture_questions(count * len(KINDS), seed)
    return [Question(one.kind, one.question, one.answer, (one.picture(),)) for one in asked]


TASK_SETS: dict[str, Callable[[int, int], list[Question]]] = {
    "text": text_questions,
    "pictures": questions_about_pictures,
}


def questions_for(task_set: str, count: int, seed: int) -> list[Question]:
    """Raises InputError for an unknown set of tasks."""
    if task_set not in TASK_SETS:
        raise InputError(f"unknown tasks {task_set!r}; there are {', '.join(TASK_SETS)}")
    if not 1 <= count <= MOST_QUESTIONS:
        raise InputError(f"questions per task must be at least 1 and at most {MOST_QUESTIONS}, not {count}")
    return TASK_SETS[task_set](count, seed)


def is_answered(engine: Engine, question: Question, pruning: Pruning) -> bool:
    """Whether the greedy answer up to the end of sequence is exactly the right one."""
    made = engine.generate(
        question.prompt, images=question.images, max_new_tokens=MAX_ANSWER_TOKENS, pruning=pruning
    )
    return made[0].text.strip() == question.answer
