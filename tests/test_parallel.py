"""A continuation in one pass is the same as step by step, for every kind of model, method and setting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mixtral import MIXTRAL, QWEN2_MOE
from test_pop import MODELS, SETTINGS
from tiny_models import SIZES, saved_pair
from transformers import LlamaConfig

from models.llama import LlamaForCausalLM
from models.parallel import decode_in_parallel
from models.pruning.settings import PruningSettings, resolve
from popengine.methods.activations import dense_activations, embedded, feed_forward_networks
from popengine.methods.by_name import METHODS, Request, settings_for
from popengine.methods.calibration import calibrate

CONFIGS: dict[str, Any] = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])[1]


def both_ways(model: LlamaForCausalLM, settings: PruningSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 24 steps after a prompt of 20 tokens, [24, V]: one by one, and in parallel."""
    tokens = torch.randint(SIZES["vocab_size"], (44,), generator=torch.Generator().manual_seed(5))
    pruning = resolve(settings, model.layer_weights())
    state = model.new_state(1, 48, pruning)
    model.prefill(model.embed(tokens[None, :20]), state)
    steps = torch.cat([model.decode(token[None], state) for token in tokens[20:]])
    model.prefill(model.embed(tokens[None, :20]), state)
    parallel = decode_in_parallel(model, tokens[20:], state)
    assert state.cache.filled == int(state.cache.length) == 44
    return steps, parallel


@pytest.mark.parametrize("settings", SETTINGS)
@torch.inference_mode()
def test_parallel_and_steps_agree(settings: str, model: LlamaForCausalLM) -> None:
    steps, parallel = both_ways(model, SETTINGS[settings])
    torch.testing.assert_close(parallel, steps, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_parallel_and_steps_agree_for_every_method(method: str, model: LlamaForCausalLM) -> None:
    settings = settings_for(method, request_for(model, PruningSettings(ffn_ratio=0.4)))
    steps, parallel = both_ways(model, settings)
    torch.testing.assert_close(parallel, steps, atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_each_position_picks_for_itself(tmp_path: Path) -> None:
    """One pick for all positions together, as a batch of sequences would make it, is not what steps do."""
    model = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    tokens = torch.arange(40)
    state = model.new_state(1, 40, resolve(PruningSettings(ffn_ratio=0.4, candidate_width=0.4), model.layer_weights()))
    model.prefill(model.embed(tokens[None, :16]), state)
    seen: list[tuple[Any, torch.Tensor]] = []
    decode_in_parallel(model, tokens[16:], state, lambda ffn, partition, keep: seen.append((partition, keep)))
    assert len(seen) == len(model.model.layers)
    for partition, keep in seen:
        assert keep.shape == (24, partition.sizes.candidate)
        assert (keep.sum(dim=1) == partition.sizes.pick).all()
        assert len(keep.unique(dim=0)) > 1


@torch.inference_mode()
def test_the_dense_walk_over_layers_sees_what_the_model_computes(model: LlamaForCausalLM) -> None:
    """The last layer's activations finish to the model's own logits; every token reaches its networks."""
    ids = list(range(30))
    walked = {activation.name: activation for activation in dense_activations(model, embedded(model, ids))}
    assert set(walked) <= set(feed_forward_networks(model))
    first = next(iter(walked.values()))
    state = model.new_state(1, 30, resolve(PruningSettings(ffn_ratio=0.5, prefill="dense"), model.layer_weights()))
    model.prefill(embedded(model, ids), state)
    scores = torch.linalg.vector_norm(first.h, dim=0) * first.ffn.down_norms()
    ffn = state.layers[0].ffn
    partition = ffn.partition if first.name.endswith("mlp") else ffn.partitions[int(first.name.rsplit(".", 1)[1])]
    assert scores[partition.retained].min() >= scores[partition.pruned].max()


@torch.inference_mode()
def request_for(model: LlamaForCausalLM, settings: PruningSettings) -> Request:
    texts = [embedded(model, list(range(start, start + 40))) for start in (0, 30, 50)]
    return Request(model, replace(settings), calibrate(model, texts, "numbers"), seed=3)
