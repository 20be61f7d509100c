"""The two real quantised files that `make real` fetches (`make test-real`): Gemma-3-270m and Qwen2.5-Coder-1.5B.

The reference is transformers, which reads the same file. Models take turns in memory: the larger file has 7 GB in
float32 here and takes 9 GB there.

B batch, T tokens, V vocabulary.
"""

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import REPOSITORY, exit_status, generated, one_line_error
from fetch_real import REAL_DIRECTORY, REAL_FILES
from real_text import TEXT
from safetensors.torch import load_file, save_file
from torch import Tensor

from popengine.engine.loading import load
from popengine.studies.settings import DENSE

pytestmark = pytest.mark.real

TOKENS, PROMPT_TOKENS, NEW_TOKENS = 256, 96, 48
STEPS = 16                                      # decode steps at the end of the text, one row each

LOAD = """
import json, sys, time
import torch

def peak_bytes():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak_bytes()
from popengine.engine.loading import load
began = time.perf_counter()
load(sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak_bytes() - before}))
"""


@dataclass(frozen=True)
class Outputs:
    """What the engine computes from a file.

    ids            the whole text
    tokens, logits [T], [T, V]  float32, unpacked
    greedy         [N]          tokens after the prompt, by steps in float32
    packed         [T, V]       at default settings, all tokens at once
    packed_steps   [STEPS, V]   at default settings, the last tokens one at a time
    """

    ids: list[int]
    tokens: Tensor
    logits: Tensor
    greedy: Tensor
    packed: Tensor
    packed_steps: Tensor


@pytest.fixture(scope="module", params=[file.name for file in REAL_FILES])
def path(request: pytest.FixtureRequest) -> Path:
    path = REAL_DIRECTORY / request.param
    if not path.exists():
        pytest.skip(f"{path} is not there: run `make real`")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "tides.txt"
    text.write_text(TEXT, encoding="utf-8")
    return text


@pytest.fixture(scope="module")
@torch.inference_mode()
def outputs(path: Path) -> Outputs:
    engine = load(path, dtype="float32")
    ids = engine.prompts.ids(TEXT, raw=True)
    tokens = torch.tensor(ids[:TOKENS])
    assert len(tokens) == TOKENS
    logits = engine.model(tokens[None])[0]                                          # [T, V]
    greedy = torch.tensor(generated(engine, [ids[:PROMPT_TOKENS]], NEW_TOKENS, DENSE))[:, 0]
    del engine

    engine = load(path)
    packed = engine.model(tokens[None])[0].float()                                  # [T, V]
    state = engine.model.new_state(1, TOKENS, engine.resolve(DENSE))
    engine.model.prefill(engine.model.embed(tokens[None, :-STEPS]), state, None)
    steps = [engine.model.decode(token[None], state)[0].float() for token in tokens[-STEPS:]]
    return Outputs(ids, tokens, logits, greedy, packed, torch.stack(steps))


@pytest.fixture(scope="module")
def reference(path: Path, outputs: Outputs, text: Path) -> dict[str, Tensor]:
    """What tests/real/transformers_reference.py computes."""
    given, out = text.with_name(f"{path.stem}.engine"), text.with_name(f"{path.stem}.reference")
    prompt = outputs.tokens[:PROMPT_TOKENS].clone()
    save_file({"tokens": outputs.tokens, "prompt": prompt, "greedy": outputs.greedy}, given)
    script = Path(__file__).with_name("transformers_reference.py")
    subprocess.run([sys.executable, script, path, text, given, out], check=True, capture_output=True, text=True)
    return load_file(out)


def test_tokens_equal_transformers(outputs: Outputs, reference: dict[str, Tensor]) -> None:
    assert outputs.ids == reference["ids"].tolist()


def test_float32_logits_equal_transformers(outputs: Outputs, reference: dict[str, Tensor]) -> None:
    torch.testing.assert_close(outputs.logits, reference["logits"], atol=1e-3, rtol=0)


def test_float32_greedy_text_equals_transformers(outputs: Outputs, reference: dict[str, Tensor]) -> None:
    assert outputs.greedy.tolist() == reference["greedy"].tolist()


def test_packed_logits_stay_near_those_of_the_unpacked_weights(
    path: Path, outputs: Outputs, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/using.md states what llama.cpp reaches on this text."""
    divergence = divergences(outputs.logits, outputs.packed).mean().item()
    same = int((outputs.packed.argmax(-1) == outputs.logits.argmax(-1)).sum())
    with capsys.disabled():
        print(f"\n{path.name}: KL {divergence:.5f}, same top token {same} of {TOKENS}")
    assert divergence <= 0.003
    # Bfloat16 logits from 16 on are 0.125 apart: which of two nearer ones comes first depends on the order of sums.
    chosen = outputs.logits.gather(1, outputs.packed.argmax(-1, keepdim=True))[:, 0]        # [T]
    assert int((chosen >= outputs.logits.amax(-1) - 0.125).sum()) >= 0.97 * TOKENS


def test_packed_steps_stay_near_the_logits_of_the_unpacked_weights(outputs: Outputs) -> None:
    assert divergences(outputs.logits[-STEPS:], outputs.packed_steps).mean().item() <= 0.003


def divergences(logits: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(other) from softmax(logits) for each token, [T] in nats."""
    wanted, found = logits.log_softmax(-1), other.log_softmax(-1)                   # [T, V]
    return (wanted.exp() * (wanted - found)).sum(-1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", LOAD, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    took = json.loads(done.stdout)
    size = path.stat().st_size
    with capsys.disabled():
        print(f"\n{path.name}: loaded in {took['seconds']:.1f} s, at peak {took['bytes'] / size:.2f} times the file")
    assert took["bytes"] <= max(1.3 * size, 7e8)        # of Gemma's, much is the tokenizer's 262,144 pieces


WINDOW = "--prompt-tokens 64 --score-tokens 16 --windows 1"
COMMANDS = {
    "info": "",
    "generate": "--prompt add(2,3)== --raw --paper -n 4",
    "chat": "--paper -n 4",
    "score": f"--text {{text}} {WINDOW}",
    "compare": f"--text {{text}} --out {{folder}} --methods dense pop frozen --no-plots {WINDOW}",
    "bench": "-p 16 -n 4 --rounds 1 --prune-ratio 0.2 --dtype bfloat16",
    "explain": "--prompt add(2,3)== --raw --paper -n 4 --out {folder}/page.html",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(
    path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:  # fmt: skip
    """Gemma-3-270m is a base model: it has no chat template, and chat says so in one line."""
    typed: Any = io.TextIOWrapper(io.BytesIO(b"Name a colour.\n/quit\n"))          # which only chat reads
    monkeypatch.setattr(sys, "stdin", typed)
    flags = COMMANDS[command].format(text=text, folder=tmp_path).split()
    main = import_module(f"popengine.{command}").main
    if command == "chat" and path.name.startswith("gemma"):
        assert "has no chat template" in one_line_error(main, capsys, "--ckpt", path, *flags)
    else:
        assert exit_status(main, "--ckpt", path, *flags) == 0
