"""Every family on a CUDA device that computes nothing: no tensor is on another device, no step waits for the device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import LLAVA_TINY, MIXTRAL, MODELS, QWEN2_MOE, SETTINGS, resolved
from fake_cuda import Waits, fake_cuda, moved
from tiny_gemma import PICTURE_VARIANTS
from tiny_qwen_vl import FAMILIES as QWEN_VL
from tiny_qwen_vl import VARIANTS as QWEN_VL_VARIANTS
from torch import Tensor
from transformers import MixtralConfig, Qwen2MoeConfig

from models.matrices.packed import Int8Matrix
from models.passes import PictureRows
from models.registry import architecture
from popengine.engine.run import next_logits
from popengine.studies.settings import DENSE, RULE_NAMES, PruningSettings
from weights.json_files import read_json

POP, BOTH = SETTINGS["ffn"], SETTINGS["both"]
# Four experts, so that equal counts divide the tokens.
MIXTURES = {
    "mixtral": MixtralConfig(**MIXTRAL.to_dict() | {"num_local_experts": 4}),
    "qwen2_moe": Qwen2MoeConfig(**QWEN2_MOE.to_dict() | {"num_experts": 4}),
}


def short(config: Any) -> dict[str, Any]:
    """A config with two layers, which are of both kinds where a family has two: fake tensors are slow."""
    found = config.to_dict() | {"num_hidden_layers": 2}
    return found | ({"layer_types": found["layer_types"][:2]} if found.get("layer_types") else {})


FAMILIES = {name: short(config) for name, config in (MODELS | MIXTURES).items()}
# A prompt that skips layers, then dense steps and new partitions.
EVERYTHING = replace(BOTH, dense_every=2, redraw_every=2, prefill_skip="1/2", boundary_tokens=3)
WAYS = {
    "dense steps and new partitions": replace(BOTH, dense_every=2, redraw_every=2),
    "skipped layers": replace(BOTH, prefill_skip="1/2", boundary_tokens=3),
}
MORE_WAYS = WAYS | {
    "dense": DENSE,
    "dense prefill": replace(BOTH, prefill="dense"),
    "no candidates": SETTINGS["frozen"],
    "little evidence": replace(POP, min_evidence=28),
    "a layer less": replace(POP, leave_out="1"),
}
BATCH, PROMPT, STEPS = 2, 10, 3


@pytest.fixture
def waits() -> Iterator[Waits]:
    with fake_cuda() as modes, torch.inference_mode():
        yield modes


def on_cuda(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        model = architecture(config, "config.json").from_config(config)
    moved(model, dtype)
    return model


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device="cuda")


def waiting_steps(
    model: Any, settings: PruningSettings, waits: Waits, x: Tensor | None = None, pictures: PictureRows | None = None
) -> list[str]:
    """A prompt and steps; returns the places where a step waited. What the core is asked stands here alone."""
    x = model.embed(zeros(BATCH, PROMPT)) if x is None else x
    state = model.new_state(BATCH, PROMPT + STEPS, resolved(model, settings))
    logits = model.prefill(x, state, pictures=pictures)
    waits.places.clear()
    for _ in range(STEPS):
        assert (logits.device.type, logits.dtype, len(logits)) == ("cuda", model.dtype, BATCH)
        logits = next_logits(model, logits.argmax(dim=-1), state)
    return waits.places


@pytest.mark.parametrize("family", MODELS)
def test_steps_do_not_wait(family: str, waits: Waits) -> None:
    assert not waiting_steps(on_cuda(FAMILIES[family]), EVERYTHING, waits)


@pytest.mark.parametrize("way", MORE_WAYS)
def test_no_way_to_run_a_prompt_or_steps_mixes_devices(way: str, waits: Waits) -> None:
    assert not waiting_steps(on_cuda(FAMILIES["grouped_query"], torch.float32), MORE_WAYS[way], waits)


@pytest.mark.parametrize(
    ("family", "rule"), [*(("query_key_norm", rule) for rule in RULE_NAMES), ("mixtral", "up"), ("mixtral", "draft")]
)
def test_steps_of_every_rule_stay_on_the_device(family: str, rule: str, waits: Waits) -> None:
    model = on_cuda(FAMILIES[family], torch.float16)
    places = waiting_steps(model, replace(POP, rule=rule, prior=1), waits)
    assert all("experts.py" in place for place in places)


@pytest.mark.parametrize(("family", "way"), [*zip(MIXTURES, WAYS, strict=True)])
def test_steps_of_mixtures_wait_for_their_routers_alone(family: str, way: str, waits: Waits) -> None:
    """Which experts run is decided on the host."""
    places = waiting_steps(on_cuda(FAMILIES[family]), WAYS[way], waits)
    assert places and all("experts.py" in place for place in places)


def picture_model(family: str) -> Any:
    if family == "llava":
        return on_cuda(read_json(LLAVA_TINY / "config.json"))
    if family == "gemma3":
        return on_cuda(next(iter(PICTURE_VARIANTS.values())).to_dict())
    return on_cuda(QWEN_VL_VARIANTS[family][1].to_dict())


@pytest.mark.parametrize("family", ["llava", "gemma3", *QWEN_VL])
def test_pictures_stay_on_the_device(family: str, waits: Waits) -> None:
    model = picture_model(family)
    settings = WAYS["dense steps and new partitions"]
    if family in QWEN_VL:
        patches = model.config.vision.patch_size ** 2 * 3 * 2
        features = model.encode_images(torch.zeros(4 * 6, patches, device="cuda"), [(2, 3)])
        rows = PictureRows(zeros(3, BATCH, PROMPT), zeros(BATCH, 1))
    else:
        size = model.config.vision.image_size
        features = model.encode_images(torch.zeros(1, 3, size, size, device="cuda"), [(1, 1)])
        rows = PictureRows(blocks=zeros(BATCH, PROMPT)) if family == "gemma3" else PictureRows()
    assert features.device.type == "cuda" and features.dtype == torch.bfloat16
    text = model.language_model
    assert not waiting_steps(text, settings, waits, text.embed(zeros(BATCH, PROMPT)), rows)


def test_eight_bits_multiply_and_are_copied_on_the_device(waits: Waits) -> None:
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    matrix, x = Int8Matrix.with_room(64, 96, like, None), torch.empty(1, 1, 96, dtype=torch.bfloat16, device="cuda")
    rows, columns = matrix.empty_rows(5), matrix.empty_columns(7)
    rows.copy_rows(matrix, zeros(5))
    columns.copy_columns(matrix, zeros(7))
    for one, given, out in ((matrix, x, 64), (rows, x, 5), (columns, x[..., :7], 64)):
        y = one(given)
        assert (y.device.type, y.dtype, y.shape[-1]) == ("cuda", torch.bfloat16, out)
    assert not waits.places


def test_the_fake_device_refuses_other_devices_and_notes_who_waits(waits: Waits) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        zeros(3) + torch.ones(3)
    assert not waits.places
    for wait in (lambda x: bool(x.any()), lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: int(x[0])):
        wait(zeros(3))
        assert waits.places.pop() == "?" and not waits.places
