"""Layers that a prompt skips by name, by a gate study and by a greedy search."""

import itertools
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import skip_greedy
import torch
from builders import SIZES, exit_status, left_padded, one_line_error, saved_pair
from slow_prefill import two_passes
from tolerance import assert_same
from transformers import LlamaConfig

from models.cost_model import layer_weights
from popengine import compare, gates, score
from popengine.engine.loading import load
from popengine.evaluation.scoring import cut_windows, dense_log_probabilities, log_probabilities, read_text
from popengine.evaluation.skip_search import SkipSearch
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.chosen_layers import least_important
from popengine.studies.resolve import resolve_study
from popengine.studies.settings import DENSE, PruningSettings
from popengine.studies.skipped_layers import named_layers, written_layers
from weights.errors import InputError


@pytest.mark.parametrize(("words", "layers"), [
    ("layers:3,7,9", (3, 7, 9)), ("layers:9+7+3", (3, 7, 9)), ("layers:2-4,6", (2, 3, 4, 6)), ("layers:0", (0,)),
])
def test_named_layers_are_read_and_written(words: str, layers: tuple[int, ...]) -> None:
    assert named_layers(words) == layers == named_layers(written_layers(layers))


@torch.inference_mode()
def test_a_prompt_skips_exactly_the_named_layers(tmp_path: Path) -> None:
    model = saved_pair(tmp_path, LlamaConfig(**SIZES | {"num_hidden_layers": 6}))[1]
    tokens, real = left_padded([12, 8], SIZES["vocab_size"])
    weights = layer_weights(model)
    for words, skipped in (("layers:1,4", (1, 4)), ("layers:0-2", (0, 1, 2)), ("layers:5", (5,))):
        pruning = resolve_study(replace(DENSE, prefill_skip=words, boundary_tokens=2), weights)
        assert (pruning.skipped, pruning.ratio) == (skipped, 0)
        state = model.new_state(2, 20, pruning)
        logits = model.prefill(model.embed(tokens), state, real)
        slow, _ = two_passes(model, model.embed(tokens), resolve_study(DENSE, weights), skipped, 2, real)
        assert_same(logits, slow)
    deepest = resolve_study(replace(DENSE, prefill_skip="1/3"), weights)
    assert deepest.skipped == resolve_study(replace(DENSE, prefill_skip="layers:4+5"), weights).skipped == (4, 5)
    request = Request(model, replace(DENSE, prefill_skip="layers:1,4"))
    wanted = {"prefill-only": (1, 4), "skip-first": (0, 1), "skip-evenly": (2, 5), "skip-no-boundary": (1, 4)}
    assert {method: pruning_for(method, request).skipped for method in wanted} == wanted


def written_gates(folder: Path, sizes: Any, prompt: list[Any]) -> Path:
    file = folder / "gates.json"
    rows = [{"layer": index, "prompt": one} for index, one in enumerate(prompt)]
    file.write_text(json.dumps({"about": {"layer_weights": sizes}, "rows": rows}))
    return file


def test_gates_choose_the_layers_that_matter_least(tmp_path: Path) -> None:
    weights = layer_weights(saved_pair(tmp_path, LlamaConfig(**SIZES | {"num_hidden_layers": 6}))[1])
    file = written_gates(tmp_path, asdict(weights), [5.0, 0.5, 0.1, 3.0, 0.1, 0])
    assert least_important(file, weights) == (5, 4, 2, 1, 3, 0)                     # of equals the deeper first
    for words, skipped in (("auto:1/2", (2, 4, 5)), ("auto:4", (1, 2, 4, 5)), ("auto:0.2", (5,))):
        pruning = resolve_study(replace(DENSE, prefill_skip=f"{words}:{file}"), weights)
        assert pruning.skipped == skipped
        assert pruning.settings.prefill_skip == written_layers(skipped)             # what reports and tables say
    for words, said in (("auto:0.1", "skips 0 of 6 layers"), ("auto:7", "skips 7 of 6 layers")):
        with pytest.raises(InputError, match=said):
            resolve_study(replace(DENSE, prefill_skip=f"{words}:{file}"), weights)
    with pytest.raises(InputError, match="model of other sizes"):
        least_important(file, replace(weights, ffn=weights.ffn + 1))


@pytest.mark.parametrize("damage", [
    "", "[]", "{}", '{"about": [], "rows": []}', '{"about": {}, "rows": [1]}',
    '{"about": {}, "rows": [{"prompt": "a"}]}', '{"about": {}, "rows": [{"prompt": -1}]}',
    '{"about": {}, "rows": [{"prompt": NaN}]}', "[" * 100_000,
])
def test_damaged_gates_are_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_text(damage)
    with pytest.raises(InputError, match=r"gates\.json: "):
        least_important(tmp_path / "gates.json", None)  # type: ignore[arg-type]  # no model is needed


def test_commands_take_what_the_gates_command_wrote(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--ckpt", checkpoint, "--text", text]
    measured = [*common, "--samples", 1, "--prompt-tokens", 20, "--answer-tokens", 3, "--out", tmp_path / "g"]
    assert exit_status(gates.main, *measured, "--no-plots") == 0
    auto = ["--prefill-skip", f"auto:1/3:{tmp_path / 'g' / 'gates.json'}"]
    small = ["--prompt-tokens", 20, "--score-tokens", 4, "--windows", 1]
    out = ["--out", tmp_path / "c", "--no-plots", "--methods", "dense", "prefill-only", "pop", "--paper"]
    assert exit_status(compare.main, *common, *small, *out, *auto) == 0
    rows = json.loads((tmp_path / "c" / "table.json").read_text())["rows"]
    assert {row["prefill_skip"] for row in rows[1:]} == {"layers:2"}                # the last layer: its gate is 0
    assert exit_status(compare.main, *common, *small, *out, "--prefill-skip", "layers:2") == 0
    assert json.loads((tmp_path / "c" / "table.json").read_text())["rows"] == rows  # nothing was measured again
    capsys.readouterr()
    error = partial(one_line_error, score.main, capsys, *common, *small)
    assert "no such file; `popengine gates" in error("--prefill-skip", f"auto:1/3:{tmp_path / 'none.json'}")
    assert "layers are 0 to 2" in error("--prefill-skip", "layers:1,3")
    assert "must name layers like" in error("--prefill-skip", "layers:3-1")
    assert all("layers are named like layers:3,7,9" in error("--prefill-skip", words) for words in ("3,1", "1-2", "7"))
    assert "auto takes a share or a number" in error("--prefill-skip", "auto:3/2")


def test_the_greedy_search_adds_the_layer_that_costs_least(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--ckpt", checkpoint, "--text", text, "--layers", 2, "--windows", 2, "--prompt-tokens", 16]
    flags += ["--score-tokens", 8, "--dtype", "float32"]
    assert exit_status(skip_greedy.main, *flags, "--out", tmp_path / "whole") == 0
    assert capsys.readouterr().out == (tmp_path / "whole" / "skipped.md").read_text()
    found = json.loads((tmp_path / "whole" / "skipped.json").read_text())["rounds"]
    engine = load(checkpoint, device="cpu", dtype="float32")
    windows = cut_windows(read_text(text, engine.tokenizer), engine.tokenizer, 16, 8, 2)

    def loss(skip: str | float) -> float:
        pruning = engine.resolve(PruningSettings.paper(prune_ratio=0.0, prefill_skip=skip))
        said = [torch.tensor(window.continuation)[:, None] for window in windows]
        of_each = [
            (dense_log_probabilities(engine.model, window) if skip == 0 else
             log_probabilities(engine, window, pruning)).gather(1, own).mean()
            for window, own in zip(windows, said, strict=True)
        ]
        return -float(torch.stack(of_each).mean())

    chosen: list[int] = []
    for one in found:
        sets = {layer: loss(written_layers([*chosen, layer])) for layer in range(3) if layer not in chosen}
        chosen.append(min(sets, key=lambda layer: (round(sets[layer], 5), -layer)))
        assert one["layers"] == written_layers(chosen)
        assert one["less_dense"]["mean"] == pytest.approx(sets[chosen[-1]] - loss(0), abs=1e-4)
    assert found[0]["layers"] == "layers:2" and found[1]["deepest_less_dense"]["mean"] == pytest.approx(
        loss("2/3") - loss(0), abs=1e-4
    )
    # A run that is killed after four sets goes on, and finds the same.
    real, left = SkipSearch.loss, itertools.count()

    def killed(*arguments: Any) -> float:
        if next(left) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(SkipSearch, "loss", killed)
    assert exit_status(skip_greedy.main, *flags, "--out", tmp_path / "killed") == 130
    assert exit_status(skip_greedy.main, *flags, "--out", tmp_path / "killed") == 0
    assert json.loads((tmp_path / "killed" / "skipped.json").read_text())["rounds"] == found
    assert next(left) == 2 * (1 + 3 + 2) + 1                # dense, 3 and 2 sets of 2 windows; a window twice
    capsys.readouterr()
    assert exit_status(skip_greedy.main, *flags, "--out", tmp_path / "short", "--minutes", 1e-9) == 0
    assert "time is over after 0 of 2 layers" in capsys.readouterr().err
    error = partial(one_line_error, skip_greedy.main, capsys, *flags, "--out", tmp_path / "bad")
    assert "give 1 to 2" in error("--layers", 3) and "is 0 of" in error("--layers", "0.1")
    assert "a number of layers or a share" in error("--layers", "some")
    assert "boundary tokens must be" in error("--boundary-tokens", 16)
    assert "minutes must be above 0" in error("--minutes", 0)


def test_packed_weights_have_the_sizes_by_which_gates_know_a_model(checkpoint: Path) -> None:
    plain, packed = (layer_weights(load(checkpoint, device="cpu", weights=form).model) for form in ("plain", "int8"))
    assert plain == packed
