"""Statistics of a run, and the report that commands print from them."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from models.cost_model import bytes_per_token, ffn_sizes
from models.pruning.experts import PartitionedExperts
from models.state import DecodeState
from popengine.engine.run import Run
from popengine.studies import report as of_studies
from popengine.studies.report import rule_words as rule_words
from popengine.studies.resolve import StudyPruning
from weights.memory import peak_memory_bytes


@dataclass(frozen=True)
class Regions:
    """Channels of one feed-forward network in the first layer; all layers of a uniform model have the same sizes."""

    channels: int
    retained: int
    candidate: int
    pruned: int
    picked: int


@dataclass(frozen=True)
class ExpertUse:
    """Use of the experts of one layer, one number per expert.

    prompt_tokens  prompt tokens that were routed to it and counted in its scores
    picks          decoded tokens that were routed to it
    copied         True if it has a copy of its active weights (made on first use, within the free memory)
    """

    layer: int
    prompt_tokens: tuple[int, ...]
    picks: tuple[int, ...]
    copied: tuple[bool, ...]


@dataclass(frozen=True)
class Statistics(of_studies.StudyStatistics):
    """Measurements of one call of generate or stream, for the whole batch.

    prompt_tokens        without padding; kept_tokens of them were already cached (earlier turns of a conversation;
                         counts of the state then cover all turns)
    image_ms             vision tower and projector
    prefill_ms           embedded prompt to first logits, without the partition
    partition_ms         scores, sort and copy of the active weights; its parts: scores_ms, sort_ms, copy_ms
    decode_ms_per_token  mean over the decode steps; nan without steps
    compile_s            time to compile the decode step before the run; 0 if it was compiled already or runs eagerly
    steps                how decode steps ran: "package" (compiled earlier, in the user's cache), "compiled" (by
                         torch.compile) or "eager"
    skipped_layers       layers, of the model's `layers`, that all but the last prompt tokens skipped
    experts              per layer with a mixture of experts
    weight_bytes_per_token  mean over the steps of the run
    stop_string          True if a stop string ended a stream
    """

    prompt_tokens: int
    kept_tokens: int
    new_tokens: int
    image_ms: float
    prefill_ms: float
    partition_ms: float
    scores_ms: float
    sort_ms: float
    copy_ms: float
    decode_ms_per_token: float
    decode_tokens_per_s: float
    compile_s: float
    steps: str
    regions: Regions
    layers: int
    skipped_layers: int
    weight_bytes_per_token: int
    dense_weight_bytes_per_token: int
    peak_memory_bytes: int
    experts: tuple[ExpertUse, ...]
    weights: str
    dtype: str
    device: str
    stop_string: bool = False


@dataclass(frozen=True)
class Piece:
    """One step of a stream: a token and the text that it completes, if any.

    The last piece has no token. It contains text that was held back, finish_reason ("stop" or "length"), the prompt's
    token ids and the statistics. logprob is the token's log-probability under the model itself, if requested.
    """

    text: str
    token_id: int | None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None
    statistics: Statistics | None = None
    logprob: float | None = None


@dataclass(frozen=True)
class Generation:
    """The result of one prompt of a batch.

    token_ids end with the end-of-sequence token, or with the token that completed a stop string, if one was reached.
    logprobs are their log-probabilities under the model itself, if requested.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    statistics: Statistics
    logprobs: list[float] | None = None


def joined(pieces: Iterable[Piece]) -> Generation:
    """Join the pieces of one stream."""
    *said, last = pieces
    assert last.prompt_token_ids is not None and last.finish_reason is not None and last.statistics is not None
    text = "".join(piece.text for piece in (*said, last))
    ids = [piece.token_id for piece in said if piece.token_id is not None]
    logprobs = [piece.logprob for piece in said if piece.logprob is not None]
    return Generation(text, ids, last.prompt_token_ids, last.finish_reason, last.statistics, logprobs or None)


def measured(run: Run) -> Statistics:
    """Return the statistics of a run that has been iterated."""
    engine, clock = run.engine, run.state.clock
    scores, sort, copy = (clock.milliseconds(phase) for phase in ("scores", "sort", "copy"))
    partition = scores + sort + copy
    per_token = run.decode_s / run.decode_steps if run.decode_steps else math.nan
    schedule, dense = run.state.schedule, bytes_per_token(engine.model, engine.dense)
    pruned = bytes_per_token(engine.model, run.pruning, len(run.prompts), run.state)
    return Statistics(
        prompt_tokens=sum(map(len, run.prompts)),
        image_tokens=engine.pictures.image_tokens(run.prompts),
        kept_tokens=run.kept,
        new_tokens=run.new_tokens,
        image_ms=run.image_s * 1000,
        prefill_ms=run.prefill_s * 1000 - partition,
        partition_ms=partition,
        scores_ms=scores,
        sort_ms=sort,
        copy_ms=copy,
        decode_ms_per_token=per_token * 1000,
        decode_tokens_per_s=len(run.prompts) / per_token,
        compile_s=run.compile_s,
        steps=engine.kind_of_steps(run.state),
        regions=regions(engine.model, run.pruning),
        pruning=run.pruning,
        weight_bytes_per_token=pruned + (dense - pruned) * schedule.dense_steps // max(1, schedule.steps),
        dense_weight_bytes_per_token=dense,
        layers=len(run.state.layers),
        skipped_layers=len(run.pruning.skipped_by(max(map(len, run.prompts)) - run.kept)),
        peak_memory_bytes=peak_memory_bytes(engine.device),
        left_out_tokens=run.pruning.dropped_tokens(run.given.stretches),
        experts=expert_use(run.state),
        evidence_tokens=schedule.tokens,
        dense_steps=schedule.dense_steps,
        redraws=schedule.redraws,
        weights=engine.weights,
        dtype=str(engine.dtype).removeprefix("torch."),
        device=str(engine.device),
        stop_string=run.stop_string,
    )


def regions(model: Any, pruning: StudyPruning) -> Regions:
    """Return the channels of the first layer's network in each region."""
    sizes = ffn_sizes(model, pruning)
    return Regions(sizes.channels, sizes.retained, sizes.candidate, sizes.pruned, sizes.pick)


def expert_use(state: DecodeState) -> tuple[ExpertUse, ...]:
    """Return the use of experts in every layer with a mixture."""
    use = []
    for index, layer in enumerate(state.layers):
        if isinstance(layer.ffn, PartitionedExperts):
            copied = tuple(one is not None and one.copied_bytes() > 0 for one in layer.ffn.active)
            use.append(ExpertUse(index, tuple(layer.ffn.prompt_tokens), tuple(layer.ffn.picks), copied))
    return tuple(use)


def pruning_report(pruning: StudyPruning) -> dict[str, Any]:
    """Return settings as JSON, with their resolved values in place of the requested ones."""
    return asdict(pruning.settings) | {"prune_ratio": pruning.ratio, "ratio": pruning.ratio,
                                       "ffn_ratio": pruning.ffn_ratio}


def report(statistics: Statistics) -> dict[str, Any]:
    """Return statistics as JSON."""
    shown = statistics.regions
    return {
        "image_tokens": statistics.image_tokens,
        "kept_tokens": statistics.kept_tokens,
        "pruning": pruning_report(statistics.pruning)
        | {"retained": shown.retained, "candidate": shown.candidate, "pruned": shown.pruned, "picked": shown.picked,
           "skipped_layers": statistics.skipped_layers},
        "timing": {
            "image_ms": statistics.image_ms,
            "prefill_ms": statistics.prefill_ms,
            "partition_ms": statistics.partition_ms,
            "decode_ms_per_token": or_null(statistics.decode_ms_per_token),
            "decode_tokens_per_s": or_null(statistics.decode_tokens_per_s),
            "compile_s": statistics.compile_s,
            "steps": statistics.steps,
        },
        "visual_tokens": of_studies.visual_tokens_report(statistics),
        "experts": [asdict(layer) for layer in statistics.experts],
        "evidence": of_studies.evidence_report(statistics),
        "weight_bytes_per_token": statistics.weight_bytes_per_token,
        "dense_weight_bytes_per_token": statistics.dense_weight_bytes_per_token,
        "peak_memory_bytes": statistics.peak_memory_bytes,
        "weights": statistics.weights,
        "dtype": statistics.dtype,
        "device": statistics.device,
    }


def or_null(value: float) -> float | None:
    """Replace NaN by None for JSON; a run of one token has no decode step to time."""
    return None if math.isnan(value) else value


def lines(statistics: Statistics, finish_reason: str, load_s: float) -> list[str]:
    """Format statistics for people."""
    ended = {"stop": "end of sequence", "length": "as many as asked for"}[finish_reason]
    ended = "a stop string" if statistics.stop_string and finish_reason == "stop" else ended
    shown, share = statistics.regions, statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
    of_which = [f"{statistics.kept_tokens} kept"] if statistics.kept_tokens else []
    images = ""
    if statistics.image_tokens:
        of_text = statistics.prompt_tokens - statistics.image_tokens
        of_which += [f"{statistics.image_tokens} of images", f"{of_text} of text"]
        images = f" images {statistics.image_ms:.0f} ms,"
    listed = f" ({', '.join(of_which)})" if of_which else ""
    prompt = f"{statistics.prompt_tokens} tokens{listed}:{images}"
    compiled = f"; compiled before that in {statistics.compile_s:.1f} s" if statistics.compile_s else ""
    unread = ""
    if statistics.pruning.ratio > 0 and share == 1:
        all_dense = 0 < statistics.dense_steps == statistics.new_tokens - 1
        why = "every step gathered evidence" if all_dense else of_studies.why_all_is_read(statistics.pruning)
        unread = f", as {why}"
    untimed = math.isnan(statistics.decode_ms_per_token)
    speed = f"{statistics.decode_ms_per_token:.1f} ms/token, {statistics.decode_tokens_per_s:.1f} tokens/s"
    channels = f"channels  {shown.channels} per FFN, "
    if statistics.pruning.cuts:
        channels += (
            f"{rule_words(statistics.pruning.settings)}, ratio {statistics.pruning.ratio:.3g}: {shown.retained} "
            f"retained, {shown.candidate} candidate ({shown.picked} picked per step), {shown.pruned} pruned"
        )
    else:
        channels += "all of which run"
    experts, why_dense = experts_lines(statistics), statistics.pruning.why_dense
    dense = [f"dense     nothing is pruned: {why_dense}", *experts, channels]
    return [
        f"prompt    {prompt} prefill {statistics.prefill_ms:.0f} ms, partition {statistics.partition_ms:.0f} ms",
        *of_studies.visual_tokens_lines(statistics),
        *skipped_lines(statistics),
        f"decode    {statistics.new_tokens} tokens ({ended}): {'no step to time' if untimed else speed}{compiled}",
        *(dense if why_dense else [channels, *experts, *of_studies.evidence_lines(statistics)]),
        *of_studies.input_lines(statistics),
        f"weights   {megabytes(statistics.weight_bytes_per_token)} read per token, {share:.1%} of dense{unread} "
        f"({statistics.weights}; {statistics.dtype}, {statistics.device})",
        f"memory    {megabytes(statistics.peak_memory_bytes)} at peak; loaded in {load_s:.1f} s",
    ]


def one_line_of(statistics: Statistics) -> str:
    """Format the main statistics in one line, for a conversation."""
    speed = "" if math.isnan(statistics.decode_tokens_per_s) else f", {statistics.decode_tokens_per_s:.1f} tokens/s"
    share = statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
    return f"[{statistics.new_tokens} tokens{speed}, {share:.0%} of the dense model's bytes; /stats says more]"


def skipped_lines(statistics: Statistics) -> list[str]:
    """Format the result of Prefill-Only pruning; no line without it."""
    boundary = statistics.pruning.boundary
    if not statistics.pruning.skipped:
        return []
    if not statistics.skipped_layers:
        return [f"skipped   no layer: the prompt has no more than the {boundary} boundary tokens"]
    of = f"{statistics.skipped_layers} of {statistics.layers} layers"
    return [f"skipped   {of}, by all prompt tokens but the last {boundary}"]


def experts_lines(statistics: Statistics) -> list[str]:
    """Format the use of experts over all layers; no line without experts."""
    layers = statistics.experts
    if not layers:
        return []
    unseen = of_studies.unseen_experts_words(statistics, [tokens for layer in layers for tokens in layer.prompt_tokens])
    used = sum(picks > 0 for layer in layers for picks in layer.picks)
    count = sum(len(layer.picks) for layer in layers)
    return [f"experts   {count} in {len(layers)} layers: {unseen}, {used} used in decode"]


def megabytes(count: int) -> str:
    """Format a number of bytes in MB."""
    return f"{count / 1e6:.0f} MB"
