"""A setting is one field: flags, reports and the columns of tables follow from it, so that none can be forgotten."""

from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
from builders import another_setting, another_value

from models.pruning.resolve import LayerWeights
from models.pruning.settings import PAPER
from popengine import compare, generate, score
from popengine.command_line.flags import sampling_fields
from popengine.command_line.setting_flags import pruning_settings, take_paper_values
from popengine.engine.results import pruning_report
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.comparison import Configuration
from popengine.evaluation.comparison_table import markdown
from popengine.studies.resolve import resolve_study
from popengine.studies.settings import GROUPS, PruningSettings, compared_fields
from weights.errors import InputError

NAMES = [one.name for one in fields(PruningSettings)]
COMPARED = [one.name for one in compared_fields()]
NEEDED = {generate: ["--prompt", "x"], score: ["--text", "x"], compare: ["--out", "x"]}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", [generate, score], ids=["generate", "score"])
def test_every_setting_has_a_flag(command: ModuleType, name: str) -> None:
    changes = another_setting(name)
    words = [word for one, value in changes.items() for word in (flag(one), str(value))]
    read = command.parser().parse_args([*NEEDED[command], *words])
    assert pruning_settings(read) == PruningSettings(**changes) != PruningSettings()
    assert pruning_settings(command.parser().parse_args(NEEDED[command])) == PruningSettings()


@pytest.mark.parametrize("command", [generate, score, compare], ids=["generate", "score", "compare"])
def test_flags_stand_with_those_of_their_study(command: ModuleType) -> None:
    groups = {group.title: {one.dest for one in group._group_actions} for group in command.parser()._action_groups}
    has = COMPARED if command is compare else NAMES
    for title, settings in GROUPS.items():
        assert groups[title] - {"paper"} == {one.name for one in fields(settings) if one.name in has} != set()


def test_every_setting_of_sampling_has_a_flag() -> None:
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.4, "seed": 5, "min_p": 0.1, "repetition_penalty": 1.5}
    assert {*values, "stop"} == {one.name for one in fields(Sampling)}
    words = [word for name, value in values.items() for word in (flag(name), str(value))]
    read = generate.parser().parse_args([*NEEDED[generate], *words, "--stop", "a", "--stop", "b"])
    assert Sampling(**sampling_fields(read)) == Sampling(**values, stop=("a", "b"))
    assert Sampling(**sampling_fields(generate.parser().parse_args(NEEDED[generate]))) == Sampling()


@pytest.mark.parametrize("command", [generate, score], ids=["generate", "score"])
def test_one_flag_asks_for_the_paper_s_settings(command: ModuleType) -> None:
    words = [*NEEDED[command], "--ratio", "0.3"]
    read = command.parser().parse_args
    recommended, paper = pruning_settings(read(words)), pruning_settings(read([*words, "--paper"]))
    assert recommended == PruningSettings(prune_ratio=0.3) != paper
    assert paper == PruningSettings.paper(prune_ratio=0.3) == replace(recommended, **PAPER)
    assert pruning_settings(read([*words, "--paper", "--candidate-width", "0.2"])).candidate_width == 0.2


def test_compare_takes_the_paper_s_values_where_no_flag_gives_others() -> None:
    read = compare.parser().parse_args([*NEEDED[compare], "--paper", "--min-evidence", "64"])
    take_paper_values(read)
    assert (read.candidate_width, read.min_evidence) == ([0.1], [64])
    read = compare.parser().parse_args(NEEDED[compare])
    take_paper_values(read)
    assert (read.candidate_width, read.min_evidence) == ([PruningSettings().candidate_width], [64])


@pytest.mark.parametrize("name", COMPARED)
def test_every_compared_setting_takes_several_values_in_compare(name: str) -> None:
    one = next(one for one in compared_fields() if one.name == name)
    values = [another_value(name), one.default if one.default is not None else one.metadata["least"]]
    read = compare.parser().parse_args([*NEEDED[compare], flag(name), *map(str, values)])
    assert getattr(read, name) == values
    defaults = compare.parser().parse_args(NEEDED[compare])
    assert getattr(defaults, name) == (None if one.default is None else [one.default])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COMPARED])
def test_what_is_not_compared_is_no_flag_of_compare(name: str) -> None:
    with pytest.raises(InputError, match=f"unrecognized arguments: {flag(name)}"):
        compare.parser().parse_args([*NEEDED[compare], flag(name), str(another_value(name))])


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_in_the_report(name: str) -> None:
    weights = LayerWeights(attention=4000, ffn=12000, head=500, head_groups=2, heads_per_group=2, layers=4)
    settings = PruningSettings(**another_setting(name))
    report = pruning_report(resolve_study(settings, weights))
    assert set(NAMES) <= report.keys()
    assert report[name] == pytest.approx(another_value(name))


@pytest.mark.parametrize("name", [one.name for one in compared_fields() if one.metadata["column"]])
def test_a_compared_setting_that_differs_is_a_column(name: str) -> None:
    ((heading, matters),) = (
        (one.metadata["column"], one.metadata["matters"]) for one in compared_fields() if one.name == name
    )
    method = "shortgpt" if matters == "to layers" else "pop"
    measured = {"ratio": 0.2, "ffn_ratio": 0.3, "weight_bytes_per_token": 10, "weight_share": 0.5, "over_dense": None}
    changed = another_setting(name)
    plain = {other: value for other, value in changed.items() if other != name}     # what the setting asks for besides
    rows = [Configuration(method, PruningSettings(**changes)).fields() | measured for changes in (plain, changed)]
    assert f"| {heading} |" in markdown(rows, {"machine": {}, "plots": []}, {}).splitlines()[0]
    assert f"| {heading} |" not in markdown(rows[:1], {"machine": {}, "plots": []}, {}).splitlines()[0]


def out_of_bounds(metadata: Any) -> list[Any]:
    if metadata["choices"] or metadata["type"] is str:
        return ["no such choice"]
    found = [metadata["least"] - 1, float("nan")]
    found += [] if metadata["below"] is None else [metadata["below"]]
    return found + ([] if metadata["most"] is None else [metadata["most"] + 0.1])


@pytest.mark.parametrize("name", NAMES)
def test_values_out_of_a_settings_bounds_are_refused_by_name(name: str) -> None:
    (one,) = (one for one in fields(PruningSettings) if one.name == name)
    for value in out_of_bounds(one.metadata):
        with pytest.raises(InputError, match=f"{name.replace('_', ' ')} must be"):
            PruningSettings(**another_setting(name) | {name: value})
