"""A step can be captured by a CUDA graph: every tensor that it reads keeps its address and shape between steps."""

import pytest
import torch
from builders import MODELS, SIZES, left_padded, prefilled, saved_pair

from models.compiled import tensors_of
from models.llama import LlamaForCausalLM
from models.state import DecodeState
from popengine.engine.run import next_logits
from popengine.studies.settings import RULE_NAMES, PruningSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("llama"), MODELS["multi_head"])[1]


def addresses(state: DecodeState) -> dict[str, tuple[int, tuple[int, ...]]]:
    found = tensors_of([state.cache, state.layers, state.live])
    return {path: (one.data_ptr(), tuple(one.shape)) for path, one in found.items()}


@pytest.mark.parametrize("rule", RULE_NAMES)
@torch.inference_mode()
def test_addresses_stay_from_step_to_step_and_from_prompt_to_prompt(rule: str, model: LlamaForCausalLM) -> None:
    settings = PruningSettings.paper(
        ffn_ratio=0.4, candidate_width=0.3, head_ratio=0.5, rule=rule, prior=1, dense_every=3, redraw_every=3
    )
    tokens, _ = left_padded([12, 12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, settings)
    before = addresses(state)
    assert any("candidate_norms" in path for path in before) and any("keys" in path for path in before)
    for step in range(8):               # pruned steps, dense ones, and dense ones that partition again
        next_logits(model, tokens[:, step], state)
        assert addresses(state) == before
    assert state.schedule.redraws > 0
    model.prefill(model.embed(tokens[:, :9]), state)
    assert addresses(state) == before
