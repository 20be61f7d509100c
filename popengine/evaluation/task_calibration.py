"""Calibration on the tasks of the small checkpoints: questions of the training split, with pictures and answers.

Task-specific pruning is calibrated on its task (UNCURL, arXiv 2409.01483), and a model that reads pictures on pictures.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from popengine.engine.engine import Engine
from popengine.evaluation.scoring import calibration_from
from popengine.evaluation.tasks import training_questions
from popengine.studies.calibration import Calibration, calibrate_on, save_calibration
from weights.errors import InputError

QUESTIONS = 10


def calibration_for(flags: argparse.Namespace, engine: Engine) -> Calibration | None:
    """Make or read the calibration that the flags ask for; None if they ask for none. Raises InputError for several."""
    if flags.calibration_tasks is None:
        return calibration_from(engine, flags.calibration_text, flags.calibration, flags.save_calibration)
    if flags.calibration_text is not None or flags.calibration is not None:
        raise InputError("give one of --calibration-tasks, --calibration-text and --calibration")
    return calibration_of_tasks(engine, flags.calibration_tasks, flags.save_calibration)


def calibration_of_tasks(engine: Engine, task_set: str, save_to: Path | None) -> Calibration:
    """Calibrate on ten questions of every kind. Raises InputError for pictures if the model's family is not LLaVA."""
    questions = training_questions(task_set, QUESTIONS)
    made_from = f"{len(questions)} questions and answers of the training split of the tasks {task_set}"

    def texts() -> Iterator[tuple[list[int], Tensor]]:
        for one in tqdm(questions, desc="calibration", unit="question", disable=not engine.progress):
            ids = engine.prompts.ids(one.prompt, images=one.images)
            ids += engine.tokenizer.encode(one.answer, add_special_tokens=False)
            tokens = torch.tensor([ids], device=engine.device)
            shown = engine.pictures.embed(tokens, None, engine.pictures.given(one.images))
            if shown.pictures is not None:
                raise InputError("calibration on pictures is implemented for LLaVA only, not for this model's family")
            yield list(engine.pictures.text_ids(ids)), shown.x

    with torch.inference_mode():
        made = calibrate_on(engine.model, texts(), made_from)
    if save_to is not None:
        save_calibration(made, engine.model, save_to)
    return made
