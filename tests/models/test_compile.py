"""The compiled decode step: it computes what the eager one does, and it is compiled once, not once per prompt."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from builders import complete_checkpoint, generated
from tolerance import assert_rounds_no_worse
from torch import Tensor

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.results import measured
from popengine.studies.settings import DENSE, PruningSettings

POP = PruningSettings.paper(prune_ratio=0.4)
TEXT = (
    "When the last ferry had gone, the keeper closed the gate, counted the tickets and walked up the hill with his "
    "lamp. From the top he could see both shores, the lights of the town on one side and nothing on the other."
)


def graphs_compiled() -> int:
    """How many times PyTorch has captured a graph in this process: once per first use, and again per recompilation."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Eager(NamedTuple):
    """What the default checkpoint gives in eager steps: the model is freed before the compiled one is loaded."""

    ids: list[int]
    tokens: list[Any]
    logits: Tensor


PRUNINGS = [DENSE, POP]


@pytest.fixture(scope="module")
def eager(default_checkpoint_path: Path) -> Eager:
    engine = load(default_checkpoint_path, dtype="float32")
    assert engine.compiled is None
    ids = engine.prompts.ids(TEXT, raw=True)
    return Eager(ids, [generated(engine, [ids], 32, pruning) for pruning in PRUNINGS], decode_logits(engine, ids))


@pytest.fixture(scope="module")
def compiled(default_checkpoint_path: Path, eager: Eager) -> Iterator[Engine]:
    """In 15 groups of two layers: compiling takes two fifths of the time that groups of five take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.compiled.MOST_LAYERS_PER_CALL", 2)
        engine = load(default_checkpoint_path, dtype="float32", compile=True)
    assert engine.compiled is not None and engine.compiled.group_size == 2  # type: ignore[union-attr]
    yield engine


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow, id="dense"), pytest.param(1, id="POP")])
def test_compiled_and_eager_give_the_same_32_tokens(eager: Eager, compiled: Engine, which: int) -> None:
    assert compiled.compiled is not None
    assert generated(compiled, [eager.ids], 32, PRUNINGS[which]) == eager.tokens[which]


def decode_logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits of decode steps over the last ten of given tokens, float32 [10, V]."""
    with torch.inference_mode():
        state = engine.model.new_state(1, 128, engine.resolve(DENSE))
        engine.prepare(state)
        engine.model.prefill(engine.model.embed(torch.tensor([ids[:-10]])), state)
        return torch.cat([engine.decode(torch.tensor([token]), state) for token in ids[-10:]]).float()


@pytest.mark.slow
def test_compiled_bfloat16_is_as_near_to_float32_as_eager_bfloat16(
    eager: Eager, default_checkpoint_path: Path, short_calls: None
) -> None:
    # Each operation of bfloat16 rounds to 8 bits, and fused code rounds in fewer places: the two cannot be equal.
    plain, fast = (
        decode_logits(load(default_checkpoint_path, dtype="bfloat16", compile=compile), eager.ids)
        for compile in (False, True)
    )
    assert_rounds_no_worse(fast, plain, eager.logits)


@pytest.mark.slow
def test_neither_another_prompt_nor_a_longer_one_compiles_again(tiny_checkpoint: Path) -> None:
    engine = load(tiny_checkpoint, compile=True)
    first = engine.run([[5, 6, 7]], 20, POP, ignore_eos=True)
    list(first)
    assert measured(first).compile_s > 0
    before = graphs_compiled()
    assert before > 0
    # Other tokens, then lengths that grow past the capacity of the first run's cache, and past twice that.
    for length, new_tokens in ((3, 20), (100, 60), (300, 200)):
        run = engine.run([[(length + 7 * place) % 250 for place in range(length)]], new_tokens, POP, ignore_eos=True)
        list(run)
        assert graphs_compiled() == before, length
        assert measured(run).compile_s == 0


def test_one_compiled_function_serves_every_layer(tiny_checkpoint: Path, short_calls: None) -> None:
    engine = load(tiny_checkpoint, compile=True)
    assert engine.compiled is not None
    run, before, layers_compiled = engine.compiled.layers, graphs_compiled(), set()

    def counted(*arguments: Any) -> Tensor:
        begun = graphs_compiled()
        x = run(*arguments)
        if graphs_compiled() > begun:
            layers_compiled.add(graphs_compiled())
        return x

    engine.compiled.layers = counted
    generated(engine, [[1, 2, 3]], 4, POP)                  # steps that tests below use, too
    assert engine.model.config.num_hidden_layers == 3
    assert len(layers_compiled) == 1 and graphs_compiled() - before <= 3        # the two ends, if they are new, as well


def test_a_context_that_is_no_multiple_of_anything_gives_the_eager_tokens(
    tiny_checkpoint: Path, short_calls: None
) -> None:
    """The second capacity, 203, is served by what was compiled for the first, 128, without its guards being asked."""
    plain, fast = (load(tiny_checkpoint, max_seq_len=203, compile=compile) for compile in (False, True))
    for prompt, new_tokens in ([1, 2, 3], 20), (list(range(100)), 103):
        assert generated(fast, [prompt], new_tokens, POP) == generated(plain, [prompt], new_tokens, POP)


# Of a batch of two: the dense step that the next test counts.
UP = {"rule": "up", "retained_share": 0.2, "dense_every": 3}


@pytest.mark.parametrize(("changes", "batch"), [
    ({"min_evidence": 40}, 1), ({"dense_every": 3, "redraw_every": 6}, 1), (UP, 2), ({"rule": "draft"}, 1),
    ({"rule": "all-channels"}, 1),
])
@pytest.mark.slow
def test_steps_compiled_before_a_partition_is_drawn_serve_it_afterwards(
    tiny_checkpoint: Path, changes: dict[str, Any], batch: int, exact_drafts: None, short_calls: None
) -> None:
    """Dense steps first or between, then pruned ones: a step compiled on nothing must choose as a drawn one does."""
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.4, **changes)
    prompts = [list(range(30)), list(range(40, 50))][:batch]
    tokens = generated(load(tiny_checkpoint), prompts, 40, settings)
    assert generated(load(tiny_checkpoint, compile=True), prompts, 40, settings) == tokens


@pytest.mark.slow
def test_a_compiled_dense_step_counts_its_tokens(tiny_checkpoint: Path, short_calls: None) -> None:
    engine = load(tiny_checkpoint, compile=True)
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.4, **UP)
    state = engine.model.new_state(2, 128, engine.resolve(settings))
    engine.prepare(state)
    with torch.inference_mode():
        engine.model.prefill(engine.model.embed(torch.arange(20).view(2, 10)), state)
        for tokens in ([1, 2], [3, 4], [5, 6]):             # the third step is dense
            engine.decode(torch.tensor(tokens), state)
    assert state.schedule.dense_steps == 1
    ffn = state.layers[0].ffn
    assert ffn.evidence.tokens == ffn.watched.tokens == state.schedule.tokens == 22


@pytest.mark.slow
def test_models_and_batches_in_turn_are_not_mixed_up(
    tiny_checkpoint: Path, tmp_path: Path, short_calls: None
) -> None:
    """Steps check little beyond what tells the compiled functions apart; here they differ in a constant, too."""
    other = complete_checkpoint(tmp_path, max_position_embeddings=1024, rms_norm_eps=0.5)
    engines = [(load(path), load(path, compile=True)) for path in (tiny_checkpoint, other)]
    one, two = [list(range(30))], [list(range(30)), list(range(40, 50))]
    made = []
    for _ in range(2):
        for (plain, fast), prompts in ((engines[0], one), (engines[0], two), (engines[1], one)):
            tokens = generated(plain, prompts, 12, POP)
            assert generated(fast, prompts, 12, POP) == tokens
            made.append(tokens)
    assert made[0] != made[2]       # the constant does make a difference


@pytest.mark.slow
def test_without_a_compiler_a_warning_says_so_and_steps_run_eagerly(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "popengine.generate", "--ckpt", str(tiny_checkpoint), "--prompt", "Hello"]
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([*command, "-n", "8", "--quiet", "--compile"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("warning: torch.compile does not work here")
    assert run.stderr.count("\n") == 1, run.stderr
    engine = load(tiny_checkpoint)
    expected = engine.generate("Hello", max_new_tokens=8)[0].text
    assert run.stdout == expected + "\n"
