"""The command: python -m popengine.score --ckpt ... --text FILE --method pop --prune-ratio 0.2

Computes the perplexity of a text through prefill and decode steps (popengine/evaluation/scoring.py gives the reason).
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from popengine.command_line.flags import add_checkpoint_flag, add_machine_flags, add_scoring_flags
from popengine.command_line.parser import OneLineParser
from popengine.command_line.setting_flags import add_setting_flags, pruning_settings
from popengine.command_line.start import run_as_command, start_pytorch
from weights.output_file import check_output


def parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    flags = OneLineParser(
        "score", "Perplexity of a text through prefill and decode steps, under a pruning method.",
        "score --text FILE --method pop --prune-ratio 0.2",
        "--text --method --prompt-tokens --score-tokens --windows --prune-ratio --dtype --weights --json",
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to score, UTF-8")
    flags.add_argument(
        "--method", default="pop", metavar="M", help="pop, frozen (GRIFFIN), ...; an unknown name lists all"
    )
    flags.add_argument("--step-by-step", action="store_true", help="score one token per step, instead of all at once")
    add_scoring_flags(flags)
    add_setting_flags(flags)
    add_machine_flags(flags)
    output = flags.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `python -m popengine.score` and the console script `popengine-score`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    """Score the text, and print the result."""
    settings = pruning_settings(flags)
    start_pytorch(flags)
    from popengine.engine import loading, results
    from popengine.evaluation import calibration as calibrations
    from popengine.evaluation import scoring
    from popengine.studies import by_name, report

    by_name.check_method(flags.method)
    if flags.save_calibration is not None:
        check_output(flags.save_calibration)
    progress = sys.stderr.isatty() and not flags.quiet
    engine = loading.load(
        flags.ckpt, dtype=flags.dtype, device=flags.device, weights=flags.weights, compile=False, progress=progress
    )
    scoring.check_context(engine, flags.prompt_tokens, flags.score_tokens)
    text = scoring.read_text(flags.text, engine.tokenizer)
    windows = scoring.cut_windows(text, engine.tokenizer, flags.prompt_tokens, flags.score_tokens, flags.windows)
    calibration = calibrations.calibration_for(flags, engine)
    request = by_name.Request(engine.model, settings, calibration, flags.seed, engine.resolve)
    pruning = by_name.pruning_for(flags.method, request)
    summary = scoring.score_text(engine, windows, pruning, flags.step_by_step, flags.method if progress else None)
    read, dense = scoring.read_per_token(engine, pruning)
    if flags.json:
        print(json.dumps({
            "method": flags.method,
            **{name: None if math.isnan(value) else value for name, value in asdict(summary).items()},
            "pruning": results.pruning_report(pruning),
            "weight_bytes_per_token": read,
            "weight_share": read / dense,
            "text": {"name": text.name, "digest": text.digest, "tokens": len(text.ids)},
            "prompt_tokens": flags.prompt_tokens,
            "score_tokens": flags.score_tokens,
            "evaluation": "step by step" if flags.step_by_step else "parallel",
            "calibration": None if calibration is None else calibration.made_from,
            "seed": flags.seed,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": str(engine.device),
        }))
        return
    by_rule = flags.method == "pop" or flags.method == settings.rule
    rule = results.rule_words(pruning.settings) if by_rule else f"method {flags.method}"
    print(f"pruning     {rule}, ratio {pruning.ratio:.3g}{f': {pruning.why_dense}' if pruning.why_dense else ''}")
    if words := report.input_words(pruning.settings):
        print(f"inputs      {words}")
    print(f"perplexity  {summary.perplexity:.3f}")
    loss = f"{summary.mean_loss:.4f} +- {summary.standard_error:.4f}"
    print(f"loss        {loss} nats per token, {summary.windows} windows")
    print(f"dense model {summary.agreement:.1%} same top token, KL {summary.divergence:.4f} nats")
    print(f"weights     {read / 1e6:.0f} MB read per token, {read / dense:.1%} of dense")


if __name__ == "__main__":
    main()
