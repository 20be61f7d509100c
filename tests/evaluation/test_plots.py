"""The plots: no empty panel, no legend over data, price and gain visible, and a note without matplotlib."""

import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import draw_frontier
import pytest
import torch
from builders import exit_status

from models.pruning.partition import PartitionSizes, partition_channels
from popengine import compare, gates
from popengine.evaluation import plots
from popengine.evaluation.studies import NetworkPicks, RankDrift

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were saved, still open."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    yield figures
    plots.pyplot.close("all")


def point(method: str, megabytes: float, perplexity: float | None, width: float = 0.1, tokens: int = 40) -> plots.Point:
    shares = [0.9] * tokens
    return plots.Point(method, method, 0.3, width, megabytes, megabytes / 100, perplexity, shares, shares, shares)


def row(method: str, megabytes: float, loss: float | None, ms: float) -> dict[str, Any]:
    over = {"bytes": megabytes / 100, "perplexity": loss and loss / 3, "error": loss and 0.01, "time": ms / 10}
    return {"method": method, "weights": "auto", "candidate_width": 0.1, "over_dense": over,
            "weight_share": megabytes / 100, "ratio": 0.3, "agreement": 0.9, "divergence": 0.1,
            "decode_ms_per_token": ms,
            "tasks_text": {"right": {"sum": 3}, "asked": {"sum": 4}}}


def sound(figure: Any) -> None:
    """Every panel has data and named axes, and no legend lies over a panel."""
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.lines or axes.collections or axes.images or axes.patches, "an empty panel"
        assert axes.get_xlabel() or axes.get_ylabel()
        shown = [line for line in axes.lines if len(line.get_xdata()) == 1 and not line.get_label().startswith("_")]
        assert all(line.get_marker() not in ("", "None") for line in shown), "a point that cannot be seen"
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert axes.get_legend() is None


def picked(candidates: int) -> list[NetworkPicks]:
    sizes = PartitionSizes(8, candidates, 12 - candidates, candidates // 2)
    partition = partition_channels(torch.arange(20.0), sizes)
    return [NetworkPicks("layer 0", partition, torch.arange(candidates), 4)] * 3


DRIFT = RankDrift(["a", "b", "c"], torch.rand(3, 1), torch.rand(3, 1))


def words(figure: Any) -> str:
    """All that is written around the panels."""
    figure.canvas.draw()
    more = [one for axes in figure.axes for one in axes.child_axes]
    return " ".join(f"{axes.get_xlabel()} {axes.get_ylabel()}" for axes in [*figure.axes, *more])


def test_price_and_gain_are_both_visible(drawn: list[Any], tmp_path: Path) -> None:
    points = [point("dense", 100, 20), point("pop", 90, 21), point("pop", 95, 20.5, 0.4), point("frozen", 70, 900)]
    assert plots.plot_perplexity(points, tmp_path / "a.png")
    assert "bytes saved against dense, %" in words(drawn[-1]) and "perplexity over dense's" in words(drawn[-1])
    rows = [row("dense", 100, 3, 10), row("pop", 90, 3.1, 8), row("frozen", 70, 4, 7)]
    assert plots.plot_frontier(rows, tmp_path / "a.png")
    assert all(what in words(drawn[-1]) for what in ("weights read", "time per decoded token", "perplexity over dense"))
    assert plots.plot_tasks(["dense", "pop", "frozen"], rows, "text", tmp_path / "a.png")
    assert "right answers" in words(drawn[-1]) and "weights read" in words(drawn[-1])
    assert plots.plot_agreement(points, tmp_path / "a.png")
    assert "pop (90% of the bytes)" in [text.get_text() for text in drawn[-1].legends[0].get_texts()]
    for figure in drawn:
        sound(figure)


@pytest.mark.parametrize("method", ["dense", "pop"])
@pytest.mark.parametrize("perplexity", [1.0, 12.5, 640.0, 9e5])
def test_a_single_point_is_drawn_with_ticks(method: str, perplexity: float, drawn: list[Any], tmp_path: Path) -> None:
    one = [point(method, 100, perplexity, tokens=1)]
    assert plots.plot_perplexity(one, tmp_path / "a.png")
    assert plots.plot_agreement(one, tmp_path / "a.png") == (method != "dense")
    assert plots.plot_frontier([row(method, 100, 3, 10)], tmp_path / "a.png")
    assert plots.plot_tasks(["one"], [row(method, 100, 3, 10)], "text", tmp_path / "a.png")
    assert plots.plot_rank_drift([DRIFT], tmp_path / "a.png")
    for figure in drawn:
        sound(figure)
    ticks = [label for label in drawn[0].axes[0].get_yticklabels() if label.get_text()]
    assert len(ticks) >= 2


def test_the_frontier_of_several_comparisons_is_one_plot(
    drawn: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("plain", "int8"):
        (tmp_path / form).mkdir()
        of_form = [row(method, size, loss, ms) | {"weights": form} for method, size, loss, ms in
                   (("dense", 100, 3, 10), ("pop", 90, 3.1, 8))]
        of_form.append(of_form[1] | {"input_sparsity": "0.2"})
        (tmp_path / form / "table.json").write_text(json.dumps({"rows": of_form}))
    given = [str(tmp_path / "plain"), str(tmp_path / "int8"), str(tmp_path / "int8"), "--out", str(tmp_path / "a.png")]
    bench = tmp_path / "bench.json"
    timed = [{"engine": name, "decode_ms_per_token": {"median": ms}} for name, ms in (("dense", 8), ("llama.cpp", 9))]
    bench.write_text(json.dumps({"dtypes": [{"rows": timed}]}))
    assert draw_frontier.main([*given, "--bench", str(bench)]) == 0
    written = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in written[2:]] == [
        ["| bfloat16", "dense"], *[["| bfloat16", "pop"]] * 2, ["| int8", "dense"], *[["| int8", "pop"]] * 4,
        ["| the file", "llama.cpp, dense"],
    ]                                                   # the dense model once
    assert len({line.count("|") for line in written}) == 1
    assert written[3].split(" | ")[5:] == ["1.033 ± 0.010", "0.900", "0.100", "0.90", "8.0", "0.80 |"]
    assert written[-1].endswith("| 9.0 | 1.12 |")
    bench.write_text(json.dumps({"dtypes": [{"rows": timed[:1]}]}))
    assert draw_frontier.main([*given, "--bench", str(bench)]) == 2
    assert capsys.readouterr().err == f"error: {bench}: it has no row of dense steps and one of llama.cpp\n"
    named = {text.get_text() for text in drawn[-1].legends[0].get_texts()}
    assert {"plain, pop", "plain, pop, inputs off", "int8, dense"} < named
    sound(drawn[-1])
    untimed = row("pop", 90, 3.1, 8) | {"over_dense": None}
    (tmp_path / "int8" / "table.json").write_text(json.dumps({"rows": [untimed]}))
    for folder, said in ((tmp_path / "int8", "timed nothing"), (tmp_path, "cannot be read")):
        assert draw_frontier.main([str(folder), *given[3:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line


def test_nothing_is_drawn_of_nothing(drawn: list[Any], tmp_path: Path) -> None:
    assert not plots.plot_perplexity([point("pop", 90, None)], tmp_path / "a.png")
    assert not plots.plot_agreement([point("dense", 100, 20)], tmp_path / "a.png")
    assert not plots.plot_frontier([row("pop", 90, None, 8)], tmp_path / "a.png")
    assert not plots.plot_rank_drift([], tmp_path / "a.png")
    assert not plots.plot_tasks([], [], "text", tmp_path / "a.png")
    nothing = {"layer": 0, "prompt_share": 0.0, "output_share": 0.0}
    assert not plots.plot_gates([nothing], tmp_path / "a.png", "a")
    assert drawn == []


def test_maps_and_gates_have_no_empty_panel(drawn: list[Any], tmp_path: Path) -> None:
    assert plots.plot_partition_map(picked(6), tmp_path / "a.png", "pop")
    assert plots.plot_partition_map(picked(0), tmp_path / "a.png", "frozen")
    assert [len(figure.axes) for figure in drawn] == [3, 1]                         # with the colour bar
    gate_rows = [{"layer": 0, "prompt_share": 1.0, "output_share": 0.5}, {"layer": 1, "prompt_share": 0.0,
                                                                          "output_share": 0.5}]
    assert plots.plot_gates(gate_rows, tmp_path / "a.png", "a")
    for figure in drawn:
        sound(figure)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "popengine.evaluation.plots")
    missing = importlib.import_module("popengine.evaluation.plots")
    assert not missing.INSTALLED
    yield
    monkeypatch.undo()
    importlib.reload(plots)


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_numbers_are_there_and_a_note(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, common = tmp_path / "out", ["--ckpt", checkpoint, "--text", text, "--quiet", "--prompt-tokens", 24]
    compared = partial(exit_status, compare.main, *common, "--score-tokens", 8, "--windows", 1, "--methods", "dense")
    assert compared("pop", "--paper", "--tasks", "text", "--questions", 1, "--out", out) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no plots are drawn" in said.err and "popengine[plots]" in said.err
    assert said.out == (out / "table.md").read_text() and "pop" in said.out
    assert json.loads((out / "table.json").read_text())["about"]["plots"] == []
    assert not [*out.glob("*.png")]
    flags = [*common, "--samples", 1, "--answer-tokens", 2, "--out", tmp_path / "gates"]
    assert exit_status(gates.main, *flags) == 0
    said = capsys.readouterr()
    assert said.err.count("no plots are drawn") == 1 and said.out == (tmp_path / "gates" / "gates.md").read_text()
    assert not [*(tmp_path / "gates").glob("*.png")]
