"""Steps from packages: they compute what eager steps do, and only a package that is the user's own is loaded.

The model has seven layers, a prime number: groups of one layer, which share a package.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import complete_checkpoint, generated
from torch import Tensor

from models import flat_functions
from models.compiled import CPU_OPTIONS, CompiledDecode
from models.flat_functions import UNREAD, Function, NotPackable
from models.llama import LlamaForCausalLM
from models.matrices.forms import ColumnMatrix
from models.packages import Loader, common_group_size, differs_as_little, last_bits_changed, step_functions
from models.state import DecodeState
from popengine.compile import main as compile_command
from popengine.engine import packages
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.packages import CachedSteps, Packages
from popengine.engine.results import measured
from popengine.studies.settings import DENSE, PruningSettings
from weights.user_folders import cache_folder

POP = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3)
FROZEN = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.0)
WINA = PruningSettings.paper(prune_ratio=0.0, input_sparsity="0.5,head=0.5")
SIZES = {"num_hidden_layers": 7, "hidden_size": 64, "max_position_embeddings": 1024}
PROMPT, OTHER = list(range(5, 40)), list(range(90, 50, -1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_checkpoint(tmp_path_factory.mktemp("tiny"), **SIZES)


@pytest.fixture(scope="module")
def eager(folder: Path) -> Engine:
    engine = load(folder)
    assert engine.compiled is None
    return engine


@pytest.fixture(scope="module")
def made(folder: Path, eager: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the packages of the dense model, made by the command: the folder of the packages."""
    cache = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(packages, "cache_folder", cache_folder)
        fewer = {"aot_inductor.compile_wrapper_opt_level": "O0"}            # two thirds of the time to compile
        patch.setattr(flat_functions, "CPU_OPTIONS", CPU_OPTIONS | fewer)
        with pytest.raises(SystemExit, match="0"):
            compile_command([str(folder), "--prune-ratio", "0"])
        yield cache / "popengine" / "packages"


@pytest.fixture
def fast(folder: Path, made: Path) -> Engine:
    engine = load(folder)
    assert isinstance(engine.compiled, CachedSteps) and not engine.compiled.makes
    return engine


def with_packages_of(engine: Engine, *prunings: PruningSettings, batch: int = 1) -> Engine:
    assert isinstance(engine.compiled, CachedSteps)
    for pruning in prunings:
        engine.compiled.make(engine.model.new_state(batch, 128, engine.resolve(pruning)))
    return engine


def steps_of(engine: Engine, prompts: list[list[int]], count: int, pruning: PruningSettings) -> str:
    run = engine.run(prompts, count, pruning, ignore_eos=True)
    list(run)
    return measured(run).steps


@torch.inference_mode()
def decode_logits(engine: Engine, pruning: PruningSettings, capacity: int, batch: int = 1) -> Tensor:
    """Logits of ten steps over given tokens, float32 [10 B, V]."""
    state = engine.new_state(batch, capacity, engine.resolve(pruning))
    engine.prepare(state)
    engine.model.prefill(engine.model.embed(torch.tensor([PROMPT, OTHER[:35]][:batch])), state)
    steps = [torch.tensor([token, 200 - token][:batch]) for token in range(100, 110)]
    logits = torch.cat([engine.decode(step, state) for step in steps])
    assert engine.kind_of_steps(state) == ("eager" if engine.compiled is None else "package")
    return logits


def test_the_command_makes_what_is_missing_alone(folder: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(made.iterdir())
    with pytest.raises(SystemExit, match="0"):
        compile_command([str(folder), "--prune-ratio", "0"])
    assert "all are in" in capsys.readouterr().out and sorted(made.iterdir()) == files


def test_another_process_uses_them(folder: Path, eager: Engine, made: Path) -> None:
    command = [sys.executable, "-m", "popengine.generate", "--ckpt", str(folder), "--prompt", "Hello", "-n", "30"]
    command += ["--prune-ratio", "0", "--json", "--ignore-eos"]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    found = json.loads(run.stdout)
    assert found["timing"]["steps"] == "package" and found["timing"]["compile_s"] == 0
    wanted = eager.generate("Hello", max_new_tokens=30, pruning=DENSE, ignore_eos=True)[0]
    assert found["token_ids"] == wanted.token_ids


def test_the_flag_makes_what_is_missing_and_says_so_once(
    folder: Path, eager: Engine, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(load(folder, compile=True), [PROMPT], 10, POP) == generated(eager, [PROMPT], 10, POP)
    said = capsys.readouterr().err
    assert said.startswith("made 1 packages") and said.count("\n") == 1, said
    assert steps_of(load(folder), [PROMPT], 10, POP) == "package"


@pytest.mark.parametrize("pruning", [DENSE, POP, WINA], ids=["dense", "POP", "WINA"])
def test_packages_give_the_eager_tokens_and_logits(eager: Engine, fast: Engine, pruning: PruningSettings) -> None:
    with_packages_of(fast, pruning)
    for prompt, count in ((PROMPT, 40), (OTHER, 200), (PROMPT, 5)):         # capacities 128, 256, 128
        assert generated(fast, [prompt], count, pruning) == generated(eager, [prompt], count, pruning)
        assert steps_of(fast, [prompt], 2, pruning) == "package"
    for capacity in (128, 384):
        torch.testing.assert_close(
            decode_logits(fast, pruning, capacity), decode_logits(eager, pruning, capacity), rtol=0, atol=1e-5
        )


def test_a_conversation_goes_on_and_grows(eager: Engine, fast: Engine) -> None:
    answers = []
    for engine in (eager, with_packages_of(fast, POP)):
        talk = engine.chat(pruning=POP, max_new_tokens=60)
        answers.append([talk.say(words) for words in ("Hello there", "And then? " * 9, "Why?")])
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]
    assert {one.statistics.steps for one in answers[1]} == {"package"}
    assert answers[1][2].statistics.kept_tokens > 128           # beyond the capacity of the first turn


@pytest.mark.slow
def test_a_batch_has_packages_of_its_own(eager: Engine, fast: Engine) -> None:
    prompts = [PROMPT, OTHER[:12]]
    assert steps_of(fast, prompts, 2, FROZEN) == "eager"
    fast = with_packages_of(load(fast.folder), FROZEN, batch=2)
    assert generated(fast, prompts, 40, FROZEN) == generated(eager, prompts, 40, FROZEN)
    assert steps_of(fast, prompts, 2, FROZEN) == "package"
    torch.testing.assert_close(
        decode_logits(fast, FROZEN, 384, batch=2), decode_logits(eager, FROZEN, 384, batch=2), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kinds, size", [
    ("a" * 30, 5), ("a" * 28, 4), ("a" * 7, 1), ("ab" * 14, 4), ("aaaaab" * 3, 2), ("aabbabb", 1), ("abcdef", 1),
])
def test_groups_of_layers_are_large_where_few_layers_must_be_compiled(kinds: str, size: int) -> None:
    assert common_group_size([*kinds]) == size


@torch.inference_mode()
def test_a_step_that_reads_a_tensor_beside_its_inputs_is_refused(
    eager: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_functions, "UNREAD", UNREAD | {"candidate_norms"})
    state = eager.model.new_state(1, 128, eager.resolve(POP))
    with pytest.raises(NotPackable, match="layers reads a tensor that is none of its inputs"):
        step_functions(eager.model, state, dense=False).layers[0].exported()


GATHERING = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, dense_every=3, redraw_every=6)


@pytest.mark.slow
def test_dense_steps_between_pruned_ones_count(eager: Engine, fast: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages_of(fast, GATHERING)
    wanted = generated(eager, [PROMPT], 30, GATHERING)
    eager_steps = []
    dense_step = LlamaForCausalLM.dense_step

    def counted(*given: Any) -> Tensor:
        eager_steps.append(given)
        return dense_step(*given)

    monkeypatch.setattr(LlamaForCausalLM, "dense_step", counted)
    assert generated(fast, [PROMPT], 30, GATHERING) == wanted
    assert steps_of(fast, [PROMPT], 30, GATHERING) == "package"
    assert len(eager_steps) == 2 * 4 and all(given[-1] for given in eager_steps)        # those that partition alone


@pytest.mark.slow
@torch.inference_mode()
def test_dense_steps_add_the_eager_evidence(eager: Engine, fast: Engine) -> None:
    """In the first step, which verifies, as in later ones."""
    with_packages_of(fast, GATHERING)
    found = []
    for engine in (eager, fast):
        state = engine.new_state(1, 128, engine.resolve(GATHERING))
        engine.prepare(state)
        engine.model.prefill(engine.model.embed(torch.tensor([PROMPT])), state)
        for token in (100, 101, 102):
            engine.decoder.dense_step(torch.tensor([token]), state, False)
        found.append([layer.ffn.evidence for layer in state.layers])  # type: ignore[attr-defined]
    for wanted, own in zip(*found, strict=True):
        torch.testing.assert_close(own.squares, wanted.squares, rtol=1e-5, atol=1e-5)
        assert own.tokens == wanted.tokens == len(PROMPT) + 3


@pytest.mark.slow
def test_dense_steps_in_half_precision_run_from_packages_too(
    folder: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their evidence is float32, but of activations that both round to bfloat16 in different places."""
    engine = load(folder, dtype="bfloat16", compile=True)
    list(engine.run([PROMPT], 12, GATHERING, ignore_eos=True))
    assert "differs" not in capsys.readouterr().err
    (kinds,) = engine.compiled.packaged.steps.values()  # type: ignore[union-attr]
    assert set(kinds) == {False, True} and None not in kinds.values()


@pytest.mark.slow
def test_steps_that_choose_by_rounded_scores_run_from_packages(
    folder: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of 64 inputs: a score that rounding moves past another changes a product by more than roundings do."""
    engine = load(folder, dtype="bfloat16", compile=True)
    run = engine.run([PROMPT], 12, WINA, ignore_eos=True)
    list(run)
    assert "differs" not in capsys.readouterr().err
    assert measured(run).steps == "package"


def test_a_package_may_differ_as_much_as_a_changed_last_bit_but_never_by_most_of_what_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    x, added, noise, other = (torch.randn(256, generator=generator) for _ in range(4))
    wanted, nudged = x + added, x + added + 0.2 * noise
    assert differs_as_little(wanted + 0.3 * other, nudged, wanted, x)
    assert not differs_as_little(wanted + 0.5 * other, nudged, wanted, x)
    assert not differs_as_little(wanted + 0.6 * other, x + added + noise, wanted, x)
    assert not differs_as_little(x, nudged, wanted, x)
    half = x.bfloat16()
    changed = last_bits_changed(half) != half
    assert 160 < changed.sum() < 180 and torch.allclose(last_bits_changed(half), half, rtol=2**-6, atol=0)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("harm", [lambda out: [out[0] + 1], lambda out: 1 / 0], ids=["wrong", "failing"])
def test_a_refused_dense_package_leaves_the_evidence_right(
    eager: Engine, fast: Engine, harm: Callable[[list[Tensor]], list[Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    with_packages_of(fast, GATHERING)
    assert fast.compiled is not None
    packaged = fast.compiled.packaged  # type: ignore[union-attr]
    squares = []
    for engine in (eager, fast):
        state = engine.new_state(1, 128, engine.resolve(GATHERING))
        engine.prepare(state)
        engine.model.prefill(engine.model.embed(torch.tensor([PROMPT])), state)
        if engine is fast:
            steps = packaged.steps_of(state, dense=True)
            assert steps is not None
            loader, inputs = steps.layers[3]
            steps.layers[3] = Harmful(loader, harm), inputs
        for token in (100, 101):
            engine.decoder.dense_step(torch.tensor([token]), state, False)
        squares.append([layer.ffn.evidence.squares for layer in state.layers])  # type: ignore[attr-defined]
    torch.testing.assert_close(squares[1], squares[0], rtol=1e-5, atol=1e-5)
    assert "their first step differs" in capsys.readouterr().err
    assert packaged.runs(state) and packaged.steps_of(state, dense=True) is None        # pruned steps go on


class Harmful:
    """A package that computes something else, or fails."""

    def __init__(self, loader: Loader, harm: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.loader, self.harm = loader, harm

    def run(self, inputs: list[Tensor], /) -> list[Tensor]:
        try:
            return self.harm(self.loader.run(inputs))
        except ZeroDivisionError:
            raise RuntimeError("failed") from None


def test_settings_without_a_package_run_eagerly_by_columns(
    eager: Engine, fast: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(fast, [PROMPT], 10, DENSE) == generated(eager, [PROMPT], 10, DENSE)
    assert not any(isinstance(one, ColumnMatrix) for one in fast.model.modules())
    unknown = PruningSettings.paper(ffn_ratio=0.25, candidate_width=0.1)
    assert generated(fast, [PROMPT], 10, unknown) == generated(eager, [PROMPT], 10, unknown)
    assert fast.compiled is None and any(isinstance(one, ColumnMatrix) for one in fast.model.modules())
    assert generated(fast, [PROMPT], 10, DENSE) == generated(eager, [PROMPT], 10, DENSE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["source_digest", "machine"])
def test_a_package_of_other_sources_or_another_machine_is_not_used(
    folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = packages.source_digest()[::-1] if name == "source_digest" else ["another", *packages.machine()]
    monkeypatch.setattr(packages, name, lambda: other)
    assert load(folder).compiled is None


def test_packages_without_use_are_deleted_when_others_are_made(
    folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "popengine" / "packages"
    shutil.copytree(made, own)
    own.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    long_ago = time.time() - 61 * 86400
    for path in own.iterdir():
        path.chmod(0o600)
        os.utime(path, (long_ago, long_ago))
    assert load(folder).compiled is not None                        # looks for the head's package, and loads none
    engine = load(folder)
    generated(engine, [PROMPT], 2, DENSE)
    engine.compiled.packages.delete_unused()  # type: ignore[union-attr]
    assert {path.name for path in own.iterdir()} == dense_files(folder)


def damaged(path: Path, patch: pytest.MonkeyPatch) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def of_another_user(path: Path, patch: pytest.MonkeyPatch) -> None:
    own = os.geteuid() + 1
    patch.setattr(os, "geteuid", lambda: own)


def a_link(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def writable(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.chmod(0o620)


def in_a_writable_folder(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.parent.chmod(0o777)


def renamed(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Two packages under each other's keys, with digests of their own."""
    one, other = sorted(path.parent.glob("*.pt2"))[:2]
    (key, own, _), (other_key, other_own, _) = one.name.split("."), other.name.split(".")
    one.rename(path.parent / f"{other_key}.{own}.pt2")
    other.rename(path.parent / f"{key}.{other_own}.pt2")


@pytest.mark.parametrize("harm, words", [
    (damaged, "is damaged"), (cut_off, "is damaged"), (of_another_user, "belongs to another user"),
    (a_link, "is a link"), (writable, "may be written by other users"),
    (in_a_writable_folder, "packages may be written by other users"), (renamed, "is the package of something else"),
])
def test_a_package_that_cannot_be_trusted_is_refused_in_one_line(
    folder: Path, eager: Engine, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], harm: Callable[[Path, pytest.MonkeyPatch], None], words: str,
) -> None:
    own = tmp_path / "popengine" / "packages"
    own.mkdir(mode=0o700, parents=True)
    own.chmod(0o700)
    dense = [one for one in made.iterdir() if one.name in dense_files(folder)]
    for one in dense:
        (own / one.name).write_bytes(one.read_bytes())
        (own / one.name).chmod(0o600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = load(folder)
    assert isinstance(engine.compiled, CachedSteps)
    harm(own / dense[0].name, monkeypatch)
    assert generated(engine, [PROMPT], 10, DENSE) == generated(eager, [PROMPT], 10, DENSE)
    assert generated(engine, [PROMPT], 10, DENSE) == generated(eager, [PROMPT], 10, DENSE)
    said = capsys.readouterr().err
    assert said.startswith("warning: steps run eagerly") and words in said and said.count("\n") == 1, said
    anew = steps_that_make(folder, monkeypatch)
    assert anew.missing(anew.model.new_state(1, 128, engine.resolve(DENSE)))        # `popengine compile` makes it again


def steps_that_make(folder: Path, patch: pytest.MonkeyPatch) -> CachedSteps:
    """Steps of an engine that would make packages."""
    patch.setattr(CachedSteps, "of_model", lambda self: True)
    engine = load(folder, compile=True)
    assert isinstance(engine.compiled, CachedSteps)
    return engine.compiled


def dense_files(folder: Path) -> set[str]:
    """Names of the three packages of the dense model's steps."""
    engine = load(folder)
    assert isinstance(engine.compiled, CachedSteps)
    with torch.inference_mode():
        state = engine.model.new_state(1, 128, engine.resolve(DENSE))
        functions = step_functions(engine.model, state, dense=False).all
    return {path.name for one in functions for path in engine.compiled.packages.files(one)}


def test_verification_finds_a_package_of_another_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its norms have another epsilon, a constant of the code; the key is made to forget it."""
    other = complete_checkpoint(tmp_path, **SIZES, rms_norm_eps=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(packages, "cache_folder", lambda name: tmp_path / "none")
        plain = load(other)
    key = Packages.key

    def forgetful(self: Packages, function: Function) -> str:
        other = copy(function)
        other.description = function.description.replace("eps 0.5", "eps 1e-06")
        return key(self, other)

    monkeypatch.setattr(Packages, "key", forgetful)
    engine = load(other)
    assert engine.compiled is not None
    capsys.readouterr()                 # transformers' progress
    assert generated(engine, [PROMPT], 20, DENSE) == generated(plain, [PROMPT], 20, DENSE)
    assert generated(engine, [PROMPT], 20, DENSE) == generated(plain, [PROMPT], 20, DENSE)
    said = capsys.readouterr().err
    assert said.startswith("warning: steps run eagerly") and "their first step differs" in said
    assert said.count("\n") == 1, said


class Uncompiled(CompiledDecode):
    """Takes the place of torch.compile, which test_compile.py tests."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    def prepare(self, state: DecodeState) -> float:
        return 0.0

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        return self.model.decode(tokens, state)


def test_where_no_package_can_be_made_a_line_says_so(
    folder: Path, eager: Engine, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Function, "package", broken)
    monkeypatch.setattr(packages, "CompiledDecode", Uncompiled)
    settings = PruningSettings.paper(ffn_ratio=0.45, candidate_width=0.0)
    engine = load(folder, compile=True)
    tokens = generated(eager, [PROMPT], 10, settings)
    assert generated(engine, [PROMPT], 10, settings) == tokens
    said = capsys.readouterr().err
    assert "cannot be made (no space)" in said and said.count("\n") == 1, said
    assert steps_of(engine, [PROMPT], 2, settings) == "compiled"
    monkeypatch.setattr(packages, "compiler_problem", lambda device: "no compiler")
    engine = load(folder, compile=True)
    assert generated(engine, [PROMPT], 10, settings) == tokens
    said = capsys.readouterr().err
    assert "steps run eagerly: no compiler" in said and said.count("\n") == 2, said
    assert steps_of(engine, [PROMPT], 2, settings) == "eager"
