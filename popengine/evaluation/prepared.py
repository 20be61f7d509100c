"""The methods of a comparison, prepared for a checkpoint."""

import argparse
from dataclasses import dataclass, replace

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.evaluation.calibration import calibration_for
from popengine.evaluation.comparison import Configuration, configurations
from popengine.evaluation.tasks import training_questions
from popengine.studies.by_name import Request, check_method, pruning_for
from popengine.studies.calibration import Calibration
from popengine.studies.resolve import StudyPruning
from popengine.studies.skipped_layers import names_layers
from weights.errors import InputError
from weights.output_file import check_output


@dataclass(frozen=True)
class Prepared:
    """Engines and calibrations by form of the weights, prunings by configuration."""

    engines: dict[str, Engine]
    calibrations: dict[str, Calibration | None]
    prunings: dict[Configuration, StudyPruning]


def check_methods(flags: argparse.Namespace) -> None:
    """Raise InputError for wrong methods or settings before anything is loaded."""
    for method in flags.methods:
        check_method(method)
    configurations(flags, mixture=True, pictures=True)
    if len(flags.weights) > 1 and (flags.calibration or flags.save_calibration):
        raise InputError("a saved calibration is of one form of weights; give one --weights, or --calibration-text")
    if flags.calibration_tasks is not None:
        training_questions(flags.calibration_tasks, 1)
    if flags.save_calibration is not None:
        check_output(flags.save_calibration)


def prepare(flags: argparse.Namespace, compile: bool, show_progress: bool) -> Prepared:
    """Load the checkpoint in every form, calibrate, and build every method's pruning, so that errors come first."""
    engines = {
        form: load(
            flags.ckpt, dtype=flags.dtype, device=flags.device, weights=form, compile=compile, progress=show_progress
        )
        for form in flags.weights
    }
    calibrations = {form: calibration_for(flags, own) for form, own in engines.items()}
    prunings = {}
    first = engines[flags.weights[0]]
    for one in configurations(flags, hasattr(first.model.config, "num_experts"), first.pictures.reads):
        own = engines[one.weights]
        request = Request(own.model, one.settings, calibrations[one.weights], flags.seed, own.resolve)
        pruning = pruning_for(one.method, request)
        if names_layers(one.settings.prefill_skip):     # a row names its layers, whatever file chose them
            skip = pruning.settings.prefill_skip
            one = replace(one, settings=replace(one.settings, prefill_skip=skip))
        prunings[one] = pruning
    return Prepared(engines, calibrations, prunings)
