"""One real run, recorded for the page that explains it: picks, bytes and tokens of each step, beside the dense model's.

The engine makes the run, which is timed. Its tokens then run through the model twice more, one by one: through the same
pruned steps, which are recorded, and through the dense model's steps. A frame is one new token: the first comes from
the prompt, every later one from a step.

T prompt tokens, F frames, I channels, C candidates, V vocabulary.
"""

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.cost_model import bytes_per_token
from models.experts import MixtureOfExperts
from models.families.picture_model import Grid
from models.feed_forward import FeedForward
from models.passes import PictureRows
from models.pruning.experts import PartitionedExperts
from models.pruning.heads import PartitionedAttention
from models.pruning.interface import PrunedFFN
from models.pruning.partition import ChannelPartition
from models.state import DecodeState, LayerState
from popengine.engine.engine import Engine
from popengine.engine.results import measured, report
from popengine.engine.run import Run
from popengine.engine.sampling import Sampling
from popengine.evaluation.studies import ranks
from popengine.images.images import ImageProcessing, ImageSource, open_image
from popengine.images.vision import Embedded, Vision
from popengine.studies.activations import Activation, watch_dense
from popengine.studies.known_text import evaluate
from popengine.studies.recording import recorded
from popengine.studies.settings import DENSE, PruningSettings
from popengine.text.tokenizer import TextStream, TextTokenizer

# Largest side of a picture on the page.
MOST_PIXELS_A_SIDE = 448
SHARED = "shared"


@dataclass
class Drawing:
    """A partition that is valid from a frame on. Columns of the page are sorted by region, then by falling score.

    order int64 [I], the channel of each column; scores float32 [I], of the evidence, and rank int64 [I], by channel
    """

    frame: int
    order: Tensor
    scores: Tensor
    rank: Tensor
    partition: ChannelPartition


@dataclass
class NetworkRecord:
    """The record of one feed-forward network. expert: its index in a mixture, "shared", or None without a mixture.

    picked, wanted  by frame, bool [I] in the order of the columns: candidates that the step ran, and the channels that
                    the dense model ranks highest there, as many as a step runs
    moved           by frame, mean |rank there - rank in the prompt| / I
    left_out        by frame, the share of dense's squared scores in channels that the step did not run, and the least
                    possible share for the same number of channels
    """

    layer: int
    expert: int | str | None
    ffn: FeedForward
    drawings: list[Drawing] = field(default_factory=list)
    picked: dict[int, Tensor] = field(default_factory=dict)
    wanted: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)
    left_out: dict[int, tuple[float, float]] = field(default_factory=dict)

    def drawing(self, frame: int) -> Drawing | None:
        """Return the partition that is valid for a frame's step; None if there is none yet."""
        return next((one for one in reversed(self.drawings) if one.frame < frame), None)

    def active(self, state: LayerState) -> PrunedFFN | None:
        if isinstance(state.ffn, PartitionedExperts):
            return state.ffn.shared if self.expert == SHARED else state.ffn.active[self.expert]  # type: ignore[index]
        found: PrunedFFN = state.ffn  # type: ignore[assignment]
        return found

    def note_drawing(self, frame: int, active: PrunedFFN) -> None:
        """Record the partition if it differs from the last one."""
        if not active.sizes.prunes or (self.drawings and self.drawings[-1].partition is active.partition):
            return
        unseen = active.evidence.tokens < active.rule.min_tokens
        scores = self.ffn.weight_scores() if unseen else active.evidence.scores(self.ffn.down_norms())
        partition = active.partition
        regions = (partition.retained, partition.candidate, partition.pruned)
        order = torch.cat([one[scores[one].argsort(descending=True, stable=True)] for one in regions])
        self.drawings.append(Drawing(frame, order, scores, ranks(scores), partition))


def networks(model: Any) -> list[NetworkRecord]:
    """Make an empty record for every feed-forward network, layer by layer."""
    found = []
    for index, layer in enumerate(model.model.layers):
        if isinstance(layer.mlp, MixtureOfExperts):
            found += [NetworkRecord(index, expert, ffn) for expert, ffn in enumerate(layer.mlp.experts)]
            shared = layer.mlp.shared_expert
            found += [NetworkRecord(index, SHARED, shared)] if shared is not None else []
        else:
            found.append(NetworkRecord(index, None, layer.mlp))
    return found


@dataclass
class Frames:
    """Numbers per frame of one pass over the text: the chosen token's probability, the likeliest token and its own."""

    chosen: list[float] = field(default_factory=list)
    likeliest: list[int] = field(default_factory=list)
    highest: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, token: int) -> None:
        """Add a frame. logits [1, V]; token: the chosen one"""
        probabilities = logits[0].float().softmax(dim=-1)                           # [V]
        highest, likeliest = probabilities.max(dim=-1)
        self.chosen.append(float(probabilities[token]))
        self.likeliest.append(int(likeliest))
        self.highest.append(float(highest))


def explained_run(
    engine: Engine, prompt: list[int], max_new_tokens: int, pruning: PruningSettings, sampling: Sampling,
    images: Sequence[ImageSource] = (), ignore_eos: bool = False,
) -> dict[str, Any]:
    """Run one prompt and record it as the JSON object of the page. Raises InputError for what cannot be run."""
    run = engine.run([prompt], max_new_tokens, pruning, sampling, ignore_eos, images)
    new, milliseconds, spent = [], [], 0.0
    for (token,) in run:
        assert token is not None
        new.append(token)
        milliseconds.append((run.decode_s - spent) * 1000)
        spent = run.decode_s
    statistics = report(measured(run))
    alone = dense_answer(engine, prompt, max_new_tokens, images, ignore_eos)
    of_dense, dense_milliseconds = dense_steps(engine, run, new)
    records = networks(engine.model)
    of_pruned, dense_frames, redraws, experts, heads = pruned_steps(engine, run, new, records)
    shares = watch(engine, run, new, records)
    settings, skipped = run.pruning.settings, run.pruning.skipped_by(len(prompt))
    whole = bytes_per_token(engine.model, engine.resolve(DENSE))
    pruned = bytes_per_token(engine.model, run.pruning, 1, run.state)
    layers = [
        {"index": index, "skipped": index in skipped,
         "networks": [encoded(one) for one in records if one.layer == index]}
        for index in range(len(engine.model.model.layers))
    ]
    texts, written = token_texts(engine.tokenizer, [*prompt, *new]), partial(shown_token, engine.tokenizer)
    frames = [
        {
            "text": texts[len(prompt) + index], "token": new[index], "written": written(new[index]),
            "probability": rounded(of_pruned.chosen[index]),
            "dense_probability": rounded(of_dense.chosen[index]),
            "dense_likeliest": written(of_dense.likeliest[index]),
            "dense_likeliest_probability": rounded(of_dense.highest[index]),
            "agrees": of_dense.likeliest[index] == new[index],
            "dense_step": index in dense_frames, "redrawn": index in redraws,
            "ms": rounded(milliseconds[index]), "dense_ms": rounded(dense_milliseconds[index]),
            "bytes": whole if index in dense_frames else pruned, "dense_bytes": whole,
        }
        for index in range(len(new))
    ]
    return {
        "prompt": [
            {"text": text, "share": rounded(share), "image": not engine.pictures.text_ids([token])}
            for text, share, token in zip(texts, shares, prompt, strict=False)
        ],
        "frames": frames,
        "dense_answer": {
            "tokens": [
                {"text": text, "token": token, "written": written(token)} for text, token in
                zip(token_texts(engine.tokenizer, [*prompt, *alone.tokens])[len(prompt):], alone.tokens, strict=True)
            ],
            "finish_reason": alone.finish_reason,
            "first_difference": first_difference(new, alone.tokens),
        },
        "replayed_alike": sum(likeliest == token for likeliest, token in zip(of_pruned.likeliest, new, strict=True)),
        "greedy": sampling.temperature == 0,
        "finish_reason": run.finish_reasons[0],
        "layers": layers,
        "layers_in_all": len(layers),
        "experts": experts,
        "heads": heads,
        "pictures": [
            picture_of(engine, image, grid) for image, grid in zip(images, run.given.grids, strict=True)
        ],
        "rule": settings.rule,
        "statistics": statistics,
    }


@dataclass(frozen=True)
class DenseAnswer:
    """Tokens that the dense model generates by itself, and the reason of their end ("stop" or "length")."""

    tokens: list[int]
    finish_reason: str


def dense_answer(
    engine: Engine, prompt: list[int], max_new_tokens: int, images: Sequence[ImageSource], ignore_eos: bool
) -> DenseAnswer:
    """Generate greedily from the same prompt without pruning."""
    run = engine.run([prompt], max_new_tokens, DENSE, Sampling(), ignore_eos, images)
    tokens = [token for (token,) in run if token is not None]
    return DenseAnswer(tokens, run.finish_reasons[0] or "length")


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first place where two answers differ, by a token or by an end; None if they are the same."""
    for place in range(min(len(one), len(other))):
        if one[place] != other[place]:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def embedded(engine: Engine, run: Run, new: list[int]) -> Embedded:
    """Embed the prompt with its pictures in place, and new tokens after it as in steps: image tokens count as text.

    `counted` covers only the prompt's tokens.
    """
    prompt = engine.pictures.embed(
        torch.tensor([run.prompts[0]], device=engine.device), None, run.given, run.pruning.settings.scored_tokens
    )
    tokens = torch.tensor([new], dtype=torch.int64, device=engine.device)           # [1, F]
    pictures = None if prompt.pictures is None else followed(prompt.pictures, prompt.x.shape[1], len(new))
    return prompt._replace(x=torch.cat([prompt.x, engine.model.embed(tokens)], dim=1), pictures=pictures)


def followed(pictures: PictureRows, prompt: int, count: int) -> PictureRows:
    """Extend the extra inputs of a prompt's pictures by `count` text tokens after the prompt."""
    positions, blocks = pictures.positions, pictures.blocks
    if positions is not None and pictures.rope_delta is not None:
        steps = torch.arange(prompt, prompt + count, device=positions.device) + pictures.rope_delta      # [1, F]
        positions = torch.cat([positions, steps.expand(3, -1, -1)], dim=-1)
    return replace(
        pictures, positions=positions, added=[pad(one, (0, 0, 0, count)) for one in pictures.added],
        blocks=None if blocks is None else pad(blocks, (0, count), value=-1),
    )


@torch.inference_mode()
def dense_steps(engine: Engine, run: Run, new: list[int]) -> tuple[Frames, list[float]]:
    """Run the dense model over this text; return its frames, and the milliseconds of its steps."""
    state = engine.new_state(1, len(run.prompts[0]) + len(new), engine.resolve(DENSE))
    engine.prepare(state)
    found, milliseconds, prompt = Frames(), [0.0], embedded(engine, run, [])
    found.add(engine.model.prefill(prompt.x, state, pictures=prompt.pictures), new[0])
    for token, following in pairwise(new):
        began = time.perf_counter()
        with engine.stepping():
            logits = engine.decode(torch.tensor([token], device=engine.device), state)          # [1, V]
            logits.argmax().item()                              # wait for the device, as a run does
        milliseconds.append((time.perf_counter() - began) * 1000)
        found.add(logits, following)
    return found, milliseconds


@torch.inference_mode()
def pruned_steps(
    engine: Engine, run: Run, new: list[int], records: list[NetworkRecord]
) -> tuple[Frames, set[int], set[int], list[list[list[int]]], list[str]]:
    """Repeat the run's steps and record them: frames, dense steps, redraws, experts of each step, regions of heads."""
    frame = 0

    def told(ffn: FeedForward, partition: ChannelPartition, keep: Tensor) -> None:
        record, sizes = by_network[ffn], partition.sizes
        if not sizes.prunes:
            return
        if not record.drawings:                     # the first token that reaches an expert
            record.note_drawing(frame - 1, record.active(state.layers[record.layer]))  # type: ignore[arg-type]
        picked = torch.zeros(sizes.channels, dtype=torch.bool, device=keep.device)
        picked[partition.candidate] = keep.flatten() if keep.numel() else True
        record.picked[frame] = picked[record.drawings[-1].order]

    state = engine.new_state(1, len(run.prompts[0]) + len(new), recorded(run.pruning, told))
    by_network = {one.ffn: one for one in records}
    prompt = embedded(engine, run, [])
    found, dense_frames, redraws, experts = Frames(), set(), set(), []
    found.add(engine.model.prefill(prompt.x, state, None, prompt.counted, pictures=prompt.pictures), new[0])
    note_drawings(records, state, 0)
    heads = head_regions(state)
    for frame, (token, following) in enumerate(pairwise(new), start=1):
        schedule, uses = state.schedule, expert_uses(state)
        before = schedule.dense_steps, schedule.redraws
        logits = evaluate(engine.model, torch.tensor([token], device=engine.device), state)
        dense_frames |= {frame} if schedule.dense_steps > before[0] else set()
        redraws |= {frame} if schedule.redraws > before[1] else set()
        experts.append([
            [expert for expert, (old, now) in enumerate(zip(*layer, strict=True)) if now > old]
            for layer in zip(uses, expert_uses(state), strict=True)
        ])
        found.add(logits, following)
        note_drawings(records, state, frame)
    return found, dense_frames, redraws, experts if any(map(any, experts)) else [], heads


def note_drawings(records: list[NetworkRecord], state: DecodeState, frame: int) -> None:
    """Record the partitions drawn at a frame; none are drawn before there is enough evidence."""
    if state.schedule.tokens < state.schedule.least:
        return
    for record in records:
        active = record.active(state.layers[record.layer])
        if active is not None:
            record.note_drawing(frame, active)


def expert_uses(state: DecodeState) -> list[list[int]]:
    """Return, per layer, the tokens routed to each expert so far; empty for a layer without experts."""
    return [list(layer.ffn.picks) if isinstance(layer.ffn, PartitionedExperts) else [] for layer in state.layers]


def head_regions(state: DecodeState) -> list[str]:
    """Return, per layer, a letter per query head: retained, candidate or pruned; empty if heads are not pruned."""
    found = []
    for layer in state.layers:
        if isinstance(layer.attention, PartitionedAttention):
            sizes, order = layer.attention.sizes, layer.attention.partition.order           # [G, N / G]
            letters = "r" * sizes.retained + "c" * sizes.candidate + "p" * sizes.pruned
            found.append("".join(letters[place] for group in order.argsort(dim=-1).tolist() for place in group))
    return found


def watch(engine: Engine, run: Run, new: list[int], records: list[NetworkRecord]) -> list[float]:
    """Rank channels with the dense model at every step of the text; fills `wanted`, `moved` and `left_out`.

    Returns each prompt token's share of the evidence: of the squared scores, mean over networks, float [T].
    """
    text = embedded(engine, run, new[:-1])                                          # T + F - 1 tokens
    prompt, by_network = len(run.prompts[0]), {one.ffn: one for one in records}
    skipped = run.pruning.skipped_by(prompt)
    shares, seen = torch.zeros(prompt, device=engine.device), 0

    def note(activation: Activation) -> None:
        nonlocal seen
        record, positions = by_network[activation.ffn], activation.positions
        scores = activation.h.float().abs() * activation.ffn.down_norms()           # [n, I]
        within = positions < prompt
        energy = torch.zeros(prompt, device=engine.device)
        energy[positions[within]] = scores[within].square().sum(dim=-1)
        if text.counted is not None:
            energy *= text.counted[0, :prompt]
        if record.layer in skipped:
            energy[: -run.pruning.boundary] = 0
        if energy.any():
            shares.add_(energy / energy.sum())
            seen += 1
        scores, rank = scores[~within], ranks(scores[~within])                      # [n, I], steps only
        for row, position in enumerate(positions[~within].tolist()):
            frame = position - prompt + 1
            drawing = record.drawing(frame)
            if drawing is None:
                continue
            sizes = drawing.partition.sizes
            record.moved[frame] = float((rank[row] - drawing.rank).abs().float().mean()) / len(drawing.rank)
            if frame in record.picked:          # a pruned step that reached this network
                wanted, squares = (rank[row] < sizes.computed)[drawing.order], scores[row].square()[drawing.order]
                ran = record.picked[frame].clone()
                ran[: sizes.retained] = True
                of_all = squares.sum().clamp(min=1e-30)
                record.wanted[frame] = wanted
                record.left_out[frame] = float(squares[~ran].sum() / of_all), float(squares[~wanted].sum() / of_all)

    watch_dense(engine.model, text.x, note, text.pictures)
    return (shares / max(1, seen)).tolist()


def encoded(record: NetworkRecord) -> dict[str, Any]:
    """Encode a network as JSON. Masks are bits, eight columns per byte, lowest bit first, frame by frame.

    changed  by frame, the share of picks that the last step of the network had not picked
    """
    sizes = record.drawings[0].partition.sizes if record.drawings else None
    changed, before = {}, None
    for frame, picked in record.picked.items():
        drawing = record.drawing(frame)
        assert drawing is not None
        channels = torch.zeros_like(picked).index_copy(0, drawing.order, picked)    # by channel: columns may change
        if before is not None and picked.any():
            changed[frame] = rounded(float((channels & ~before).sum() / channels.sum()))
        before = channels
    return {
        "expert": record.expert,
        "channels": record.ffn.channels,
        "retained": sizes.retained if sizes else record.ffn.channels,
        "candidate": sizes.candidate if sizes else 0,
        "picks": sizes.pick if sizes else 0,
        "drawings": [
            {"frame": one.frame, "order": base64_of(one.order.to(torch.int32)),
             "scores": base64_of(one.scores[one.order].to(torch.bfloat16).view(torch.int16))}
            for one in record.drawings
        ],
        "picked": masks({frame: mask[sizes.retained : sizes.active] for frame, mask in record.picked.items()})
        if sizes else masks({}),
        "wanted": masks(record.wanted),
        "moved": {frame: rounded(value) for frame, value in record.moved.items()},
        "changed": changed,
        "left_out": {frame: [rounded(one) for one in pair] for frame, pair in record.left_out.items()},
    }


def masks(by_frame: dict[int, Tensor]) -> dict[str, Any]:
    """Encode masks, bool [n] each, as bits."""
    bits = ""
    if by_frame:
        mask = torch.stack([*by_frame.values()]).to(torch.uint8)                    # [F, n]
        eights = pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
        bits = base64_of((eights << torch.arange(8, device=mask.device)).sum(dim=-1).to(torch.uint8))
    return {"frames": list(by_frame), "bits": bits}


def base64_of(values: Tensor) -> str:
    """Encode the bytes of a tensor in base64."""
    return base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()


def picture_of(engine: Engine, image: ImageSource, grid: Grid) -> dict[str, Any]:
    """Return a picture as the vision tower sees it (cropped alike) as a data: URL, with the grid of its tokens.

    A tower of square pictures gives only the number of tokens, perhaps one more or less than a square.
    """
    assert isinstance(engine.pictures, Vision)
    picture, processing, file = open_image(image), engine.pictures.processing, BytesIO()
    (rows, columns), tokens = grid, math.prod(grid)
    if isinstance(processing, ImageProcessing):
        picture = processing.cropped(processing.resized(picture))
        rows = columns = round(math.sqrt(tokens))
    picture.thumbnail((MOST_PIXELS_A_SIDE, MOST_PIXELS_A_SIDE))
    picture.save(file, "JPEG", quality=88)
    address = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"address": address, "tokens": tokens, "rows": rows, "columns": columns}


def token_texts(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens belongs to its last token."""
    stream, texts = TextStream(tokenizer), []
    for token in ids:
        texts.append(stream.push(token) if token not in tokenizer.special_ids else shown_token(tokenizer, token))
    texts[-1] += stream.finish()
    return texts


def shown_token(tokenizer: TextTokenizer, token: int) -> str:
    """Decode a single token; control tokens are shown."""
    return tokenizer.decode([token], skip_special_tokens=False)


def rounded(value: float) -> float:
    """Round to six digits for the page; 0 for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0
