"""A continuation in one pass is the same as step by step, for every kind of model, method and setting."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MIXTRAL, MODELS, QWEN2_MOE, SETTINGS, SIZES, prefilled, resolved, saved_pair
from tolerance import assert_same
from transformers import LlamaConfig

from models.llama import LlamaForCausalLM
from models.mixtral import MixtralForCausalLM
from models.pruning.pruning import Pruning
from popengine.engine.run import next_logits
from popengine.studies.activations import Activation, embedded, feed_forward_networks, watch_dense
from popengine.studies.by_name import METHODS, Request, pruning_for
from popengine.studies.calibration import Calibration, calibrate
from popengine.studies.known_text import evaluate, evaluate_branches
from popengine.studies.recording import recorded
from popengine.studies.settings import PruningSettings
from weights.errors import InputError

CONFIGS: dict[str, Any] = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])[1]


def both_ways(model: LlamaForCausalLM, settings: PruningSettings | Pruning) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 24 steps after a prompt of 20 tokens, [24, V]: one by one, and in parallel."""
    tokens = torch.randint(SIZES["vocab_size"], (44,), generator=torch.Generator().manual_seed(5))
    _, state = prefilled(model, tokens[None, :20], settings, capacity=48)
    steps = torch.cat([next_logits(model, token[None], state) for token in tokens[20:]])
    model.prefill(model.embed(tokens[None, :20]), state)
    parallel = evaluate(model, tokens[20:], state)
    assert state.cache.filled == int(state.cache.length) == 44
    return steps, parallel


@pytest.mark.parametrize("settings", SETTINGS)
@torch.inference_mode()
def test_parallel_and_steps_agree(settings: str, model: LlamaForCausalLM) -> None:
    steps, parallel = both_ways(model, SETTINGS[settings])
    assert_same(parallel, steps)


@pytest.fixture(scope="module")
def calibration(model: LlamaForCausalLM) -> Calibration:
    texts = [list(range(start, start + 40)) for start in (0, 30, 50)]
    return calibrate(model, texts, "numbers")


# Týr searches for a second, and what it finds is a fixed mask as others find it: of each kind of network one model.
@pytest.mark.parametrize("family", ["grouped_query", "mixtral"])
@torch.inference_mode()
def test_parallel_and_steps_agree_for_tyr(family: str, tmp_path: Path) -> None:
    model = saved_pair(tmp_path, CONFIGS[family])[1]
    calibration = calibrate(model, [list(range(40))], "numbers")
    request = Request(model, PruningSettings.paper(ffn_ratio=0.4), calibration, seed=3)
    steps, parallel = both_ways(model, pruning_for("tyr", request))
    assert_same(parallel, steps)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "tyr"])
@torch.inference_mode()
def test_parallel_and_steps_agree_for_every_method(
    method: str, model: LlamaForCausalLM, calibration: Calibration, exact_drafts: None
) -> None:
    skip = "1/3" if "skip" in method or method == "prefill-only" else 0
    thin = 4 if method == "visual-tokens" else "all"            # of pictures, which these prompts have none of
    settings = PruningSettings.paper(ffn_ratio=0.4, prefill_skip=skip, prior=1, visual_tokens=thin)
    request, has_experts = Request(model, settings, calibration, seed=3), isinstance(model, MixtralForCausalLM)
    if (method == "probe-pruning" and has_experts) or (method in ("router-statistics", "uncurl") and not has_experts):
        with pytest.raises(InputError, match=r"this model has (experts|none)"):
            pruning_for(method, request)
        return
    pruning = pruning_for(method, request)
    steps, parallel = both_ways(model, pruning)
    assert_same(parallel, steps)
    # Two texts after one prompt, one of them the same: neither sees the other, and an empty one has no logits.
    tokens = torch.randint(SIZES["vocab_size"], (44,), generator=torch.Generator().manual_seed(5))
    _, state = prefilled(model, tokens[None, :20], pruning, capacity=64)
    first, none, second = evaluate_branches(model, [tokens[30:44], tokens[:0], tokens[20:44]], state)
    assert_same(second, steps)
    state.cache.go_back(20)
    assert_same(first, evaluate(model, tokens[30:44], state))
    assert len(none) == 0


@torch.inference_mode()
def test_each_position_picks_for_itself(tmp_path: Path) -> None:
    """One pick for all positions together, as a batch of sequences would make it, is not what steps do."""
    model = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    tokens = torch.arange(40)
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.4)
    seen: list[tuple[Any, torch.Tensor]] = []
    pruning = recorded(resolved(model, settings), lambda ffn, partition, keep: seen.append((partition, keep)))
    _, state = prefilled(model, tokens[None, :16], pruning)
    evaluate(model, tokens[16:], state)
    assert len(seen) == len(model.model.layers)
    for partition, keep in seen:
        assert keep.shape == (1, 24, partition.sizes.candidate)
        assert (keep.sum(dim=-1) == partition.sizes.pick).all()
        assert len(keep[0].unique(dim=0)) > 1


@torch.inference_mode()
def test_the_dense_walk_over_layers_sees_what_the_model_computes(model: LlamaForCausalLM) -> None:
    """What is shown of the first network ranks its channels as a prompt does; every token reaches its networks."""
    ids = list(range(30))
    walked: dict[str, Activation] = {}
    watch_dense(model, embedded(model, ids), lambda one: walked.update({one.name: one}))
    assert set(walked) <= set(feed_forward_networks(model))
    layers: dict[str, list[torch.Tensor]] = {}
    for name, one in walked.items():
        assert len(one.positions) == len(one.h)
        layers.setdefault(".".join(name.split(".")[:3]), []).append(one.positions)
    assert len(layers) == len(model.model.layers)
    for positions in layers.values():
        assert set(torch.cat(positions).tolist()) == set(range(30))
    first = next(iter(walked.values()))
    _, state = prefilled(model, torch.tensor([ids]), PruningSettings.paper(ffn_ratio=0.5, prefill="dense"))
    scores = torch.linalg.vector_norm(first.h, dim=0) * first.ffn.down_norms()
    ffn = state.layers[0].ffn
    if not first.name.endswith("mlp"):
        ffn = ffn.active[int(first.name.rsplit(".", 1)[1])]
    assert scores[ffn.partition.retained].min() >= scores[ffn.partition.pruned].max()
