"""Neighbours' methods, each beside a slow and obvious version on Hugging Face's modules."""

import math
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    MIXTRAL,
    SIZES,
    complete_checkpoint,
    exit_status,
    generated,
    left_padded,
    one_line_error,
    prefilled,
    random_reference,
    saved_pair,
)
from slow_left_out import without
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.cost_model import bytes_per_token, layer_weights
from models.llama import LlamaForCausalLM
from models.pruning.settings import SUBLAYERS
from popengine import compare, score
from popengine.engine.loading import load
from popengine.engine.run import next_logits
from popengine.evaluation.calibration import calibration_for
from popengine.evaluation.comparison import configurations
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import Calibration, calibrate, load_calibration, save_calibration
from popengine.studies.cfsp import kept_shares
from popengine.studies.known_text import evaluate
from popengine.studies.left_out import Half, read_halves
from popengine.studies.probe_pruning import PROBED, probe_rows
from popengine.studies.resolve import share_of_halves
from popengine.studies.rules import StaticRule
from popengine.studies.settings import PruningSettings
from popengine.studies.tyr import GENERATIONS, OFFSPRING, STEPS, moved
from weights.errors import InputError

CONFIG = LlamaConfig(**SIZES | {"num_hidden_layers": 4})
LAYERS = 4
TEXTS = [list(range(start, start + 40)) for start in (0, 30, 50)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LlamaForCausalLM]:
    return saved_pair(tmp_path_factory.mktemp("llama"), CONFIG)


@pytest.fixture(scope="module")
def model(pair: tuple[Any, LlamaForCausalLM]) -> LlamaForCausalLM:
    return pair[1]


@pytest.fixture(scope="module")
def calibration(model: LlamaForCausalLM) -> Calibration:
    return calibrate(model, TEXTS, "numbers")


def request(model: LlamaForCausalLM, calibration: Calibration | None, **settings: Any) -> Request:
    return Request(model, PruningSettings.paper(**settings), calibration, seed=1)


@torch.inference_mode()
def walked(reference: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every layer what goes in and what comes out, and what feeds down_proj. tokens [1, T]"""
    told: list[list[Tensor]] = []
    hooks = []
    for layer in reference.model.layers:
        seen: list[Tensor] = []
        told.append(seen)
        hooks += [
            layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0])),
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0])),
            layer.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
    reference(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(before, after, h) for before, h, after in told]


def angles_and_influence(reference: Any) -> tuple[Tensor, Tensor]:
    cosines = []
    for ids in TEXTS:
        ways = walked(reference, torch.tensor([ids]))
        cosines.append(torch.stack([
            (before * after).sum(-1)[0] / before.norm(dim=-1)[0] / after.norm(dim=-1)[0] for before, after, _ in ways
        ]))
    together = torch.cat(cosines, dim=1)                                            # [L, tokens]
    return together.acos().mean(dim=1) / math.pi, 1 - together.mean(dim=1)


def test_influence_and_angles_are_those_of_hugging_faces_layers(
    pair: tuple[Any, LlamaForCausalLM], calibration: Calibration
) -> None:
    angles, influence = angles_and_influence(pair[0])
    assert_same(calibration.influence, influence)
    assert_same(calibration.angles, angles)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_shortgpt_leaves_out_the_layers_of_lowest_influence(
    pair: tuple[Any, LlamaForCausalLM], calibration: Calibration, ratio: float
) -> None:
    _, influence = angles_and_influence(pair[0])
    lowest = sorted(range(LAYERS), key=lambda layer: float(influence[layer]))[: round(ratio * LAYERS)]
    pruning = pruning_for("shortgpt", request(pair[1], calibration, prune_ratio=ratio))
    assert {half.layer for half in pruning.left_out} == set(lowest) and len(pruning.left_out) == 2 * len(lowest)
    assert pruning.ratio == pytest.approx(ratio) and not pruning.cuts


@torch.inference_mode()
def jensen_shannon(one: Tensor, other: Tensor) -> float:
    p, q = one.softmax(-1), other.softmax(-1)
    middle = (p + q) / 2
    return float(((p * (p / middle).log()).sum(-1) / 2 + (q * (q / middle).log()).sum(-1) / 2).mean())


@torch.inference_mode()
def test_finercut_is_the_greedy_search_over_whole_models(model: LlamaForCausalLM, calibration: Calibration) -> None:
    """Every candidate is tried by running Hugging Face's model without it, from the embedding to the logits."""
    dense = random_reference(CONFIG)(calibration.windows).logits
    weights, removed = layer_weights(model), []
    running = [Half(layer, part) for layer in range(4) for part in SUBLAYERS]
    while True:
        fits = [half for half in running if share_of_halves([*removed, half], weights) <= 0.5 + 1e-9]
        if not fits:
            break
        def change(half: Half, gone: tuple[Half, ...] = tuple(removed)) -> float:
            shorter = without(random_reference(LlamaConfig(**CONFIG.to_dict())), (*gone, half))
            return jensen_shannon(dense, shorter(calibration.windows, use_cache=False).logits)

        removed.append(min(fits, key=change))
        running.remove(removed[-1])
    found = pruning_for("finercut", request(model, calibration, prune_ratio=0.5))
    assert found.left_out == tuple(sorted(removed))
    tried = len(calibration.measured)
    again = pruning_for("finercut", request(model, calibration, prune_ratio=0.5))
    assert again.left_out == found.left_out and len(calibration.measured) == tried      # nothing is measured twice
    less = pruning_for("finercut", request(model, calibration, prune_ratio=0.25))
    assert less.ratio <= 0.25 and found.ratio <= 0.5


@pytest.mark.parametrize("method", ["shortgpt", "finercut"])
@torch.inference_mode()
def test_channels_give_what_layers_do_not(method: str, model: LlamaForCausalLM, calibration: Calibration) -> None:
    """At an equal total: a layer's share, and POP on the rest, which decides in the layers that run."""
    both = pruning_for(method, request(model, calibration, prune_ratio=0.5, layer_share=0.5))
    assert both.left_out and both.cuts and both.ratio == pytest.approx(0.5)
    alone = pruning_for("pop", request(model, calibration, prune_ratio=0.5))
    assert bytes_per_token(model, both) == pytest.approx(bytes_per_token(model, alone), rel=0.03)
    none = pruning_for(method, request(model, calibration, prune_ratio=0.4, layer_share=0))
    assert not none.left_out and none.ffn_ratio == pytest.approx(
        pruning_for("pop", request(model, calibration, prune_ratio=0.4)).ffn_ratio
    )


def test_cfsp_is_shares_by_angle_and_channels_by_activation_and_weights(
    pair: tuple[Any, LlamaForCausalLM], calibration: Calibration
) -> None:
    reference, model = pair
    pruning = pruning_for("cfsp", request(model, calibration, ffn_ratio=0.4))
    rule = pruning.rule
    assert isinstance(rule, StaticRule)
    angles, _ = angles_and_influence(reference)
    curve = [1 / (1 + math.exp(-13.1072 * float(angle - angles.mean()))) for angle in angles]
    shares = [0.6 * one * LAYERS / sum(curve) for one in curve]
    if max(shares) >= 1:
        shares = [0.6 + (one - 0.6) * (1 - 0.6) / (max(shares) - 0.6) / 1.05 for one in shares]
    squares = [torch.cat([walked(reference, torch.tensor([ids]))[index][2][0] for ids in TEXTS]).square().mean(dim=0)
               for index in range(LAYERS)]
    for index, (layer, share) in enumerate(zip(model.model.layers, shares, strict=True)):
        mlp = reference.model.layers[index].mlp
        with torch.no_grad():
            worth = [
                float(squares[index][i].sqrt() * (
                    (mlp.down_proj.weight[:, i].abs().sum() * squares[index][i].sqrt())
                    / (mlp.down_proj.weight.abs().sum(dim=0) * squares[index].sqrt()).sum()
                    + mlp.up_proj.weight[i].abs().sum() / mlp.up_proj.weight.abs().sum()
                    + mlp.gate_proj.weight[i].abs().sum() / mlp.gate_proj.weight.abs().sum()
                ))
                for i in range(SIZES["intermediate_size"])
            ]
        partition = rule.of[layer.mlp].partition
        kept = partition.sizes.retained
        assert abs(kept - share * SIZES["intermediate_size"]) <= 1
        best = sorted(range(len(worth)), key=lambda i: -worth[i])[:kept]
        assert partition.retained.tolist() == sorted(best)


@pytest.mark.parametrize("mean", [0.05, 0.6, 0.8, 0.95, 1.0])
def test_shares_add_up_and_never_exceed_a_layer(mean: float) -> None:
    angles = torch.tensor([0.05, 0.1, 0.12, 0.4])
    shares = kept_shares(angles, mean)
    assert float(shares.mean()) == pytest.approx(mean)
    assert shares.max() <= 1 and shares.min() > 0 and (shares.diff() >= 0).all()
    assert kept_shares(torch.full((3,), 0.2), mean).tolist() == pytest.approx([mean] * 3)


@torch.inference_mode()
def test_tyr_is_the_search_with_whole_models(pair: tuple[Any, LlamaForCausalLM], calibration: Calibration) -> None:
    """The same children, judged by Hugging Face's model with columns of down_proj set to 0."""
    reference, model = pair
    channels = SIZES["intermediate_size"]
    order = []
    for index, layer in enumerate(reference.model.layers):
        squares = torch.cat([walked(reference, torch.tensor([ids]))[index][2][0] for ids in TEXTS]).square().mean(dim=0)
        order.append((squares.sqrt() * layer.mlp.down_proj.weight.norm(dim=0)).argsort(descending=True, stable=True))
    dense = reference(calibration.windows).logits.log_softmax(-1)

    def fitness(kept: dict[int, int]) -> float:
        cut = deepcopy(reference)
        for index, layer in enumerate(cut.model.layers):
            layer.mlp.down_proj.weight[:, order[index][kept[index] :]] = 0
        own = cut(calibration.windows).logits.log_softmax(-1)
        return float((dense.exp() * (dense - own))[:, 1:].sum())

    draws, parent = random.Random(1), dict.fromkeys(range(LAYERS), round(0.6 * channels))
    equal = best = fitness(parent)
    for step in STEPS:
        for _ in range(GENERATIONS):
            children = [moved(parent, dict.fromkeys(range(LAYERS), channels), step, draws) for _ in range(OFFSPRING)]
            for child, found in [(child, fitness(child)) for child in children]:
                if found < best:
                    best, parent = found, child
    pruning = pruning_for("tyr", request(model, calibration, ffn_ratio=0.4))
    assert isinstance(pruning.rule, StaticRule)
    kept = [pruning.rule.of[layer.mlp].partition.sizes.retained for layer in model.model.layers]
    assert kept == list(parent.values()) and sum(kept) == LAYERS * round(0.6 * channels)
    assert best < equal and len(set(kept)) > 1
    for index, layer in enumerate(model.model.layers):
        assert pruning.rule.of[layer.mlp].partition.retained.tolist() == sorted(order[index][: kept[index]].tolist())


def test_a_move_keeps_the_total_and_leaves_every_layer_something() -> None:
    draws, kept, channels = random.Random(0), {0: 2, 1: 79, 2: 40}, dict.fromkeys(range(3), 80)
    for _ in range(200):
        kept = moved(kept, channels, 8, draws)
        assert sum(kept.values()) == 121 and all(1 <= count <= 80 for count in kept.values())


@torch.inference_mode()
def test_probe_pruning_is_a_few_rows_that_decide_for_all(
    pair: tuple[Any, LlamaForCausalLM], calibration: Calibration
) -> None:
    """A walk over Hugging Face's layers: rows of largest norm, fused with the calibration, then a masked network."""
    reference, model = pair
    tokens = torch.randint(SIZES["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(2))
    prompt, kept = 22, round(0.6 * SIZES["intermediate_size"])
    x, positions = reference.model.embed_tokens(tokens), torch.arange(30)[None]
    turns, masks = reference.model.rotary_emb(x, positions), []
    future = torch.full((30, 30), -torch.inf).triu(1)[None, None]
    for index, layer in enumerate(reference.model.layers):
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=turns, attention_mask=future)[0]
        normed, mlp = layer.post_attention_layernorm(x), layer.mlp
        h = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)                 # [1, T, I]
        rows = x[0, :prompt].norm(dim=-1).argsort(descending=True)[: math.ceil(PROBED * prompt)]
        seen = h[0, rows].square().mean(dim=0)
        usual = calibration.moments[f"model.layers.{index}.mlp"].mean_square
        fused = usual * usual / (usual + seen) + seen * seen / (usual + seen)
        masks.append((fused.sqrt() * mlp.down_proj.weight.norm(dim=0)).argsort(descending=True)[:kept])
        on = torch.zeros(SIZES["intermediate_size"]).index_fill(0, masks[-1], 1)
        x = x + mlp.down_proj(h * on)
    wanted = reference.lm_head(reference.model.norm(x))[0, prompt - 1 :]
    pruning = pruning_for("probe-pruning", request(model, calibration, ffn_ratio=0.4))
    logits, state = prefilled(model, tokens[:, :prompt], pruning)
    for own, mask in zip(state.layers, masks, strict=True):
        assert own.ffn.partition.retained.tolist() == sorted(mask.tolist())
    steps = [logits, *(next_logits(model, token, state) for token in tokens[0, prompt:].split(1))]
    assert_same(torch.cat(steps), wanted)
    _, state = prefilled(model, tokens[:, :prompt], pruning)
    assert_same(evaluate(model, tokens[0, prompt:], state), wanted[1:])
    frozen = pruning_for("frozen", request(model, calibration, ffn_ratio=0.4))
    assert bytes_per_token(model, pruning) == bytes_per_token(model, frozen)


def test_padding_is_no_probe(model: LlamaForCausalLM) -> None:
    x, real = torch.rand(2, 12, SIZES["hidden_size"]), left_padded([12, 7], SIZES["vocab_size"])[1]
    x[1, :5] *= 100
    probe = probe_rows(x, real)
    assert len(probe) == math.ceil(PROBED * 19) and not set(probe.tolist()) & set(range(12, 17))
    assert set(probe_rows(x, None).tolist()) <= set(range(12, 17))


# Of each way in which a method prunes one: whole layers, halves of layers, channels in advance, channels of the prompt.
@pytest.mark.parametrize(("method", "weights"), [
    ("shortgpt", "int8"), ("finercut", "plain"), ("cfsp", "int8"), ("probe-pruning", "plain"),
])
@pytest.mark.slow
def test_compiled_and_packed_steps_do_the_same(method: str, weights: str, tmp_path: Path, short_calls: None) -> None:
    folder = complete_checkpoint(tmp_path, hidden_size=64, intermediate_size=128)
    eager, compiled = (load(folder, compile=one, weights=weights, dtype="float32") for one in (False, True))
    tokens = []
    for engine in (eager, compiled):
        made = calibrate(engine.model, TEXTS, "numbers")
        own = Request(engine.model, PruningSettings.paper(prune_ratio=0.3), made, 1, engine.resolve)
        tokens.append(generated(engine, [[5, 6, 7, 8, 9, 10]], 6, pruning_for(method, own)))  # type: ignore[arg-type]
    assert compiled.compiled is not None and tokens[0] == tokens[1]


def test_a_saved_calibration_serves_every_method_and_its_own_model_alone(
    model: LlamaForCausalLM, calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "made.safetensors"
    save_calibration(calibration, model, path)
    loaded = load_calibration(path, model)
    for name in ("influence", "angles", "windows"):
        assert torch.equal(getattr(loaded, name), getattr(calibration, name))
    settings = {"prune_ratio": 0.5}
    for method in ("shortgpt", "finercut"):
        one, other = (pruning_for(method, request(model, made, **settings)) for made in (calibration, loaded))
        assert one.left_out == other.left_out != ()
    other_model = saved_pair(tmp_path / "other", LlamaConfig(**SIZES))[1]
    with pytest.raises(InputError, match="made for another model"):
        load_calibration(path, other_model)
    for damage in ({"influence": torch.full((LAYERS,), math.nan)}, {"windows": torch.full((2, 9), 10**6)}):
        save_calibration(replace(calibration, **damage), model, path)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"what it says of \w+.layers is damaged"):
            load_calibration(path, model)


def test_what_cannot_be_is_said_in_one_line(
    model: LlamaForCausalLM, calibration: Calibration, tmp_path: Path
) -> None:
    for method, settings, words in (
        ("shortgpt", {"prune_ratio": 0.05}, "less than half of one of 4 layers"),
        ("finercut", {"prune_ratio": 0.01}, "less than any half of a layer holds"),
        ("shortgpt", {"prune_ratio": 0.5, "leave_out": "1"}, "chooses what is left out"),
        ("probe-pruning", {"prefill": "dense"}, "computes the prompt pruned"),
    ):
        with pytest.raises(InputError, match=words):
            pruning_for(method, request(model, calibration, **settings))
    with pytest.raises(InputError, match="leaves nothing of the 4 layers"):
        pruning_for("shortgpt", request(model, calibration, prune_ratio=0.95))
    mixture = saved_pair(tmp_path, MIXTRAL)[1]
    with pytest.raises(InputError, match="this model has experts"):
        pruning_for("probe-pruning", request(mixture, calibrate(mixture, TEXTS, "numbers")))


def test_score_takes_a_saved_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = complete_checkpoint(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("the river moved and the wall stayed where it was " * 40)
    common = ("--ckpt", folder, "--text", text, "--windows", 2, "--prompt-tokens", 16, "--score-tokens", 16, "--json")
    saved = tmp_path / "made.safetensors"
    made = ("--calibration-text", text, "--save-calibration", saved)
    assert exit_status(score.main, *common, "--method", "shortgpt", "--prune-ratio", 0.34, *made) == 0
    first = capsys.readouterr().out
    assert exit_status(score.main, *common, "--method", "shortgpt", "--prune-ratio", 0.34, "--calibration", saved) == 0
    assert capsys.readouterr().out == first and read_halves("0") != ()
    assert "is calibrated on a text" in one_line_error(score.main, capsys, *common[:-1], "--method", "tyr")
    flags = score.parser().parse_args(["--text", "x", "--calibration", str(saved)])
    assert calibration_for(flags, load(folder)) is not None


def test_compare_gives_no_setting_to_layers_alone_that_channels_would_need() -> None:
    words = ["--out", "x", "--methods", "pop", "shortgpt", "--layer-share", "1", "0.5", "--paper"]
    words += ["--candidate-width", "0.1", "0.4"]
    made = configurations(compare.parser().parse_args(words), mixture=False, pictures=False)
    assert [(one.method, one.settings.layer_share, one.settings.candidate_width) for one in made] == [
        ("pop", 1.0, 0.1), ("pop", 1.0, 0.4), ("shortgpt", 1.0, 0.1), ("shortgpt", 0.5, 0.1), ("shortgpt", 0.5, 0.4)
    ]
