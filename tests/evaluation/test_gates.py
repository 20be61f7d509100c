"""The virtual gates: gradients that are what they are said to be, and the command that shows them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    LLAVA_TINY,
    MIXTRAL,
    MIXTRAL_TINY,
    MODELS,
    QWEN2_MOE,
    SIZES,
    exit_status,
    left_padded,
    one_line_error,
    saved_pair,
)
from tolerance import assert_same

from models.llama import LlamaForCausalLM
from popengine.engine.loading import load
from popengine.evaluation.gates import OUTPUT, PROMPT, answered, gated_loss, gradients, of_questions, study
from popengine.evaluation.tasks import questions_for
from popengine.gates import main

FAMILIES: dict[str, Any] = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
LAYERS, PROMPT_TOKENS, ANSWER = SIZES["num_hidden_layers"], 9, [5, 6, 7, 8]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])[1].double()


@pytest.fixture
def x(model: LlamaForCausalLM) -> torch.Tensor:
    prompt = left_padded([PROMPT_TOKENS], SIZES["vocab_size"])[0]
    return model.embed(torch.cat([prompt, torch.tensor([ANSWER[:-1]])], dim=1))


def test_open_gates_leave_the_model_as_it_is(model: LlamaForCausalLM, x: torch.Tensor) -> None:
    log_p = model.forward_embedded(x)[0, PROMPT_TOKENS - 1 :].float().log_softmax(dim=-1)
    wanted = -log_p.gather(1, torch.tensor(ANSWER)[:, None]).sum()
    loss = gated_loss(model, x, torch.ones(x.shape[1], LAYERS), ANSWER)
    assert_same(loss, wanted)


def test_the_last_layer_does_not_matter_to_the_prompt(model: LlamaForCausalLM, x: torch.Tensor) -> None:
    found = gradients(model, x, PROMPT_TOKENS, ANSWER)
    assert found[PROMPT, -1] == 0
    assert (found[PROMPT, :-1] != 0).all() and (found[OUTPUT] != 0).all()


def test_both_gradients_add_up_to_that_of_one_shared_gate(model: LlamaForCausalLM, x: torch.Tensor) -> None:
    with torch.enable_grad():
        shared = torch.ones(LAYERS, requires_grad=True)
        loss = gated_loss(model, x, shared.expand(x.shape[1], -1), ANSWER)
        (wanted,) = torch.autograd.grad(loss, shared)
    assert_same(gradients(model, x, PROMPT_TOKENS, ANSWER).sum(dim=0), wanted)


@torch.no_grad()
def test_a_gradient_is_the_slope_of_the_loss(model: LlamaForCausalLM, x: torch.Tensor) -> None:
    found = gradients(model, x, PROMPT_TOKENS, ANSWER)
    for kind, at in ((PROMPT, slice(PROMPT_TOKENS - 1)), (OUTPUT, slice(PROMPT_TOKENS - 1, None))):
        losses = []
        for change in (-1e-3, 1e-3):
            gates = torch.ones(x.shape[1], LAYERS, dtype=torch.float64)
            gates[at, 0] += change
            losses.append(float(gated_loss(model, x, gates, ANSWER)))
        assert (losses[1] - losses[0]) / 2e-3 == pytest.approx(float(found[kind, 0]), rel=0.05, abs=1e-3)


@pytest.mark.parametrize(("folder", "tasks"), [(LLAVA_TINY, "pictures"), (MIXTRAL_TINY, "text")])
def test_questions_and_pictures_can_be_prompts(folder: Path, tasks: str) -> None:
    engine = load(folder, device="cpu", dtype="float32")
    samples = answered(engine, of_questions(engine, questions_for(tasks, 1, 0)[:2]), 6, seed=0)
    assert all(1 <= len(sample.answer) <= 6 for sample in samples)
    found = study(engine, samples, show_progress=False)
    assert (found.samples, found.importance.shape) == (2, (2, engine.model.config.num_hidden_layers))
    assert found.importance[PROMPT, -1] == 0 and (found.importance[OUTPUT] > 0).all()
    shares = [(row["prompt_share"], row["output_share"]) for row in found.rows()]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([1, 1])


def test_the_command_writes_a_table_and_a_plot(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--ckpt", checkpoint, "--text", text, "--samples", 2, "--prompt-tokens", 20, "--answer-tokens", 4]
    assert exit_status(main, *flags, "--out", tmp_path / "new") == 0
    assert capsys.readouterr().out == (tmp_path / "new" / "gates.md").read_text()
    assert len(json.loads((tmp_path / "new" / "gates.json").read_text())["rows"]) == LAYERS
    assert (tmp_path / "new" / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = partial(one_line_error, main, capsys, "--ckpt", checkpoint, "--out", tmp_path)
    assert "one of the two" in error() and "one of the two" in error("--text", text, "--tasks", "text")
    assert "samples must be at least 1, not 0" in error("--text", text, "--samples", 0)
    assert "answer tokens must be at least 1" in error("--text", text, "--answer-tokens", 0)
    assert "there are text, pictures" in error("--tasks", "puzzles")
    assert "give a longer text" in error("--text", text, "--samples", 5000)
