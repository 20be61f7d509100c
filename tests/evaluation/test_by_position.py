"""Losses by position after the prompt, and the studies of rankings and picks per layer."""

import itertools
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exit_status, one_line_error

from popengine import compare
from popengine.engine.loading import load
from popengine.evaluation.by_position import by_position, position_groups, tables
from popengine.evaluation.scoring import (
    Window,
    WindowScore,
    cut_windows,
    dense_log_probabilities,
    log_probabilities,
    read_text,
)
from popengine.evaluation.studies import RankDrift, drift_of_networks, pick_figures, picks
from popengine.studies.recording import recorded
from popengine.studies.settings import DENSE, PruningSettings


def test_every_position_is_in_one_group_and_groups_double() -> None:
    assert position_groups(512) == [(1, 32), (33, 64), (65, 128), (129, 256), (257, 512)]
    assert position_groups(100) == [(1, 32), (33, 64), (65, 100)]
    assert position_groups(7) == [(1, 7)]


def scores(seed: int, tokens: int = 80, windows: int = 3) -> list[WindowScore]:
    made = torch.Generator().manual_seed(seed)
    drawn = torch.rand(windows, 3, tokens, generator=made, dtype=torch.float64)
    return [WindowScore(one[0].tolist(), (one[1] > 0.5).tolist(), one[2].tolist()) for one in drawn]


def test_figures_and_differences_are_of_windows_in_pairs() -> None:
    mine, dense = scores(1), scores(2)
    found = by_position(mine, {"dense": dense, "pop": None})
    lost = []
    for group, (first, last) in zip(found["groups"], [(0, 32), (32, 64), (64, 80)], strict=True):
        assert (group["first"], group["last"]) == (first + 1, last)
        own = [statistics.mean(score.losses[first:last]) for score in mine]
        theirs = [statistics.mean(score.losses[first:last]) for score in dense]
        lost.append([a - b for a, b in zip(own, theirs, strict=True)])
        agreed = [statistics.mean(score.agreed[first:last]) for score in mine]
        apart = [statistics.mean(score.divergences[first:last]) for score in mine]
        for name, values in (("loss", own), ("less_dense", lost[-1]), ("agreement", agreed), ("divergence", apart)):
            assert group[name]["mean"] == pytest.approx(statistics.mean(values))
            assert group[name]["error"] == pytest.approx(statistics.stdev(values) / 3**0.5)
        assert "less_pop" not in group
    growth = [late - early for early, late in zip(lost[0], lost[-1], strict=True)]
    assert found["last_less_first"]["less_dense"] == {
        "mean": pytest.approx(statistics.mean(growth)), "error": pytest.approx(statistics.stdev(growth) / 3**0.5)
    }
    single = by_position(mine[:1], {"dense": dense[:1]})
    assert single["groups"][0]["less_dense"]["error"] is None and json.dumps(single).count("NaN") == 0
    text = "\n".join(tables(["dense", "pop"], [{"text": by_position(dense, {}), "generated": by_position(dense, {})},
                                               {"text": found, "generated": found}]))
    assert text.count("Loss less dense's") == 2 and "less pop's" not in text
    assert f"| pop | {statistics.mean(lost[0]):+.3f} ± " in text and "| last less first |" in text


def test_compare_reports_positions_on_the_text_and_along_generation(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--ckpt", checkpoint, "--text", text, "--prompt-tokens", 20, "--score-tokens", 70, "--windows", 2]
    flags += ["--dtype", "float32", "--methods", "dense", "frozen", "pop", "--ffn-ratio", 0.3, 0.5, "--paper"]
    assert exit_status(compare.main, *flags, "--by-position", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    for words in ("Loss less dense's, nats per token, on the text", "Loss less pop's at the same ratio",
                  "on what the dense model generates", "| | 1 to 32 | 33 to 64 | 65 to 70 | last less first |"):
        assert words in printed
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "table.json").read_text())
    assert "positions.png" in result["about"]["plots"]
    engine = load(checkpoint, device="cpu", dtype="float32")
    windows = cut_windows(read_text(text, engine.tokenizer), engine.tokenizer, 20, 70, 2)
    written = [
        Window(one.prompt, [token for (token,) in engine.run([one.prompt], 70, DENSE, ignore_eos=True)])
        for one in windows
    ]
    for source, given in (("text", windows), ("generated", written)):
        losses = {
            (row["method"], row["ffn_ratio"]): of_windows(engine, given, row) for row in result["rows"]
        }
        for row in result["rows"]:
            groups = row["by_position"][source]["groups"]
            own = losses[row["method"], row["ffn_ratio"]]                           # [windows, S]
            references: dict[str, Any] = {"loss": 0.0}
            if row["method"] != "dense":
                references["less_dense"] = losses["dense", 0]
            if row["method"] == "frozen":
                references["less_pop"] = losses["pop", row["ffn_ratio"]]
            assert {*groups[0]} == {"first", "last", "agreement", "divergence", *references}
            for name, other in references.items():
                wanted = (own - other)[:, 32:64].mean(dim=1)
                assert groups[1][name]["mean"] == pytest.approx(float(wanted.mean()), abs=1e-4)
    error = partial(one_line_error, compare.main, capsys, "--ckpt", checkpoint, "--tasks", "text", "--out", tmp_path)
    assert "--by-position scores a text" in error("--by-position")


def of_windows(engine: Any, windows: list[Window], row: dict[str, Any]) -> torch.Tensor:
    """The losses of one row of a table, [windows, S]."""
    found = []
    for window in windows:
        if row["method"] == "dense":
            log_p = dense_log_probabilities(engine.model, window)
        else:
            width = 0.0 if row["method"] == "frozen" else 0.1
            settings = PruningSettings.paper(ffn_ratio=row["ffn_ratio"], candidate_width=width)
            log_p = log_probabilities(engine, window, engine.resolve(settings), step_by_step=True)
        found.append(-log_p.gather(1, torch.tensor(window.continuation)[:, None])[:, 0])
    return torch.stack(found)


def test_drift_per_network_is_a_mean_of_what_is_known() -> None:
    nan = float("nan")
    drifts = [
        RankDrift(["a", "b"], torch.full((2, 40), 0.2), torch.full((2, 40), 0.6)),
        RankDrift(["a", "b"], torch.tensor([[0.4] * 32 + [nan] * 8, [nan] * 40]), torch.full((2, 40), 0.8)),
    ]
    first, second = drift_of_networks(drifts)
    assert first["rank_difference"] == pytest.approx((40 * 0.2 + 32 * 0.4) / 72)
    assert [one["mean"] for one in first["rank_difference_by_position"]] == pytest.approx([0.3, 0.2])
    assert second["rank_difference"] == pytest.approx(0.2) and second["overlap"] == pytest.approx(0.7)
    (unknown,) = drift_of_networks([RankDrift(["b"], torch.full((1, 4), nan), torch.full((1, 4), nan))])
    assert unknown["overlap"] is None and unknown["overlap_by_position"][0]["mean"] is None


@torch.inference_mode()
def test_new_picks_are_counted_step_by_step(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu", dtype="float32")
    pruning = engine.resolve(PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3))
    window = Window(list(range(20)), list(range(20, 31)))
    networks = picks(engine, window, pruning)
    steps: dict[Any, list[set[int]]] = {}

    def observe(ffn: Any, partition: Any, keep: torch.Tensor) -> None:
        steps.setdefault(ffn, []).append({*keep.flatten().nonzero()[:, 0].tolist()})

    log_probabilities(engine, window, recorded(pruning, observe), step_by_step=True)
    for layer, network in zip(engine.model.model.layers, networks, strict=True):
        own = steps[layer.mlp]
        wanted = [len(now - before) / len(now) for before, now in itertools.pairwise(own)]
        assert network.changed == pytest.approx(wanted) and len(wanted) == 9
    assert pick_figures(networks)["new_at_a_step"] == pytest.approx(
        statistics.mean(share for network in networks for share in network.changed)
    )
