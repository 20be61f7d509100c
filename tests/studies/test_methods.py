"""Static methods and calibration: what they keep, that they run on the same path, and what they refuse."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import MIXTRAL, SIZES, prefilled, resolved, saved_pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.cost_model import bytes_per_token
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.pruning.pruning import Pruning
from popengine.engine.run import next_logits
from popengine.studies.activations import Activation, embedded, feed_forward_networks, watch_dense
from popengine.studies.by_name import METHODS, Request, pruning_for
from popengine.studies.calibration import Calibration, calibrate, load_calibration, save_calibration
from popengine.studies.rules import StaticRule
from popengine.studies.settings import DENSE, INPUT_METHODS, PruningSettings
from weights.errors import InputError

SETTINGS = PruningSettings.paper(ffn_ratio=0.4)
STATIC = ("random", "magnitude", "wanda-sp", "flap", "cfsp", "tyr")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES))[1]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("mixtral"), MIXTRAL)[1]


TEXTS = [list(range(start, start + 40)) for start in (0, 30, 50)]


@pytest.fixture(scope="module")
def calibration(model: LlamaForCausalLM) -> Calibration:
    return calibrate(model, TEXTS, "numbers")


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM, settings: PruningSettings | Pruning, tokens: Tensor, prompt: int) -> Tensor:
    """Prefill, then steps: [1 + steps, V]"""
    first, state = prefilled(model, tokens[:, :prompt], settings)
    return torch.cat([first, *(next_logits(model, token, state) for token in tokens[:, prompt:].T)])


def static_rule(method: str, request: Request) -> StaticRule:
    rule = pruning_for(method, request).rule
    assert isinstance(rule, StaticRule)
    return rule


@pytest.mark.parametrize("method", STATIC)
@torch.inference_mode()
def test_a_static_method_is_the_dense_network_with_channels_cut_out(
    method: str, model: LlamaForCausalLM, calibration: Calibration, tmp_path: Path
) -> None:
    """Prompt and steps: the same logits as a dense model whose down_proj columns were set to 0 and biases added."""
    pruning = pruning_for(method, Request(model, SETTINGS, calibration, seed=1))
    assert isinstance(pruning.rule, StaticRule)
    cut = saved_pair(tmp_path, LlamaConfig(**SIZES, mlp_bias=True))[1]
    cut.load_state_dict(model.state_dict(), strict=False)
    for name, ffn in feed_forward_networks(model).items():
        other, static = cut.get_submodule(name), pruning.rule.of[ffn]
        assert isinstance(other, FeedForward)
        other.down_proj.weight[:, static.partition.pruned] = 0
        for projection in (other.gate_proj, other.up_proj, other.down_proj):
            projection.bias.zero_()
        if static.bias is not None:
            other.down_proj.bias.copy_(static.bias)
    tokens = torch.randint(SIZES["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(2))
    wanted = cut(tokens)[0, 19:]
    assert_same(logits_of(model, pruning, tokens, 20), wanted)


@pytest.mark.parametrize("method", STATIC)
@torch.inference_mode()
def test_static_methods_keep_the_budget_in_every_model(method: str, model: LlamaForCausalLM,
                                                       mixture: LlamaForCausalLM) -> None:
    for one in (model, mixture):
        made = calibrate(one, TEXTS, "numbers")
        pruning = pruning_for(method, Request(one, SETTINGS, made))
        assert isinstance(pruning.rule, StaticRule)
        sizes = [static.partition.sizes for static in pruning.rule.of.values()]
        assert sum(size.retained for size in sizes) == len(sizes) * round(0.6 * SIZES["intermediate_size"])
        frozen = resolved(one, replace(SETTINGS, candidate_width=0.0))
        assert bytes_per_token(one, pruning) == pytest.approx(bytes_per_token(one, frozen), rel=1e-3)


@torch.inference_mode()
def test_flap_gives_networks_unequal_shares_and_keeps_the_mean(
    model: LlamaForCausalLM, calibration: Calibration
) -> None:
    rule = static_rule("flap", Request(model, SETTINGS, calibration))
    assert len({static.partition.sizes.retained for static in rule.of.values()}) > 1
    name, ffn = next(iter(feed_forward_networks(model).items()))
    static = rule.of[ffn]
    wanted = ffn.down_proj.weight[:, static.partition.pruned] @ calibration.moments[name].mean[static.partition.pruned]
    assert static.bias is not None
    assert_same(static.bias, wanted)


@torch.inference_mode()
def test_magnitude_keeps_the_channels_with_the_largest_weight(model: LlamaForCausalLM) -> None:
    rule = static_rule("magnitude", Request(model, SETTINGS))
    for ffn in feed_forward_networks(model).values():
        rows = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight], dim=1).abs().amax(dim=1)
        partition = rule.of[ffn].partition
        assert rows[partition.retained].min() >= rows[partition.pruned].max()


@torch.inference_mode()
def test_calibration_is_mean_and_variance_over_all_texts(model: LlamaForCausalLM, calibration: Calibration) -> None:
    h: dict[str, list[Tensor]] = {}

    def watch(activation: Activation) -> None:
        h.setdefault(activation.name, []).append(activation.h)

    for ids in TEXTS:
        watch_dense(model, embedded(model, ids), watch)
    for name, moments in calibration.moments.items():
        together = torch.cat(h[name])
        assert moments.tokens == len(together) == 120
        assert_same(moments.mean, together.mean(dim=0))
        assert_same(moments.variance, together.var(dim=0))
        assert_same(moments.mean_square, together.square().mean(dim=0))


@torch.inference_mode()
def test_a_saved_calibration_is_the_same_and_only_for_its_model(
    model: LlamaForCausalLM, mixture: LlamaForCausalLM, calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.safetensors"
    save_calibration(calibration, model, path)
    loaded = load_calibration(path, model)
    assert loaded.made_from == "numbers"
    for name, moments in calibration.moments.items():
        assert loaded.moments[name].tokens == moments.tokens
        assert torch.equal(loaded.moments[name].variance, moments.variance)
    other = saved_pair(tmp_path / "other", LlamaConfig(**SIZES))[1]
    other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    for wrong in (mixture, other):
        with pytest.raises(InputError, match=r"made for another model.*numbers"):
            load_calibration(path, wrong)


def test_what_is_no_calibration_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_calibration(tmp_path / "none.safetensors", model)
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 10)
    for path in (tmp_path / "junk.safetensors", tmp_path / "other" / "model.safetensors"):
        saved_pair(tmp_path / "other", LlamaConfig(**SIZES))
        with pytest.raises(InputError, match="not a calibration of popengine"):
            load_calibration(path, model)


@pytest.fixture(scope="module")
def saved(mixture: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "calibration.safetensors"
    save_calibration(calibrate(mixture, TEXTS, "numbers"), mixture, path)
    return path


EDITS = {
    **{str(dtype): lambda held, dtype=dtype: held.to(dtype) for dtype in (
        torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int32, torch.float64, torch.bfloat16
    )},
    "not a number": lambda held: torch.full(held.shape, math.nan), "infinite": lambda held: held / 0,
    "too large": lambda held: torch.full(held.shape, 3e38).to(held.dtype), "negative": lambda held: -1 - held.abs(),
    "too long": lambda held: torch.zeros(*held.shape[:-1], 5000, dtype=held.dtype),
    "another shape": lambda held: held[None], "empty": lambda held: held.flatten()[:0],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["tokens", "mean", "variance", "influence.layers", "angles.layers", "windows.layers",
                                  "weights", "likeness"])
def test_edited_calibrations_are_refused_in_a_line(
    name: str, edit: str, mixture: LlamaForCausalLM, saved: Path, tmp_path: Path
) -> None:
    tensors = load_file(saved)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = EDITS[edit](tensors[key]).contiguous()
    with safe_open(saved, framework="pt") as file:
        save_file(tensors, tmp_path / "edited.safetensors", file.metadata())
    if (name, edit) == ("mean", "negative"):            # as it may be
        load_calibration(tmp_path / "edited.safetensors", mixture)
        return
    with pytest.raises(InputError, match=f"what it says of {key} is damaged: it should be "):
        load_calibration(tmp_path / "edited.safetensors", mixture)


def test_unknown_methods_missing_calibration_and_heads_are_named(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=f"unknown method 'wand'.*{', '.join(METHODS)}"):
        pruning_for("wand", Request(model, SETTINGS))
    for method in ("wanda-sp", "flap", "cfsp", "tyr", "probe-pruning", "shortgpt", "finercut"):
        with pytest.raises(InputError, match=f"{method} is calibrated on a text"):
            pruning_for(method, Request(model, SETTINGS))
    with pytest.raises(InputError, match="prune no heads"):
        pruning_for("magnitude", Request(model, replace(SETTINGS, head_ratio=0.5)))


@torch.inference_mode()
def test_ratio_zero_is_dense_under_every_method(model: LlamaForCausalLM, calibration: Calibration) -> None:
    tokens = torch.arange(24)[None]
    wanted = logits_of(model, DENSE, tokens, 16)
    for method in METHODS:
        refusing = ("prefill-only", "visual-tokens", "router-statistics", "uncurl")
        if "skip" in method or method in (*refusing, *INPUT_METHODS):
            continue                    # they refuse to leave out nothing, or leave out inputs whatever the ratio
        pruning = pruning_for(method, Request(model, replace(DENSE, prior=1), calibration))
        assert_same(logits_of(model, pruning, tokens, 16), wanted)
