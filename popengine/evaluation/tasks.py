"""Questions with exact answers, generated and not teacher-forced, to measure what a pruned model still answers right.

They are the synthetic tasks that the small checkpoints of this project have learnt (text_tasks, picture_tasks), from
their held-out splits. Each question is a separate prompt with its own partition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from popengine.engine.engine import Engine
from popengine.evaluation.picture_tasks import KINDS, picture_questions
from popengine.evaluation.text_tasks import LEARNT, held_out_prompts, make_prompt
from popengine.images.images import ImageSource
from popengine.studies.resolve import StudyPruning
from weights.errors import InputError

MAX_ANSWER_TOKENS = 64
# Per kind; all questions are made before the first is asked.
MOST_QUESTIONS = 10_000


@dataclass(frozen=True)
class Question:
    """One prompt, its images if any, and the only right answer. task: the kind of question"""

    task: str
    prompt: str
    answer: str
    images: tuple[ImageSource, ...] = ()


def text_questions(count: int, seed: int) -> list[Question]:
    """Make `count` questions of every text task that was learnt."""
    return [
        Question(task, one.prompt, one.answer)
        for task in LEARNT
        for one in held_out_prompts(task, count, seed=seed)
    ]


def questions_about_pictures(count: int, seed: int, split: str = "held-out") -> list[Question]:
    """Make `count` questions about pictures of every kind."""
    asked = picture_questions(count * len(KINDS), seed, split)
    return [Question(one.kind, one.question, one.answer, (one.picture(),)) for one in asked]


def training_questions(task_set: str, count: int, seed: int = 0) -> list[Question]:
    """Make `count` questions of every kind from the training split, which methods may learn from.

    Raises InputError for an unknown set of tasks.
    """
    check_task_set(task_set)
    if task_set == "pictures":
        return questions_about_pictures(count, seed, "train")
    made = (make_prompt(task, Random(f"{task} {seed} {index}"), 1, False) for task in LEARNT for index in range(count))
    return [Question(one.task, one.prompt, one.answer) for one in made]


TASK_SETS: dict[str, Callable[[int, int], list[Question]]] = {
    "text": text_questions,
    "pictures": questions_about_pictures,
}


def check_task_set(task_set: str) -> None:
    """Raise InputError for an unknown set of tasks."""
    if task_set not in TASK_SETS:
        raise InputError(f"unknown tasks {task_set!r}; there are {', '.join(TASK_SETS)}")


def questions_for(task_set: str, count: int, seed: int) -> list[Question]:
    """Make `count` questions per task of a set. Raises InputError for an unknown set or a count out of bounds."""
    check_task_set(task_set)
    if not 1 <= count <= MOST_QUESTIONS:
        raise InputError(f"questions per task must be at least 1 and at most {MOST_QUESTIONS}, not {count}")
    return TASK_SETS[task_set](count, seed)


def is_answered(engine: Engine, question: Question, pruning: StudyPruning) -> bool:
    """Return True if the greedy answer up to the end of sequence is exactly right. Wrong answers are cut short."""
    said = ""
    for piece in engine.stream(
        question.prompt, images=question.images, max_new_tokens=MAX_ANSWER_TOKENS, pruning=pruning
    ):
        said += piece.text
        if not question.answer.startswith(said.strip()):
            return False
    return said.strip() == question.answer
