"""tools/papers.py: its commands are understood, run one after the other, and go on where they stopped."""

import importlib
import json
from pathlib import Path
from typing import Any

import papers
import pytest

from popengine.evaluation.task_archive import TASKS
from popengine.studies.by_name import check_method


@pytest.mark.parametrize("name", papers.STEPS)
def test_every_command_is_one(name: str, tmp_path: Path) -> None:
    """Its flags are understood, its tasks and methods are known, and so are the settings that it compares."""
    first, *words = (word.format(text="x", calibration="y", archive="z", out=tmp_path, greedy="layers:1")
                     for word in papers.STEPS[name].command)
    module = importlib.import_module(first if first in papers.TOOLS else f"popengine.{first}")
    parsed = module.parser().parse_args([*words, *papers.written_to(first, tmp_path, name)])
    assert all(check_method(method) is None for method in getattr(parsed, "methods", []))
    assert first != "tasks" or {*parsed.tasks} <= {*TASKS}


def test_steps_run_in_order_and_go_on(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("--windows", "1", "--prompt-tokens", "16", "--score-tokens", "4")
    monkeypatch.setattr(papers, "STEPS", {
        "greedy": papers.Step("first claim", 3, ("skip_greedy", "--text", "{calibration}", "--layers", "1", *small)),
        "two": papers.Step("second claim", 4, (
            "compare", "--paper", "--text", "{text}", "--methods", "dense", "prefill-only", *small, "--no-plots",
            "--prefill-skip", "{greedy}",
        )),
    })
    given = ["--ckpt", str(checkpoint), "--text", str(text), "--out", str(tmp_path)]
    assert papers.filled(["{greedy}"], papers_flags(tmp_path)) == [papers.LAYERS]
    assert papers.main(given) == 0
    said = capsys.readouterr().out
    shown = ("## greedy (1 of 2): first claim", "About 3 of 7 minutes", "## two (2 of 2)", "About 4 of 4 minutes")
    assert sorted(shown, key=said.index) == [*shown]
    found = json.loads((tmp_path / "greedy" / "skipped.json").read_text())["rounds"][0]["layers"]
    assert json.loads((tmp_path / "two" / "table.json").read_text())["rows"][1]["prefill_skip"] == found
    before = (tmp_path / "two" / "progress.jsonl").read_text()
    assert papers.main([*given, "--only", "two"]) == 0
    assert (tmp_path / "two" / "progress.jsonl").read_text() == before
    assert "## greedy" not in capsys.readouterr().out
    assert papers.main([*given[:2], "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path / "new")]) == 2
    assert "none.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        papers.main(["--only", "three"])
    assert end.value.code == 2


def papers_flags(out: Path) -> Any:
    """Flags as `papers.main` reads them."""
    return type("Flags", (), {"text": "x", "calibration_text": None, "archive": None, "out": out / "nowhere"})
