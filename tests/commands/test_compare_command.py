"""The compare command: its table and plots, that it goes on where it was killed, and what it says of damage."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import MIXTRAL_TINY, REPOSITORY, SIZES, exit_status, generated, one_line_error, saved_pair
from transformers import LlamaConfig

from models.cost_model import bytes_per_token
from popengine.compare import main
from popengine.engine.loading import load
from popengine.evaluation import comparison
from popengine.evaluation.scoring import Window, cut_windows, log_probabilities, read_text
from popengine.evaluation.studies import drift_figures, pick_figures, picks, rank_drift
from popengine.evaluation.tasks import Question, is_answered, questions_for
from popengine.evaluation.text_tasks import LEARNT
from popengine.studies.activations import Activation, embedded, watch_dense
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

status, error = partial(exit_status, main), partial(one_line_error, main)
METHODS = ["dense", "all-channels", "pop", "frozen", "random", "magnitude", "wanda-sp", "flap"]
SKIPPING = ["prefill-only", "skip-first", "skip-evenly", "skip-no-boundary", "skip-no-keys"]


@pytest.fixture
def flags(checkpoint: Path, text: Path) -> list[Any]:
    return [
        "--ckpt", checkpoint, "--text", text, "--prompt-tokens", 24, "--score-tokens", 16, "--windows", 2,
        "--ffn-ratio", 0.2, 0.4, "--paper",
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "table.json").read_text())["rows"]


def test_table_and_plots_of_every_method(
    flags: list[Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    many = ["--methods", *METHODS, "--candidate-width", 0.1, 0.4, "--calibration-text", text, "--head-ratio", 0, 0.5]
    assert status(*flags, *many, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text()
    table = rows(out)
    # Per ratio: pop with two widths and frozen and all-channels, heads off and on, and four static methods.
    assert len(table) == 1 + 2 * (2 * 2 + 2 + 2 + 4)
    assert {row["method"] for row in table} == set(METHODS)
    about = json.loads((out / "table.json").read_text())["about"]
    assert about["machine"]["torch"] == torch.__version__ and about["seed"] == 0
    for plot in ("perplexity.png", "agreement.png", "rank_drift.png", "partition.png"):
        assert plot in about["plots"]
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert table[0]["method"] == "dense" and table[0]["agreement"] == 1 and table[0]["weight_share"] == 1


def test_prompts_that_skip_layers_are_compared(flags: list[Any], tmp_path: Path) -> None:
    flags = [*flags, "--methods", "dense", "pop", *SKIPPING, "--no-plots", "--out", tmp_path]
    assert status(*flags, "--prefill-skip", 0, "2/3", "--boundary-tokens", 1, 5) == 0
    table = rows(tmp_path)
    # Per ratio: pop without and, for two boundaries, with skipping. The others have no ratio, and one no boundary.
    assert len(table) == 1 + 2 * (1 + 2) + 4 * 2 + 1
    others = table[1:]
    assert all(row["ratio"] == 0 and row["weight_share"] == 1 for row in others if row["method"] in SKIPPING)
    assert len({row["perplexity"] for row in table}) == len(table)
    head, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| prompt skips | boundary tokens |" in head
    assert any("| skip-no-boundary | 0 | 0 | 2/3 |  |" in line for line in lines), lines


def test_a_killed_run_goes_on_and_gives_the_same_table(
    flags: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags, "--methods", "pop", "frozen", "--no-plots"]
    assert status(*flags, "--out", tmp_path / "whole") == 0
    scored = 0
    real = comparison.Configuration.key

    def killed(one: Any, what: str) -> str:
        nonlocal scored
        scored += what.startswith("window")
        if scored == 13:
            raise KeyboardInterrupt
        return real(one, what)

    with monkeypatch.context() as patch:
        patch.setattr(comparison.Configuration, "key", killed)
        assert status(*flags, "--out", tmp_path / "killed") == 130
    done = (tmp_path / "killed" / "progress.jsonl").read_text()
    assert 1 < done.count("\n") < 9
    assert status(*flags, "--out", tmp_path / "killed") == 0
    assert (tmp_path / "killed" / "progress.jsonl").read_text().startswith(done)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_damaged_record_is_moved_aside_and_sound_lines_are_kept(
    flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--methods", "pop", "--no-plots", "--out", tmp_path]
    assert status(*flags) == 0
    wanted, file = rows(tmp_path), tmp_path / "progress.jsonl"
    lines = file.read_text().splitlines()
    torn = "\n".join([*lines[:2], lines[2][:50], *lines[3:]]) + "\n"
    file.write_text(torn)
    capsys.readouterr()
    assert status(*flags) == 0
    said = capsys.readouterr().err
    assert f"{len(lines) - 2} of its measurements are kept" in said and "damaged-1" in said
    assert (tmp_path / "progress.jsonl.damaged-1").read_text() == torn
    assert rows(tmp_path) == wanted
    assert sorted(file.read_text().splitlines()) == sorted(lines)
    file.write_bytes(b"\xff\x00 not a record")
    assert status(*flags) == 0
    assert (tmp_path / "progress.jsonl.damaged-2").read_bytes() == b"\xff\x00 not a record"
    assert rows(tmp_path) == wanted


def test_bad_input_is_one_line(flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out", "--no-plots"]
    assert "give --prefill-skip" in error(capsys, *flags, *out, "--methods", "prefill-only")
    shutil.rmtree(tmp_path / "out")
    assert "the methods are dense" in error(capsys, *flags, *out, "--methods", "pop", "popp")
    assert "there are text, pictures" in error(capsys, *flags, *out, "--tasks", "puzzles")
    assert "between 0 and 2" in error(capsys, *flags, *out, "--candidate-width", 3)
    assert "prefill must be one of" in error(capsys, *flags, *out, "--prefill", "sparse")
    assert "--text" in error(capsys, *flags[:2], *out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be made" in error(capsys, *flags, "--out", tmp_path / "file")
    assert "two" not in error(capsys, *flags, *out, "--windows", 5000)
    assert status(*flags, *out, "--methods", "frozen") == 0
    other = [part if part != 24 else 20 for part in flags]
    assert "prompt_tokens differ" in error(capsys, *other, *out, "--methods", "frozen")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux, where nobody may make a folder in /proc")
def test_a_folder_that_cannot_be_written(flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    unwritable = Path("/proc") if os.geteuid() == 0 else tmp_path           # root may write into a folder of any mode
    assert "cannot be" in error(capsys, *flags, "--out", unwritable / "inside", "--no-plots")


def test_two_rows_are_compared_question_by_question(tmp_path: Path) -> None:
    answers = {"pop": [True, True, False, True], "frozen": [True, False, False, False]}
    settings = PruningSettings.paper(prune_ratio=0.4)
    records = [
        {"key": comparison.Configuration(method, settings).key("tasks text"), "right": {"add": right}}
        for method, right in answers.items()
    ]
    lines = [json.dumps(one) + "\n" for one in ({"comparison": {"questions": 4, "seed": 0}}, *records)]
    (tmp_path / "progress.jsonl").write_text("".join(lines))
    tool = REPOSITORY / "tools" / "paired_difference.py"
    named = "pop 40 %, width 0.1, min evidence 0", tmp_path, "frozen 40 %, min evidence 0"
    command = [sys.executable, tool, tmp_path, *named]
    made = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    # Of the differences 0, 100, 0, 100: their mean, and the square root of 10,000 / 3 / 4.
    wanted = f"{named[0]} less {named[2]}: +50.0000 ± 28.8675 % of answers, 4 questions of tasks text\n"
    assert made.stdout == wanted


def test_tasks_are_generated_and_compared_exactly(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", checkpoint, "--tasks", "text", "--questions", 1, "--methods", "dense", "pop"]
    assert status(*flags, "--out", tmp_path) == 0
    for row in rows(tmp_path):
        assert set(row["tasks_text"]["asked"].values()) == {1}
        assert len(row["tasks_text"]["asked"]) == len(LEARNT)
    engine = load(checkpoint, device="cpu")
    made = engine.generate("What now?", max_new_tokens=64, pruning=DENSE)[0].text
    assert is_answered(engine, Question("any", "What now?", made.strip()), DENSE)
    assert not is_answered(engine, Question("any", "What now?", made.strip() + "!"), DENSE)
    assert len(questions_for("pictures", 2, 0)) == 12
    with pytest.raises(InputError, match="at least 1"):
        questions_for("text", 0, 0)


def test_a_setting_that_the_model_cannot_take_leaves_nothing_behind(
    flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "turns off none" in error(capsys, *flags, "--methods", "pop", "--head-ratio", 0.01, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


@torch.inference_mode()
def test_rank_drift_is_what_its_definition_says(tmp_path: Path) -> None:
    """Against a loop over channels; and a step that repeats a prompt of one token has not drifted at all."""
    model = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    window = Window([5, 6, 7, 8], [9, 10, 11])
    drift = rank_drift(model, window)
    seen: list[Activation] = []
    watch_dense(model, embedded(model, window.ids), seen.append)
    first = seen[0]
    norms, channels = first.ffn.down_norms(), SIZES["intermediate_size"]

    def order(scores: list[float]) -> list[int]:
        return sorted(range(channels), key=lambda channel: -scores[channel])

    prompt = order((first.h[:4].square().sum(0).sqrt() * norms).tolist())
    for step in range(3):
        now = order((first.h[4 + step].abs() * norms).tolist())
        difference = sum(abs(now.index(i) - prompt.index(i)) for i in range(channels)) / channels / channels
        overlap = len(set(now[: channels // 2]) & set(prompt[: channels // 2])) / (channels // 2)
        assert float(drift.rank_difference[0, step]) == pytest.approx(difference, abs=1e-6)
        assert float(drift.overlap[0, step]) == pytest.approx(overlap, abs=1e-6)


@torch.inference_mode()
def test_rank_drift_of_experts_is_known_where_a_step_reached_them() -> None:
    engine = load(MIXTRAL_TINY, device="cpu")
    ids = engine.tokenizer.encode("tally dbbd=d1b1b2d2; tally cabb=c1a1b1b2; tally da=d1a1", add_special_tokens=False)
    window = Window(ids[:30], ids[30:])
    drift = rank_drift(engine.model, window)
    config = engine.model.config
    assert len(drift.names) == config.num_hidden_layers * config.num_experts
    layers = drift.rank_difference.unflatten(0, (config.num_hidden_layers, -1))     # [layers, experts, S]
    known = ~layers.isnan()
    assert (known.sum(dim=1) <= config.num_experts_per_tok).all()
    assert known.float().sum(dim=1).mean() > 0.8 * config.num_experts_per_tok       # most experts were in the prompt
    assert torch.equal(known.flatten(0, 1), ~drift.overlap.isnan())
    assert ((layers[known] > 0) & (layers[known] < 0.5)).all()
    figures = drift_figures([drift])
    assert figures["rank_difference"] == pytest.approx(float(layers[known].mean()))
    assert figures["rank_difference_first_16"] == pytest.approx(float(layers[..., :16].nanmean()))


@pytest.mark.parametrize("asked", [1, 2])
def test_agreement_along_dense_generation_is_what_the_method_would_generate(
    asked: int, flags: list[Any], checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all windows, or of the first ones."""
    monkeypatch.setattr(comparison, "GENERATED_WINDOWS", asked)
    assert status(*flags, "--methods", "dense", "pop", "frozen", "--no-plots", "--out", tmp_path) == 0
    engine = load(checkpoint, device="cpu")
    whole = read_text(text, engine.tokenizer)
    windows = cut_windows(whole, engine.tokenizer, 24, 16, 2)

    for row in rows(tmp_path):
        width = 0 if row["method"] == "frozen" else 0.1
        settings = PruningSettings.paper(ffn_ratio=row["ffn_ratio"], candidate_width=width)
        alike = 0
        for window in windows[:asked]:
            dense, own = (generated(engine, [window.prompt], 16, one) for one in (DENSE, settings))
            alike += next((at for at in range(16) if dense[at] != own[at]), 16)
        assert row["identical_tokens"] == alike / asked
        assert row["identical_tokens"] / 16 <= row["generated_agreement"] <= 1
    assert rows(tmp_path)[0]["identical_tokens"] == 16


def recorded(lines: list[Any], row: dict[str, Any], what: str, figure: str) -> list[Any]:
    """Return a figure of a row's records in a progress file, in the order of windows or rounds."""
    own = [line for line in lines if line["key"].startswith(f"{what} ") and all(
        value in (None, row[name]) for name, value in json.loads(line["key"].partition(": ")[2]).items()
    )]
    return [line[figure] for line in sorted(own, key=lambda line: line["key"])]


def test_forms_of_the_weights_are_compared_with_the_first_ones_dense_model(
    flags: list[Any], checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    forms = ["--dtype", "bfloat16", "--weights", "plain", "int8", "--time", 2, "--methods", "dense", "draft"]
    assert status(*flags, *forms, "--out", tmp_path) == 0
    table = rows(tmp_path)
    assert [(row["weights"], row["method"], row["ratio"] > 0) for row in table] == [
        (form, *of) for form in ("plain", "int8") for of in (("dense", False), ("draft", True), ("draft", True))
    ]
    whole = read_text(text, load(checkpoint, device="cpu").tokenizer)
    for row in (table[0], table[3]):
        engine = load(checkpoint, device="cpu", dtype="bfloat16", weights=row["weights"])
        assert row["weight_bytes_per_token"] == bytes_per_token(engine.model, engine.resolve(DENSE))
        losses = [
            -log_probabilities(engine, window, engine.resolve(DENSE))[torch.arange(16), window.continuation]
            for window in cut_windows(whole, engine.tokenizer, 24, 16, 2)
        ]
        assert row["mean_loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)
    assert table[0]["weight_share"] == 1 and table[3]["weight_share"] < 0.6
    assert "| int8 | draft |" in (tmp_path / "table.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()[1:]]
    for row, dense_row in zip(table, [table[0]] * 3 + [table[3]] * 3, strict=True):
        over = row["over_dense"]
        losses, its = (np.mean(recorded(lines, one, "window", "losses"), axis=1) for one in (row, dense_row))
        quotient, spread = np.exp(np.mean(losses - its)), np.std(losses - its, ddof=1) / 2**0.5
        assert over["bytes"] == row["weight_bytes_per_token"] / dense_row["weight_bytes_per_token"]
        assert (over["perplexity"], over["error"]) == pytest.approx((quotient, quotient * spread))
        turns, dense_turns = (recorded(lines, one, "speed", "ms") for one in (row, dense_row))
        assert over["time"] == pytest.approx(np.median(np.divide(turns, dense_turns)))
    saved = ["--save-calibration", tmp_path / "c.safetensors", "--calibration-text", text]
    assert "one --weights" in error(capsys, *flags, *forms, *saved, "--out", tmp_path)


def test_picks_count_what_every_step_kept(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu")
    pruning = engine.resolve(PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3))
    seen = picks(engine, Window(list(range(20)), list(range(20, 31))), pruning)
    assert [network.name for network in seen] == [f"model.layers.{index}.mlp" for index in range(3)]
    for network in seen:
        assert network.steps == 10
        assert int(network.picked.sum()) == 10 * network.partition.sizes.pick
    figures = pick_figures(seen)
    shares = torch.cat([network.picked for network in seen]) / 10
    assert figures["median"] == pytest.approx(float(shares.quantile(0.5)))
    assert figures["always"] == pytest.approx(float((shares == 1).float().mean()))
