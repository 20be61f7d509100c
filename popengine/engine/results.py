"""Statistics of a run, and the report that commands print from them."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from models.cost_model import bytes_per_token, ffn_sizes
from models.pruning.experts import PartitionedExperts
from models.state import DecodeState
from popengine.engine.run import Run
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import DENSE, WIDTH_RULES, PruningSettings
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
class Statistics:
    """Measurements of one call of generate or stream, for the whole batch.

    prompt_tokens        without padding; image_tokens of them stand for pictures, and kept_tokens were already cached
                         (earlier turns of a conversation; counts of the state then cover all turns)
    image_ms             vision tower and projector
    prefill_ms           embedded prompt to first logits, without the partition
    partition_ms         scores, sort and copy of the active weights; its parts: scores_ms, sort_ms, copy_ms
    decode_ms_per_token  mean over the decode steps; nan without steps
    compile_s            time to compile the decode step before the run; 0 if it was compiled already or runs eagerly
    steps                how decode steps ran: "package" (compiled earlier, in the user's cache), "compiled" (by
                         torch.compile) or "eager"
    skipped_layers       layers, of the model's `layers`, that all but the last prompt tokens skipped
    left_out_tokens      tokens of pictures that layers from `pruning.thin_from` on leave out
    experts              per layer with a mixture of experts
    evidence_tokens      real tokens in the scores; dense_steps of the decode steps were dense and added tokens to them,
                         redraws counts new partitions
    weight_bytes_per_token  mean over the steps of the run
    """

    prompt_tokens: int
    image_tokens: int
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
    pruning: StudyPruning
    layers: int
    skipped_layers: int
    weight_bytes_per_token: int
    dense_weight_bytes_per_token: int
    peak_memory_bytes: int
    left_out_tokens: int
    experts: tuple[ExpertUse, ...]
    evidence_tokens: int
    dense_steps: int
    redraws: int
    weights: str
    dtype: str
    device: str


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


def measured(run: Run) -> Statistics:
    """Return the statistics of a run that has been iterated."""
    engine, clock = run.engine, run.state.clock
    scores, sort, copy = (clock.milliseconds(phase) for phase in ("scores", "sort", "copy"))
    partition = scores + sort + copy
    per_token = run.decode_s / run.decode_steps if run.decode_steps else math.nan
    schedule, dense = run.state.schedule, bytes_per_token(engine.model, engine.resolve(DENSE))
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
        left_out_tokens=sum(one.length - run.pruning.visual_tokens(one.length) for one in run.given.stretches),
        experts=expert_use(run.state),
        evidence_tokens=schedule.tokens,
        dense_steps=schedule.dense_steps,
        redraws=schedule.redraws,
        weights=engine.weights,
        dtype=str(engine.dtype).removeprefix("torch."),
        device=str(engine.device),
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
        "visual_tokens": {
            "of_pictures": statistics.image_tokens, "left_out": statistics.left_out_tokens,
            "from_layer": statistics.pruning.thin_from if statistics.left_out_tokens else None,
        },
        "experts": [asdict(layer) for layer in statistics.experts],
        "evidence": {
            "tokens": statistics.evidence_tokens, "prior": statistics.pruning.settings.prior,
            "dense_steps": statistics.dense_steps, "redraws": statistics.redraws,
        },
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
    unread = ", as copies of what stays would be larger" if statistics.pruning.ratio > 0 and share == 1 else ""
    untimed = math.isnan(statistics.decode_ms_per_token)
    speed = f"{statistics.decode_ms_per_token:.1f} ms/token, {statistics.decode_tokens_per_s:.1f} tokens/s"
    found = [
        f"prompt    {prompt} prefill {statistics.prefill_ms:.0f} ms, partition {statistics.partition_ms:.0f} ms",
        f"decode    {statistics.new_tokens} tokens ({ended}): {'no step to time' if untimed else speed}{compiled}",
        f"channels  {shown.channels} per FFN, {rule_words(statistics.pruning.settings)}, ratio "
        f"{statistics.pruning.ratio:.3g}: {shown.retained} retained, {shown.candidate} candidate "
        f"({shown.picked} picked per step), {shown.pruned} pruned",
        f"weights   {megabytes(statistics.weight_bytes_per_token)} read per token, {share:.1%} of dense{unread} "
        f"({statistics.weights}; {statistics.dtype}, {statistics.device})",
        f"memory    {megabytes(statistics.peak_memory_bytes)} at peak; loaded in {load_s:.1f} s",
    ]
    if statistics.pruning.why_dense:
        found.insert(2, f"dense     nothing is pruned: {statistics.pruning.why_dense}")
    if statistics.pruning.cuts:
        prior = statistics.pruning.settings.prior
        found.insert(3, (
            f"evidence  {statistics.evidence_tokens} tokens{f' and a prior of {prior}' if prior else ''}, "
            f"{statistics.dense_steps} dense steps, {statistics.redraws} redraws"
        ))
    if statistics.experts:
        found.insert(3, experts_line(statistics))
    if statistics.pruning.skipped:
        found.insert(1, skipped_line(statistics))
    if statistics.left_out_tokens:
        found.insert(1, visual_tokens_line(statistics))
    return found


def one_line_of(statistics: Statistics) -> str:
    """Format the main statistics in one line, for a conversation."""
    speed = "" if math.isnan(statistics.decode_tokens_per_s) else f", {statistics.decode_tokens_per_s:.1f} tokens/s"
    share = statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
    return f"[{statistics.new_tokens} tokens{speed}, {share:.0%} of the dense model's bytes; /stats says more]"


def visual_tokens_line(statistics: Statistics) -> str:
    """Format the number of image tokens that stay."""
    settings, of = statistics.pruning.settings, statistics.image_tokens
    where = f"after layer {settings.visual_tokens_layer}" if statistics.pruning.thin_from else "from the first layer on"
    return (
        f"pictures  {of - statistics.left_out_tokens} of {of} image tokens stay {where}, by {settings.visual_tokens_by}"
    )


def skipped_line(statistics: Statistics) -> str:
    """Format the result of Prefill-Only pruning."""
    boundary = statistics.pruning.boundary
    if not statistics.skipped_layers:
        return f"skipped   no layer: the prompt has no more than the {boundary} boundary tokens"
    return (
        f"skipped   {statistics.skipped_layers} of {statistics.layers} layers, by all prompt tokens but the last "
        f"{boundary}"
    )


def experts_line(statistics: Statistics) -> str:
    """Format the use of experts over all layers."""
    layers, settings = statistics.experts, statistics.pruning.settings
    unseen = sum(tokens < settings.min_tokens for layer in layers for tokens in layer.prompt_tokens)
    used = sum(picks > 0 for layer in layers for picks in layer.picks)
    fate = "cut by their weights alone" if settings.unseen_experts == "weights" else "left dense"
    return (
        f"experts   {sum(len(layer.picks) for layer in layers)} in {len(layers)} layers: {unseen} unseen in the prompt"
        f"{f' ({fate})' if unseen and statistics.pruning.ffn_ratio > 0 else ''}, {used} used in decode"
    )


def rule_words(settings: PruningSettings) -> str:
    """Return the rule, with its width if it has one."""
    width = f", width {settings.candidate_width:g}" if settings.rule in WIDTH_RULES else ""
    return f"rule {settings.rule}{width}"


def megabytes(count: int) -> str:
    """Format a number of bytes in MB."""
    return f"{count / 1e6:.0f} MB"
