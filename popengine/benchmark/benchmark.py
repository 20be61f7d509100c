"""Measurements of popengine.bench: engines take turns in rounds, and figures are computed from their times.

Within a dtype every setting takes one turn per round, so that a slow minute of the machine affects all of them. A turn
is an untimed start, which allocates buffers and warms caches, and then one timed generation. The memory bandwidth is
measured in the same rounds. Compare figures of one run with each other, never with another run's.
"""

import argparse
import gc
import itertools
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from models.cost_model import bytes_per_token, cache_bytes
from popengine.benchmark.engines import (
    AbsentPeer,
    Contender,
    Generated,
    LlamaCppEngine,
    OwnEngine,
    TransformersEngine,
    llama_cpp_type,
)
from popengine.benchmark.prompt_work import prompt_work
from popengine.benchmark.shapes import write_random_checkpoint
from popengine.engine.distributed import ranks
from popengine.engine.engine import Engine
from popengine.engine.loading import DTYPES, choose_device, load
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import load_calibration
from popengine.studies.settings import DENSE, PruningSettings
from popengine.studies.skipped_layers import skips_layers
from weights.checkpoint import open_checkpoint
from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError
from weights.memory import available_memory, gigabytes, give_back

# Size in bytes of the array whose sum measures the memory bandwidth, far larger than any cache.
SUMMED_BYTES = 1 << 29
WARM_UP_STEPS = 4
PROFILED_STEPS = 16
# Settings in the rows of the JSON file.
SHOWN_SETTINGS = (
    "prune_ratio", "rule", "prefill_skip", "boundary_tokens",
    "visual_tokens", "visual_tokens_by", "visual_tokens_layer", "input_sparsity", "input_score",
)

PROMPT = (
    "The harbour was built when the river still ran deep enough for ships. Stone by stone the townspeople laid a wall "
    "against the northern wind, and behind it grew a market, two churches and a school. Grain came down from the "
    "valley in flat boats and left on larger ones; salt, iron and letters came back. Then the river moved. In three "
    "winters its mouth silted up, and the ships that had waited outside for the tide went elsewhere. What is left is "
    "the wall, which children walk along in summer, and a habit of looking at the weather before anything is decided. "
)


# The content of pictures does not affect their time.
PICTURE = Image.linear_gradient("L").convert("RGB")


@dataclass
class Entry:
    """One row of the table: a contender, its known costs, and the results of its turns so far.

    held_bytes  memory that remains after loading and the first turn, without buffers
    turn_bytes  the most memory that one turn held beyond that
    process     the one that holds the contender, a number or "self"
    between_ranks  share of a step spent in communication between ranks; None with one process
    work        multiplications of one prompt: with weights, in attention (see prompt_work)
    """

    contender: Contender
    mode: str | None
    settings: PruningSettings | None
    weight_bytes_per_token: int | None = None
    work: tuple[int, int] | None = None
    process: str = "self"
    held_bytes: int | None = None
    turn_bytes: int | None = None
    between_ranks: float | None = None
    first_use_s: float = 0.0
    turns: list[Generated] = field(default_factory=list)


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the benchmark of the flags and return its results as JSON. folder: for temporary checkpoints"""
    device = choose_device(flags.device)
    if flags.shape:
        checkpoint: str | Path = write_random_checkpoint(flags.shape, folder)
    else:
        checkpoint = flags.ckpt or default_checkpoint()
    result: dict[str, Any] = header(flags, checkpoint, device)
    for dtype in flags.dtype:
        result["dtypes"].append(measure_dtype(flags, checkpoint, dtype, device, folder))
        gc.collect()
    return result


def header(flags: argparse.Namespace, checkpoint: str | Path, device: torch.device) -> dict[str, Any]:
    """Return machine, versions, command and settings of the benchmark."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ["torch", *(["transformers"] if "transformers" in flags.peers else [])]
    packages += ["llama_cpp_python"] if "llama.cpp" in flags.peers else []
    return {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "card": card, "system": platform.platform()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "command": ["python", "-m", "popengine.bench", *flags.words],
        "model": flags.shape or Path(checkpoint).name,
        "random_weights": bool(flags.shape),
        "ranks": ranks().count,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": flags.prompt_tokens,
        "new_tokens": flags.new_tokens,
        "batch": flags.batch,
        "rounds": flags.rounds,
        "pruning": asdict(settings_of(flags)()),
        "dtypes": [],
    }


def processor() -> str:
    """Return the processor's name and its relevant instruction sets."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(flags)})" if flags else platform.machine()


def version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure_dtype(
    flags: argparse.Namespace, checkpoint: str | Path, dtype: str, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Measure every engine and setting in one dtype."""
    absent: dict[str, str] = {}
    entries: list[Entry] = []
    note = Progress(f"{dtype}: ")
    prompts: list[list[int]] = []
    weights = 0
    modes = ([] if flags.compile_only else [False]) + ([True] if flags.compile or flags.compile_only else [])
    # Packed products need half precision.
    forms = [form for form in flags.weights if form in ("auto", "plain") or dtype != "float32"]
    for form, compiled in itertools.product(forms, modes):
        mode = "compiled" if compiled else "eager"
        note(f"loading popengine, {form}, {mode}")
        before = held_bytes(device)
        engine = load_engine(checkpoint, dtype, device, form, compiled, absent)
        if engine is None:
            continue
        if len(forms) > 1 or engine.weights != "plain":
            mode = f"{form} {mode}"
        prompts = prompts or make_prompts(flags, engine)
        weights, _ = prompt_work(engine.model, engine.resolve(DENSE), tokens=1)
        own = own_entries(flags, engine, mode, prompts)
        first_turns(own, prompts, flags.new_tokens, before, device, note)
        entries += own
    if not entries:
        raise InputError(f"nothing to time: {'; '.join(absent.values())}")
    for peer, form in itertools.product(flags.peers, forms):
        if peer == "transformers" and form != forms[0]:
            continue                            # it has only plain weights
        note(f"loading {peer}")
        before = held_bytes(device)
        try:
            entry = peer_entry(peer, flags, checkpoint, dtype, form, device, folder, weights)
            first_turns([entry], prompts, flags.new_tokens, before, device, note)
        except AbsentPeer as error:
            absent[peer] = str(error)
        else:
            entries.append(entry)

    array = torch.ones(SUMMED_BYTES // 4, device=device)
    bandwidths = []
    for number in range(flags.rounds):
        note(f"round {number + 1} of {flags.rounds}")
        # Alternate the order, so that neighbours are not always the same.
        for entry in entries if number % 2 == 0 else reversed(entries):
            entry.turns.append(turn(entry, prompts, flags.new_tokens, device))
        bandwidths.append(bandwidth(array))
    del array
    if ranks().count > 1:
        for entry in entries:
            if isinstance(entry.contender, OwnEngine):
                steps = min(flags.new_tokens - 1, PROFILED_STEPS)
                entry.between_ranks = entry.contender.share_between_ranks(prompts, flags.new_tokens, steps)
    note("")
    reads = spread(bandwidths)
    return {
        "dtype": dtype,
        "bandwidth_gb_per_s": reads,
        "absent": absent,
        "rows": rows(entries, reads["median"]),
    }


def load_engine(
    checkpoint: str | Path, dtype: str, device: torch.device, form: str, compiled: bool, absent: dict[str, str]
) -> Engine | None:
    """Load our engine; None and a reason in `absent` if compiling was asked for and does not work."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        engine = load(checkpoint, dtype=dtype, device=str(device), weights=form, compile=compiled)
    if compiled and engine.compiled is None:
        absent["popengine, compiled"] = str(caught[-1].message)
        return None
    return engine


def make_prompts(flags: argparse.Namespace, engine: Engine) -> list[list[int]]:
    """Make prompts of token ids: of a text, repeated until it is long enough, or random ids for random weights.

    Each further sequence of a batch begins one token later. Raises InputError if context or memory are too small.
    """
    if flags.prompt_tokens + flags.new_tokens > engine.max_seq_len:
        raise InputError(
            f"{flags.prompt_tokens} + {flags.new_tokens} tokens are more than the context of {engine.max_seq_len}"
        )
    cached, free = cache_bytes(engine.model, flags.batch, flags.prompt_tokens), available_memory(engine.device)
    if free is not None and cached > free:
        raise InputError(f"{flags.batch} sequences need a cache of {gigabytes(cached)}, and {gigabytes(free)} is free")
    if flags.pictures:
        return picture_prompts(flags, engine)
    count = flags.prompt_tokens + flags.batch - 1
    if flags.shape:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(engine.model.config.vocab_size, (count,), generator=generator).tolist()
    else:
        ids = engine.prompts.ids(PROMPT, raw=True)
        ids = (ids * -(-count // len(ids)))[:count]
    return [ids[first : first + flags.prompt_tokens] for first in range(flags.batch)]


def picture_prompts(flags: argparse.Namespace, engine: Engine) -> list[list[int]]:
    """Make prompts with pictures at the front; their tokens count as prompt tokens. Raises InputError if none fits."""
    text = engine.pictures.plain_text(PROMPT, flags.pictures)
    ids = engine.prompts.ids(text, raw=True, images=[PICTURE] * flags.pictures)
    first = next(place for place in range(len(ids)) if not engine.pictures.image_tokens([ids[place:]]))
    before, after = ids[:first], ids[first:]
    left = flags.prompt_tokens - len(before)
    if left < 1:
        raise InputError(f"{flags.pictures} pictures have {len(before)} tokens: give a prompt of more")
    after = after * -(-(left + flags.batch) // len(after))
    return [before + after[first : first + left] for first in range(flags.batch)]


def settings_of(flags: argparse.Namespace) -> Callable[..., PruningSettings]:
    """Build settings from changes: of the recommended ones, or of the paper's."""
    return PruningSettings.paper if flags.paper else PruningSettings


def own_entries(flags: argparse.Namespace, engine: Engine, mode: str, prompts: list[list[int]]) -> list[Entry]:
    """Make an entry for every setting and method that the flags ask for."""
    settings = [
        settings_of(flags)(
            prune_ratio=ratio, rule=rule, prefill_skip=skip, boundary_tokens=flags.boundary_tokens, leave_out=left_out,
            visual_tokens=tokens, visual_tokens_by=flags.visual_tokens_by,
            visual_tokens_layer=flags.visual_tokens_layer, input_sparsity=inputs, input_score=flags.input_score,
        )
        for left_out in dict.fromkeys(["", *flags.leave_out])
        for tokens in dict.fromkeys(["all", *flags.visual_tokens])
        for skip in dict.fromkeys([0.0, *flags.prefill_skip])
        for ratio in dict.fromkeys([0.0, *flags.prune_ratio])
        for rule in dict.fromkeys(flags.rule if ratio else ["pop"])
        for inputs in dict.fromkeys(["", *flags.input_sparsity] if rule == "pop" else [""])
    ]
    wanted = []
    for one in settings:
        pruning = engine.resolve(one)
        name = "POP" if one.rule == "pop" else one.rule
        what = [f"{name} {one.prune_ratio:g}" if one.prune_ratio else "dense"]
        if pruning.skipped:
            what.append(f"{len(pruning.skipped)} layers skipped")
        if one.input_sparsity:
            what.append(f"inputs {one.input_sparsity} off by {one.input_score}")
        if one.leave_out:
            what.append(f"without {one.leave_out}")
        if pruning.thin_from is not None:
            what.append(f"visual tokens {one.visual_tokens} by {one.visual_tokens_by}")
        wanted.append((", ".join(what), pruning))
    calibration = load_calibration(flags.calibration, engine.model) if flags.calibration else None
    for method, ratio in itertools.product(flags.method, filter(None, dict.fromkeys(flags.prune_ratio))):
        request = Request(engine.model, settings_of(flags)(prune_ratio=ratio), calibration, resolve=engine.resolve)
        wanted.append((f"{method} {ratio:g}", pruning_for(method, request)))
    images, entries = [PICTURE] * flags.pictures, []
    spans = engine.pictures.given(images, prompts[:1]).stretches
    for what_it_is, pruning in wanted:
        read = bytes_per_token(engine.model, pruning, flags.batch)
        own = OwnEngine(f"popengine {mode}, {what_it_is}", engine, pruning, images)
        entry = Entry(own, mode, pruning.settings, read)
        entry.work = prompt_work(engine.model, pruning, flags.prompt_tokens, pruning.dropped_tokens(spans))
        entries.append(entry)
    return entries


def peer_entry(
    name: str,
    flags: argparse.Namespace,
    checkpoint: str | Path,
    dtype: str,
    form: str,
    device: torch.device,
    folder: Path,
    weights: int,
) -> Entry:
    """Load another engine. weights: number that a token multiplies. Raises AbsentPeer if it cannot run."""
    with open_checkpoint(checkpoint) as opened:
        path = opened.path                      # the folder of a Hub id
    if name == "transformers":
        plain = weights * DTYPES[dtype].itemsize                    # its weights are always plain
        return Entry(TransformersEngine(path, DTYPES[dtype], device), None, None, weight_bytes_per_token=plain)
    if device.type != "cpu":
        raise AbsentPeer("it is compared on the CPU only")
    if flags.batch > 1:
        raise AbsentPeer("it is compared on one sequence only")
    context, kind = flags.prompt_tokens + flags.new_tokens, llama_cpp_type(path, form, dtype)
    peer = LlamaCppEngine(path, kind, context, torch.get_num_threads(), folder)
    return Entry(peer, None, None, weight_bytes_per_token=peer.bytes_per_token, process=str(peer.process.pid))


def first_turns(
    entries: list[Entry],
    prompts: list[list[int]],
    new_tokens: int,
    before: int | None,
    device: torch.device,
    note: "Progress",
) -> None:
    """Run each entry once, which also compiles, and measure the memory that remains."""
    for entry in entries:
        note(f"starting {entry.contender.name}")
        entry.first_use_s = entry.contender.generate(prompts, new_tokens, WARM_UP_STEPS).compile_s
        entry.contender.drop_buffers()
    for entry in entries:
        after = held_bytes(device, entry.process)
        start = before if entry.process == "self" else 0
        entry.held_bytes = None if start is None or after is None else after - start


def turn(entry: Entry, prompts: list[list[int]], new_tokens: int, device: torch.device) -> Generated:
    """Run one turn of an entry: an untimed start, then one timed generation."""
    before = start_of_peak(device, entry.process)
    entry.contender.generate(prompts, new_tokens, WARM_UP_STEPS)
    generated = entry.contender.generate(prompts, new_tokens)
    peak = peak_bytes(device, entry.process)
    entry.contender.drop_buffers()
    if before is not None and peak is not None:
        entry.turn_bytes = max(entry.turn_bytes or 0, peak - before)
    return generated


def bandwidth(array: torch.Tensor) -> float:
    """Measure GB/s of a sum over the array by all threads: the best of five, as no disturbance makes a sum faster."""
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        array.sum().item()
        best = min(best, time.perf_counter() - began)
    return array.numel() * array.element_size() / best / 1e9


# Memory of one setting in a process with several: the rise of the resident set (on CUDA: of the allocator). Linux keeps
# a high-water mark that can be reset; on other systems the table has no figure.


def held_bytes(device: torch.device, process: str = "self") -> int | None:
    """Return the memory that a process holds now, in bytes; None if the system does not report it."""
    if process != "self":
        return resident("VmRSS", process)
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    give_back()                         # freed memory of an earlier engine would hide this one's
    return resident("VmRSS", process)


def start_of_peak(device: torch.device, process: str = "self") -> int | None:
    """Reset the peak for the next `peak_bytes`, and return the memory held now; None if it cannot be reset."""
    before = held_bytes(device, process)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return before
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return None
    return before


def peak_bytes(device: torch.device, process: str = "self") -> int | None:
    """Return the peak memory since `start_of_peak`, in bytes; None if the system does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM", process)


def resident(what: str, process: str) -> int | None:
    """Read a field of a process' status in bytes; None if there is no such file or field."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":")), None)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "first_quartile": values[0], "third_quartile": values[0]}
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "first_quartile": first, "third_quartile": third}


def rows(entries: list[Entry], bandwidth_gb_per_s: float) -> list[dict[str, Any]]:
    """Compute the rows of the table: medians over the rounds, and figures that compare rows."""
    by_name = {entry.contender.name: row(entry) for entry in entries}
    lines = list(by_name.values())
    dense = {line["mode"]: line for line in lines if line["prune_ratio"] == 0 and not line["skips"]}
    others = {line["engine"]: line for line in lines if line["mode"] is None}
    reference = lines[0]
    for entry, line in zip(entries, lines, strict=True):
        own = dense.get(line["mode"], reference)
        step_ms = line["decode_ms_per_token"]["median"]
        if line["mode"] is not None:
            line["prompt"] = prompt_figures(own, line)
            saved = own["decode_ms_per_token"]["median"] - step_ms
            line["speedup"] = own["decode_ms_per_token"]["median"] / step_ms
            line["ideal_speedup"] = own["weight_bytes_per_token"] / line["weight_bytes_per_token"]
            if line["partition_ms"] and saved > 0:
                line["break_even_tokens"] = math.ceil(line["partition_ms"] / saved)
            line["step_time_over"] = {
                name: step_ms / other["decode_ms_per_token"]["median"] for name, other in others.items()
            }
            line["prefill_time_over"] = {
                name: (line["prefill_ms"]["median"] + line["partition_ms"]) / other["prefill_ms"]["median"]
                for name, other in others.items()
            }
            line["answer_time_over"] = {name: line["answer_s"] / other["answer_s"] for name, other in others.items()}
        line["gb_per_s"] = line["weight_bytes_per_token"] / step_ms / 1e6
        line["bandwidth_share"] = line["gb_per_s"] / bandwidth_gb_per_s
        if not line["prune_ratio"]:
            pairs = zip(entry.turns[0].tokens, entries[0].turns[0].tokens, strict=True)
            line["tokens_as_first_row"] = next(
                (index for index, (own_token, token) in enumerate(pairs) if own_token != token),
                len(entry.turns[0].tokens),
            )
    return lines


def prompt_figures(dense: dict[str, Any], line: dict[str, Any]) -> dict[str, float] | None:
    """Compute the speed-up of a prompt over the dense model, and the ideal one by arithmetic, without partitions."""
    if line["prompt_work"] is None or dense["prompt_work"] is None:
        return None
    (linear, attention), (own_linear, own_attention) = dense["prompt_work"], line["prompt_work"]
    return {
        "speedup": dense["prefill_ms"]["median"] / line["prefill_ms"]["median"],
        "ideal_speedup": (linear + attention) / (own_linear + own_attention),
        "ideal_linear": linear / own_linear,
        "ideal_attention": attention / own_attention,
    }


def row(entry: Entry) -> dict[str, Any]:
    """Compute the figures of one entry alone; figures that need other entries are None at first."""
    parts = {
        name: statistics.median(getattr(generated, name) for generated in entry.turns)
        for name in ("partition_ms", "scores_ms", "sort_ms", "copy_ms")
    }
    own = entry.settings is not None
    peak = None if entry.held_bytes is None or entry.turn_bytes is None else entry.held_bytes + entry.turn_bytes
    return {
        "engine": entry.contender.name,
        "mode": entry.mode,
        **{name: getattr(entry.settings, name, None) for name in SHOWN_SETTINGS},
        "skips": entry.settings is not None and (
            skips_layers(entry.settings.prefill_skip) or entry.settings.visual_tokens != "all"
        ),
        "prompt_work": entry.work,
        "prompt": None,
        "prefill_ms": spread([generated.prefill_ms for generated in entry.turns]),
        "between_ranks": entry.between_ranks,
        **(parts if own else dict.fromkeys(parts)),
        "decode_ms_per_token": spread([step for generated in entry.turns for step in generated.step_ms]),
        "answer_s": statistics.median(generated.answer_s for generated in entry.turns),
        "weight_bytes_per_token": entry.weight_bytes_per_token,
        "gb_per_s": None,
        "bandwidth_share": None,
        "speedup": None,
        "ideal_speedup": None,
        "step_time_over": {},
        "prefill_time_over": {},
        "answer_time_over": {},
        "peak_memory_bytes": peak,
        "break_even_tokens": None,
        "load_s": entry.contender.load_s,
        "first_use_s": entry.first_use_s,
        "tokens_as_first_row": None,
    }


class Progress:
    """One line on stderr with the current measurement; nothing if stderr is no terminal."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.shown = prefix, sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[K{self.prefix + text if text else ''}", end="", file=sys.stderr, flush=True)
