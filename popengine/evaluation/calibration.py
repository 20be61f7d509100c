"""The calibration that a command's flags ask for: of a text, of tasks, or saved before.

Task-specific pruning is calibrated on its task (UNCURL, arXiv 2409.01483), and a model that reads pictures on pictures:
on questions of the training split, with pictures and answers.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from popengine.engine.engine import Engine
from popengine.evaluation.scoring import cut_windows, read_text
from popengine.evaluation.tasks import training_questions
from popengine.studies.calibration import Calibration, calibrate, calibrate_on, load_calibration, save_calibration
from weights.errors import InputError

WINDOW_TOKENS, WINDOWS = 128, 64
# Of every kind.
QUESTIONS = 10


def calibration_for(flags: argparse.Namespace, engine: Engine) -> Calibration | None:
    """Make or read the calibration that the flags ask for; None if they ask for none. Raises InputError for several."""
    text, tasks, saved = flags.calibration_text, flags.calibration_tasks, flags.calibration
    if tasks is not None and (text is not None or saved is not None):
        raise InputError("give one of --calibration-tasks, --calibration-text and --calibration")
    if text is not None and saved is not None:
        raise InputError("give --calibration-text or --calibration, not both")
    if flags.save_calibration is not None and text is None and tasks is None:
        raise InputError("--save-calibration needs --calibration-text")
    if saved is not None:
        return load_calibration(saved, engine.model)
    if text is None and tasks is None:
        return None
    made = calibration_of_text(engine, text) if tasks is None else calibration_of_tasks(engine, tasks)
    if flags.save_calibration is not None:
        save_calibration(made, engine.model, flags.save_calibration)
    return made


def calibration_of_text(engine: Engine, file: Path) -> Calibration:
    """Calibrate on windows of a text."""
    text = read_text(file, engine.tokenizer)
    count = min(WINDOWS, max(1, len(text.ids) // WINDOW_TOKENS))
    windows = cut_windows(text, engine.tokenizer, WINDOW_TOKENS // 2, WINDOW_TOKENS // 2, count)
    made_from = f"{text.name} ({text.digest}), {count} windows of {WINDOW_TOKENS} tokens"
    bar = tqdm(windows, desc="calibration", unit="window", disable=not engine.progress)
    return calibrate(engine.model, (window.ids for window in bar), made_from)


@torch.inference_mode()
def calibration_of_tasks(engine: Engine, task_set: str) -> Calibration:
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

    return calibrate_on(engine.model, texts(), made_from)
