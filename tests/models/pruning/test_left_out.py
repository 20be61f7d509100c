"""Layers and halves of layers that neither prompts nor steps run, beside Hugging Face's model without them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    MIXTRAL,
    MODELS,
    SETTINGS,
    SIZES,
    complete_checkpoint,
    generated,
    left_padded,
    one_line_error,
    ours,
    prefilled,
    random_reference,
    resolved,
    saved_pair,
)
from slow_left_out import without
from tolerance import assert_same

from models.cost_model import bytes_per_token, cache_bytes
from models.llama import LlamaForCausalLM
from popengine import explain, generate
from popengine.benchmark.prompt_work import prompt_work
from popengine.engine.loading import load
from popengine.engine.run import next_logits
from popengine.studies.known_text import evaluate
from popengine.studies.left_out import Half, read_halves, written_halves
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

FAMILIES: dict[str, Any] = MODELS | {"mixtral": MIXTRAL}
PLANS = ["1", "0", "1.attention", "2.mlp", "0.mlp+2", "0.attention+1.attention+2.attention"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LlamaForCausalLM]:
    config = FAMILIES[request.param]
    return config, saved_pair(tmp_path_factory.mktemp(request.param), config)[1]


@pytest.mark.parametrize("plan", PLANS)
@torch.inference_mode()
def test_prompt_and_steps_are_the_model_without_these_halves(pair: tuple[Any, LlamaForCausalLM], plan: str) -> None:
    config, model = pair
    tokens = torch.randint(SIZES["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(3))
    reference = without(random_reference(type(config)(**config.to_dict())), read_halves(plan))
    wanted = reference(tokens, use_cache=False).logits[0, 11:]                      # [9, V]
    settings = replace(DENSE, leave_out=plan)
    logits, state = prefilled(model, tokens[:, :12], settings)
    steps = [logits, *(next_logits(model, token, state) for token in tokens[0, 12:].split(1))]
    assert_same(torch.cat(steps), wanted)
    _, state = prefilled(model, tokens[:, :12], settings)
    assert_same(evaluate(model, tokens[0, 12:], state), wanted[1:])
    dense, _ = prefilled(model, tokens[:, :12], DENSE)
    assert (dense - logits).abs().max() > 1e-3


@torch.inference_mode()
def test_what_is_left_out_keeps_no_cache_and_no_copies_and_is_not_read(pair: tuple[Any, LlamaForCausalLM]) -> None:
    _, model = pair
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3)
    without_layer = replace(settings, leave_out="1")
    _, whole = prefilled(model, torch.arange(12)[None], settings)
    _, state = prefilled(model, torch.arange(12)[None], without_layer)
    assert [keys.shape[2] for keys in state.cache.keys] == [64, 0, 64]
    assert [values.shape[2] for values in state.cache.values] == [64, 0, 64]
    assert state.layers[1].ffn.copied_bytes() == state.layers[1].attention.copied_bytes() == 0
    read, read_whole = (bytes_per_token(model, one.pruning) for one in (state, whole))
    head = model.lm_head.read_bytes()
    assert (read - head) * 3 == (read_whole - head) * 2
    work, work_whole = (prompt_work(model, one.pruning, 12) for one in (state, whole))
    of_head = model.lm_head.in_features * model.lm_head.out_features
    assert (work[0] - of_head) * 3 == (work_whole[0] - of_head) * 2
    assert cache_bytes(model, 1, 64, state.pruning) * 3 == cache_bytes(model, 1, 64) * 2
    state.grow(100)
    assert [keys.shape[2] for keys in state.cache.keys] == [100, 0, 100]
    assert next_logits(model, torch.tensor([5]), state).isfinite().all()


@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_with_a_layer_less_every_setting_is_that_of_the_shorter_model(name: str, tmp_path: Path) -> None:
    """Partitions, picks, heads, a batch with padding, prompts that skip layers."""
    config = MODELS["grouped_query"]
    model = saved_pair(tmp_path / "whole", config)[1].double()
    reference = without(random_reference(type(config)(**config.to_dict())), read_halves("0"))
    reference.save_pretrained(tmp_path / "short")
    short = ours(tmp_path / "short").double()
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    for skip, skip_short in ((0.0, 0.0), ("1/3", "1/2")):
        settings = replace(SETTINGS[name], prefill_skip=skip, boundary_tokens=3)
        logits, state = prefilled(model, tokens, replace(settings, leave_out="0"), real)
        wanted, other = prefilled(short, tokens, replace(settings, prefill_skip=skip_short), real)
        for _ in range(4):
            assert_same(logits, wanted)
            chosen = wanted.argmax(-1)
            logits, wanted = next_logits(model, chosen, state), next_logits(short, chosen, other)


@torch.inference_mode()
def test_prompts_may_skip_layers_whose_attention_is_left_out(tmp_path: Path) -> None:
    """Waiting rows leave nothing there, and what they are goes on as it came."""
    model = saved_pair(tmp_path, MODELS["multi_head"])[1]
    tokens = torch.randint(SIZES["vocab_size"], (1, 12), generator=torch.Generator().manual_seed(4))
    settings = replace(DENSE, prefill_skip="1/3", leave_out="2.attention")
    skipped, state = prefilled(model, tokens, settings)
    whole, other = prefilled(model, tokens, replace(settings, prefill_skip=0.0))
    assert_same(skipped, whole)    # nobody looks at the other rows of that layer
    token = torch.tensor([7])
    assert_same(next_logits(model, token, state), next_logits(model, token, other))


def test_the_ratio_counts_what_is_left_out(tmp_path: Path) -> None:
    model = saved_pair(tmp_path, MODELS["multi_head"])[1]
    assert resolved(model, replace(DENSE, leave_out="1")).ratio == pytest.approx(1 / 3)
    cut = resolved(model, PruningSettings.paper(prune_ratio=0.3, leave_out="1"))
    assert cut.ratio == pytest.approx(1 / 3 + 2 / 3 * 0.3)
    assert cut.ffn_ratio == pytest.approx(resolved(model, PruningSettings.paper(prune_ratio=0.3)).ffn_ratio)
    halves = resolved(model, replace(DENSE, leave_out="0.mlp+2.attention"))
    assert halves.ratio == pytest.approx(1 / 3)
    heads = PruningSettings.paper(ffn_ratio=0.0, head_ratio=0.5)      # which only the two attentions that run give up
    whole, less = resolved(model, heads), resolved(model, replace(heads, leave_out="2.attention"))
    attention = resolved(model, replace(DENSE, leave_out="2.attention")).ratio
    assert less.ratio == pytest.approx(attention + 2 / 3 * whole.ratio) and whole.ratio > 0


@pytest.mark.slow
def test_compiled_steps_leave_out_the_same(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    eager, compiled = load(folder), load(folder, compile=True)
    assert compiled.compiled is not None
    one = PruningSettings.paper(ffn_ratio=0.4, dense_every=3, leave_out="1+2.attention+3.mlp")
    assert generated(compiled, [[5, 6, 7, 8]], 8, one) == generated(eager, [[5, 6, 7, 8]], 8, one)


def test_halves_are_read_as_they_are_written() -> None:
    assert read_halves("") == ()
    assert read_halves("3.mlp + 1") == (Half(1, "attention"), Half(1, "mlp"), Half(3, "mlp"))
    assert read_halves("1-2+1.mlp") == read_halves("1+2")
    for words in ("", "1", "0.attention+2+5.mlp"):
        assert written_halves(read_halves(words)) == words


@pytest.mark.parametrize("words", ["a", "1,2", "3-1", "1.ffn", "+", "-1", "1.5"])
def test_other_words_are_refused(words: str) -> None:
    with pytest.raises(InputError, match="leave out must be layers or halves of them"):
        PruningSettings.paper(leave_out=words)


def test_commands_say_in_one_line_what_cannot_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = complete_checkpoint(tmp_path / "tiny")
    common = ("--ckpt", folder, "--prompt", "Hello")
    assert "names layer 3, and the model's layers are 0 to 2" in one_line_error(
        generate.main, capsys, *common, "--leave-out", "3.mlp"
    )
    assert "leaves nothing of the 3 layers" in one_line_error(generate.main, capsys, *common, "--leave-out", "0-2")
    assert "not '1;2'" in one_line_error(generate.main, capsys, *common, "--leave-out", "1;2")
    assert "the page shows every layer" in one_line_error(
        explain.main, capsys, *common, "--out", tmp_path / "page.html", "--leave-out", "1"
    )
