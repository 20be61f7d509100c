"""The n-th identical request gives the first one's logits exactly, whatever ran in the engine in between.

Buffers are reused from request to request. Nothing that belongs to one expert, one sequence or one request may stay in
them: the fault that this file guards against let an expert begin with another expert's prior.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LLAVA_TINY, MIXTRAL, MIXTRAL_TINY, MODELS, QWEN2_MOE, complete_checkpoint, interrupted
from torch import Tensor

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import PruningSettings

FAMILIES = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
# Every setting that keeps evidence, or decides what becomes of it.
KEEPS_EVIDENCE: dict[str, dict[str, Any]] = {
    "prior": {"prior": 8},
    "min_evidence": {"min_evidence": 12},
    "dense_every": {"dense_every": 2},
    "redraw_every": {"dense_every": 2, "redraw_every": 3},
    "up": {"rule": "up", "prior": 8, "dense_every": 3, "redraw_every": 3},
    "gate": {"rule": "gate", "prior": 8},
    "glass": {"rule": "glass", "prior": 8},
    "head_ratio": {"head_ratio": 0.5, "prior": 8, "candidate_width": 0.6},
    "unseen_experts": {"unseen_experts": "dense", "min_tokens": 3, "dense_every": 3, "redraw_every": 3},
}
OF_PICTURES: dict[str, dict[str, Any]] = {
    "prefill_skip": {"prefill_skip": 0.5, "min_evidence": 3},
    "visual_tokens": {"visual_tokens": 0.5, "prior": 8, "visual_tokens_layer": 1},
    "diversity": {"visual_tokens": 4, "visual_tokens_by": "diversity", "scored_tokens": "text"},
}


@dataclass
class Asked:
    """An engine, and a request of it: token ids with whatever pictures it reads."""

    engine: Engine
    ids: list[int]
    images: list[Path]


# Evidence is kept by networks, heads and experts alone: a model of each kind has every setting, and the others, which
# differ in their attention, have the two that keep most.
EVERY_SETTING = ("grouped_query", "mixtral", "qwen2_moe")


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    name = request.param
    if name in FAMILIES:
        folder = complete_checkpoint(tmp_path_factory.mktemp(name), FAMILIES[name], max_position_embeddings=128)
        return Asked(load(folder, dtype="float32"), list(range(40, 50)), [])
    if name == "mixtral_tiny":
        return Asked(load(MIXTRAL_TINY, dtype="float32"), list(range(60, 70)), [])
    engine, images = load(LLAVA_TINY, dtype="float32"), [LLAVA_TINY / "example.png"]
    return Asked(engine, engine.prompts.ids("What is it?", images=images), images)


def heard(asked: Asked, settings: PruningSettings, ids: list[int] | None = None) -> list[Tensor]:
    """The logits that each token of the request (of these ids instead) was chosen from, [1, V] each."""
    images = asked.images if ids is None else []
    run = asked.engine.run([ids or asked.ids], 7, settings, ignore_eos=True, images=images)
    seen, choose = [], run.choose

    def listening(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return choose(logits)

    run.choose = listening  # type: ignore[method-assign]
    for _ in run:
        pass
    return seen


CASES = [
    *((model, name) for model in EVERY_SETTING for name in KEEPS_EVIDENCE),
    *((model, name) for model in FAMILIES if model not in EVERY_SETTING for name in ("up", "head_ratio")),
    *(("mixtral_tiny", name) for name in ("up", "unseen_experts")),
    *(("llava_tiny", name) for name in [*KEEPS_EVIDENCE, *OF_PICTURES]),
]


# The scope is what keeps an engine for all its cases.
@pytest.mark.parametrize(("asked", "name"), CASES, indirect=["asked"], scope="module")
def test_a_request_gives_the_first_ones_logits_again(asked: Asked, name: str) -> None:
    pruning = PruningSettings.paper(**{"ffn_ratio": 0.5, "candidate_width": 0.3} | (KEEPS_EVIDENCE | OF_PICTURES)[name])
    engine, other = asked.engine, [39, 58, 57, 40, 41, 53, 52, 30, 42, 77, 65, 36]
    wanted = heard(asked, pruning)

    def again() -> None:
        for new, old in zip(heard(asked, pruning), wanted, strict=True):
            assert torch.equal(new, old)

    again()
    heard(asked, pruning, other)
    again()
    for layer, call in ((1, 1), (0, 4)):                            # in the prompt, in a step
        with interrupted(engine.model, layer, call):
            heard(asked, pruning, other)
        again()
    for _ in engine.run([other, [50]], 4, pruning):                  # padded, and in buffers of another size
        pass
    next(iter(engine.run([other], 5, pruning)))                     # nobody goes on with it
    again()


def test_prompts_of_other_lengths_share_the_copies_and_change_nothing(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path, MODELS["grouped_query"], max_position_embeddings=512)
    engine, pruning = load(folder, dtype="float32"), PruningSettings.paper(ffn_ratio=0.5, candidate_width=0.3)
    prompts = [list(range(40, 40 + length)) for length in (10, 60)]
    prompts.append(prompts[1] * 3)                                  # 180 tokens: another capacity
    buffers = set()
    for prompt in (prompts[0], prompts[2], prompts[1], prompts[2], prompts[0]):
        found = heard(Asked(engine, prompt, []), pruning)
        for new, old in zip(found, heard(Asked(load(folder, dtype="float32"), prompt, []), pruning), strict=True):
            assert torch.equal(new, old)
        state = engine.idle_state
        assert state is not None and state.cache.capacity == engine.capacity(len(prompt) + len(found))
        buffers.add(tuple(layer.ffn.weights.gate.weight.data_ptr() for layer in state.layers))
    assert len(buffers) == 1


@pytest.mark.parametrize("asked", [*FAMILIES, "llava_tiny"], indirect=True)         # mixtral_tiny has no chat template
def test_a_conversation_begun_anew_says_what_it_said_at_first(asked: Asked) -> None:
    pruning = PruningSettings.paper(
        ffn_ratio=0.5, head_ratio=0.5, candidate_width=0.6, rule="up", prior=8, min_evidence=9, dense_every=3,
        redraw_every=3,
    )
    conversation = asked.engine.chat(pruning=pruning, max_new_tokens=8)
    text, images, other = "and what is it?", asked.images, "no, another one"
    wanted = conversation.say(text, images).token_ids

    def again() -> None:
        conversation.begin_anew()                                   # as /reset does
        assert conversation.say(text, images).token_ids == wanted

    again()
    next(conversation.stream(other))
    again()
    with interrupted(asked.engine.model, 1, 2):
        conversation.say(other)
    again()
