"""LM-Evaluation-Harness with this engine: python -m popengine.harness --model popengine --model_args ckpt=DIR,...

The arguments are those of `lm_eval`; importing this module registers the model name `popengine`. Needs the extra
`lm-eval`. model_args are ckpt, method, calibration (a saved file), seed, dtype, weights, device, max_length, paper
(True: the paper's values for settings that are not given) and every field of PruningSettings.

Requests are answered so that they measure online pruning:

loglikelihood          prefill computes the context and makes the partition; decode steps (evaluated in parallel) score
                       the continuation. One forward pass over both, as in other models, would never decode.
loglikelihood_rolling  a text has no prompt: the first half of every window serves as one and is scored by the dense
                       model, decode steps score the second half. `popengine.score` reports only the second half.
generate_until         prefill and decode steps in batches of --batch_size, up to a stop string. One partition serves a
                       batch, as everywhere in this engine; with --batch_size 1 every prompt has its own.
"""

import sys
from argparse import Namespace
from itertools import pairwise
from typing import NoReturn

from popengine.command_line.parser import OneLineParser
from popengine.command_line.start import run_as_command
from popengine.evaluation.harness_model import PopengineLM as PopengineLM
from weights.errors import InputError

# Flags of lm_eval whose values are paths, or are compared by the model.
OF_PATHS = ("--model_args", "-a", "--output_path", "-o", "--include_path")


def main() -> NoReturn:
    """Run lm_eval's command line, with errors in one line."""
    parser = OneLineParser("harness", "", "", "")
    # Paths may differ between machines; the model compares --model_args.
    parser.set_defaults(asked=[word for flag, word in pairwise(sys.argv) if flag not in OF_PATHS])
    run_as_command(run, parser, [])


def run(_: Namespace) -> None:
    """Run lm_eval. Raises InputError for its errors."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:         # lm_eval raises it for unknown tasks and flags
        raise InputError(str(error)) from None


if __name__ == "__main__":
    main()
