"""The command: python -m popengine.generate --ckpt ... --prompt ...

Text streams to stdout as it is made, statistics go to stderr; with --json one object on stdout takes the place of
both. Bad input is one line on stderr and exit status 2.
"""

import argparse
import json
import math
import sys
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from popengine.command import (
    OneLineParser,
    add_checkpoint_flag,
    add_machine_flags,
    add_pruning_flags,
    pruning_settings,
    run_as_command,
)
from weights.errors import InputError

# PyTorch takes seconds to import: the engine is imported in run(), after the flags have been understood.
if TYPE_CHECKING:
    from popengine.engine import Engine, Piece, Statistics


def parser() -> argparse.ArgumentParser:
    flags = OneLineParser(
        prog="popengine-generate",
        description="Generate text with Partition-guided Online Pruning (POP, arXiv 2602.06822).",
        allow_abbrev=False,
    )
    add_checkpoint_flag(flags)
    flags.add_argument("--prompt", required=True, metavar="TEXT|-", help="the prompt; - reads it from standard input")
    flags.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image the prompt is about; may be repeated"
    )
    flags.add_argument("-n", "--max-new-tokens", type=int, default=128, metavar="N")
    sampling = flags.add_argument_group("sampling")
    sampling.add_argument("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest P of probability")
    sampling.add_argument("--seed", type=int, metavar="N", help="makes sampling reproducible")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end of the sequence")
    prompting = flags.add_argument_group("prompt")
    prompting.add_argument("--system-prompt", metavar="TEXT")
    prompting.add_argument("--raw", action="store_true", help="the prompt as it stands, without the chat template")
    add_pruning_flags(flags)
    machine = add_machine_flags(flags)
    machine.add_argument("--max-seq-len", type=int, metavar="N", help="a shorter context than the model's")
    machine.add_argument("--compile", action="store_true", help="compile the decode step (slow to start, fast to run)")
    output = flags.add_argument_group("output")
    output.add_argument("--quiet", action="store_true", help="neither statistics nor progress bars")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text and statistics")
    return flags


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry of `python -m popengine.generate` and of the console script `popengine-generate`."""
    run_as_command(run, parser(), arguments)


def run(flags: argparse.Namespace) -> None:
    prompt = read_prompt(flags.prompt)
    from popengine.engine import load
    from popengine.sampling import Sampling

    pruning = pruning_settings(flags)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = load(
            flags.ckpt,
            dtype=flags.dtype,
            device=flags.device,
            max_seq_len=flags.max_seq_len,
            compile=flags.compile,
            progress=sys.stderr.isatty() and not flags.quiet,
        )
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    for field in engine.unknown_fields:
        print(f"warning: config.json has a field that popengine does not know and ignores: {field}", file=sys.stderr)
    pieces = engine.stream(
        prompt,
        images=flags.image,
        max_new_tokens=flags.max_new_tokens,
        pruning=pruning,
        sampling=sampling,
        raw=flags.raw,
        system_prompt=flags.system_prompt,
        ignore_eos=flags.ignore_eos,
    )
    if flags.json:
        print(json.dumps(report(engine, list(pieces)), ensure_ascii=False))
        return
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print(flush=True)
    if not flags.quiet:
        print_statistics(engine, piece)


def read_prompt(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8 (at byte {error.start})") from None


def report(engine: "Engine", pieces: "list[Piece]") -> dict[str, Any]:
    """The object that --json prints."""
    last = pieces[-1]
    statistics = last.statistics
    assert statistics is not None
    pruning, regions = statistics.pruning, statistics.regions
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [piece.token_id for piece in pieces if piece.token_id is not None],
        "prompt_token_ids": last.prompt_token_ids,
        "image_tokens": statistics.image_tokens,
        "finish_reason": last.finish_reason,
        "pruning": {
            "ratio": pruning.ratio,
            "ffn_ratio": pruning.ffn_ratio,
            "candidate_width": pruning.candidate_width,
            "head_ratio": pruning.head_ratio,
            "prefill": pruning.prefill,
            "scored_tokens": pruning.scored_tokens,
            "retained": regions.retained,
            "candidate": regions.candidate,
            "pruned": regions.pruned,
            "picked": regions.picked,
        },
        "timing": {
            "load_s": engine.load_s,
            "image_ms": statistics.image_ms,
            "prefill_ms": statistics.prefill_ms,
            "partition_ms": statistics.partition_ms,
            "decode_ms_per_token": or_null(statistics.decode_ms_per_token),
            "decode_tokens_per_s": or_null(statistics.decode_tokens_per_s),
            "compile_s": statistics.compile_s,
        },
        "experts": [asdict(layer) for layer in statistics.experts],
        "weight_bytes_per_token": statistics.weight_bytes_per_token,
        "dense_weight_bytes_per_token": statistics.dense_weight_bytes_per_token,
        "peak_memory_bytes": statistics.peak_memory_bytes,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
    }


def or_null(value: float) -> float | None:
    """JSON has no NaN; a run of one token has no decode step to time."""
    return None if math.isnan(value) else value


def print_statistics(engine: "Engine", last: "Piece") -> None:
    statistics = last.statistics
    assert statistics is not None
    ended = {"stop": "end of sequence", "length": "as many as asked for"}[last.finish_reason or "length"]
    regions, share = statistics.regions, statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
    prompt = f"{statistics.prompt_tokens} tokens"
    if statistics.image_tokens:
        text_tokens = statistics.prompt_tokens - statistics.image_tokens
        prompt += f" ({statistics.image_tokens} of images, {text_tokens} of text): images {statistics.image_ms:.0f} ms"
    compiled = f"; compiled before that in {statistics.compile_s:.1f} s" if statistics.compile_s else ""
    lines = [
        f"prompt    {prompt}{',' if statistics.image_tokens else ':'} prefill {statistics.prefill_ms:.0f} ms, "
        f"partition {statistics.partition_ms:.0f} ms",
        f"decode    {statistics.new_tokens} tokens ({ended}): {statistics.decode_ms_per_token:.1f} ms/token, "
        f"{statistics.decode_tokens_per_s:.1f} tokens/s{compiled}",
        f"channels  {regions.channels} per FFN: {regions.retained} retained, {regions.candidate} candidate "
        f"({regions.picked} picked per step), {regions.pruned} pruned",
        f"weights   {megabytes(statistics.weight_bytes_per_token)} read per token, {share:.1%} of dense "
        f"({str(engine.dtype).removeprefix('torch.')}, {engine.device})",
        f"memory    {megabytes(statistics.peak_memory_bytes)} at peak; loaded in {engine.load_s:.1f} s",
    ]
    if statistics.experts:
        lines.insert(3, describe_experts(statistics))
    print("", *lines, sep="\n", file=sys.stderr)


def describe_experts(statistics: "Statistics") -> str:
    """How the experts of all layers fared, in one line."""
    layers, pruning = statistics.experts, statistics.pruning
    unseen = sum(tokens < pruning.min_tokens for layer in layers for tokens in layer.prompt_tokens)
    used = sum(picks > 0 for layer in layers for picks in layer.picks)
    fate = "cut by their weights alone" if pruning.unseen_experts == "weights" else "left dense"
    return (
        f"experts   {sum(len(layer.picks) for layer in layers)} in {len(layers)} layers: {unseen} unseen in the prompt"
        f"{f' ({fate})' if unseen and pruning.ffn_ratio > 0 else ''}, {used} used in decode"
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
