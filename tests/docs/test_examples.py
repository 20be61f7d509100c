"""The scripts of examples/ run as they stand, on the small checkpoints that come along."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import LLAVA_TINY, REPOSITORY

MIXTRAL_TINY = REPOSITORY / "weights" / "mixtral-tiny"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in this process, which has PyTorch, in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def script(name: str, *words: Any) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(REPOSITORY / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_every_example_is_tried() -> None:
    assert {path.name for path in (REPOSITORY / "examples").iterdir() if path.is_file()} == {
        "generate.py", "batch.py", "chat.py", "compare_rule.py"
    }


def test_one_answer(tmp_path: Path) -> None:
    """As a process, without anything that the tests import."""
    command = [sys.executable, str(REPOSITORY / "examples" / "generate.py"), str(MIXTRAL_TINY), "tally cabbacdafe?"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "M parameters" in said and re.search(r"tokens/s, \d+\.\d% of the dense model's bytes", said)


def test_a_batch(run: Callable[..., str]) -> None:
    said = run("batch.py", MIXTRAL_TINY, "tally cab?", "sort dcba?")
    assert said.count("mean log-probability -") == 2


@pytest.mark.parametrize("pictures", [(), (LLAVA_TINY / "example.png",)], ids=["text", "picture"])
def test_a_conversation(pictures: tuple[Path, ...], run: Callable[..., str], tmp_path: Path) -> None:
    said = run("chat.py", LLAVA_TINY, *pictures)
    kept = [int(number) for number in re.findall(r"\((\d+) of \d+ prompt tokens were in the cache\)", said)]
    assert len(kept) == 2 and kept[0] == 0 < kept[1]
    assert (tmp_path / "conversation.json").exists()


def test_an_own_rule(run: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"sort {number * 7919 % 9973}?" for number in range(300)))
    said = run("compare_rule.py", text, MIXTRAL_TINY)
    rows = dict(re.findall(r"^(\w+) +perplexity +\S+ +KL (\S+)", said, re.M))
    assert float(rows["dense"]) < 1e-6 < min(float(rows["pop"]), float(rows["own"])) and rows["pop"] != rows["own"]
