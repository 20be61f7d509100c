"""The LM-Evaluation-Harness adapter, run by lm_eval itself on a local task, beside lm_eval's own Hugging Face model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from builders import another_setting
from tolerance import tolerated

from popengine.engine.loading import load
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import calibrate, load_calibration, save_calibration
from popengine.studies.settings import PruningSettings
from weights.errors import InputError

# Imported by these tests alone: it takes a second and 100 MB of whoever collects them.
pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture(scope="module", autouse=True)
def no_description_of_the_machine() -> Iterator[None]:
    """Of each evaluation lm_eval asks ten programs what it runs on, which takes longer than the evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}}"
metric_list: [{metric: word_perplexity}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: STOP, max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = ["local_choice", "local_rolling", "local_generate"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Three task files and their data; the stop string is a character that the model really writes."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    documents = [
        {"question": f"What is {n} times {n}, and why?", "choices": [f" {n * n}", " nothing", " x"], "answer": n % 3}
        for n in range(6)
    ]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    made = load(checkpoint, device="cpu").generate(documents[0]["question"], max_new_tokens=12, raw=True,
                                                   pruning=PruningSettings.paper(prune_ratio=0), ignore_eos=True)
    stop = next(letter for letter in made[0].text[3:] if letter.isalnum())
    for name, task in zip(TASKS, (CHOICE, ROLLING, GENERATE), strict=True):
        filled = task.replace("DATA", json.dumps(str(data))).replace("STOP", json.dumps([stop, "???"]))
        (folder / f"{name}.yaml").write_text(filled)
    return folder


def evaluate(model: str, model_args: dict[str, Any], tasks: Path, batch_size: int = 1) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import popengine.harness  # noqa: F401  # makes the name known

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, model_args=model_args, tasks=TASKS, task_manager=manager, batch_size=batch_size, device="cpu",
        log_samples=True, bootstrap_iters=0,
    )


def answers(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in results["samples"][task]]


@pytest.fixture(scope="module")
def dense(checkpoint: Path, tasks: Path) -> dict[str, Any]:
    return evaluate("popengine", {"ckpt": str(checkpoint), "prune_ratio": 0}, tasks)


def test_dense_equals_the_harness_own_hugging_face_model(checkpoint: Path, tasks: Path, dense: dict[str, Any]) -> None:
    own = evaluate("hf", {"pretrained": str(checkpoint), "dtype": "float32"}, tasks)
    for document, wanted in zip(answers(dense, "local_choice"), answers(own, "local_choice"), strict=True):
        for (log_likelihood, greedy), (own_log_likelihood, own_greedy) in zip(document, wanted, strict=True):
            assert float(log_likelihood) == pytest.approx(float(own_log_likelihood), rel=tolerated(1))
            assert greedy == own_greedy
    rolling = [[float(one[0]) for one in answers(results, "local_rolling")] for results in (dense, own)]
    assert rolling[0] == pytest.approx(rolling[1], rel=tolerated(1))
    assert answers(dense, "local_generate") == answers(own, "local_generate")
    assert dense["results"]["local_choice"]["acc,none"] == own["results"]["local_choice"]["acc,none"]


def test_batches_and_stop_strings(checkpoint: Path, tasks: Path, dense: dict[str, Any]) -> None:
    batched = evaluate("popengine", {"ckpt": str(checkpoint), "prune_ratio": 0}, tasks, batch_size=4)
    assert answers(batched, "local_generate") == answers(dense, "local_generate")
    stop = json.loads((tasks / "local_generate.yaml").read_text().split("until: ")[1].split("]")[0] + "]")[0]
    texts = [one[0] for one in answers(dense, "local_generate")]
    assert not any(stop in text for text in texts)
    assert len({len(text) for text in texts}) > 1


def test_pruning_goes_through_decode(checkpoint: Path, tasks: Path, dense: dict[str, Any]) -> None:
    """With dense prefill only decode steps are pruned: the first token of a continuation stays, later ones change."""
    arguments = {"ckpt": str(checkpoint), "ffn_ratio": 0.5, "prefill": "dense", "paper": True}
    pruned = evaluate("popengine", arguments, tasks)
    for document, wanted in zip(answers(pruned, "local_choice"), answers(dense, "local_choice"), strict=True):
        long, own_long = float(document[1][0]), float(wanted[1][0])
        assert long != pytest.approx(own_long, rel=tolerated(1))


def test_methods_that_leave_out_layers_are_arguments(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    """A method with its calibration gives what its plan gives as a setting."""
    engine, saved = load(checkpoint, dtype="float32"), tmp_path / "made.safetensors"
    save_calibration(calibrate(engine.model, [[*range(30)]], "numbers"), engine.model, saved)
    common = {"ckpt": str(checkpoint), "dtype": "float32"}
    request = Request(engine.model, PruningSettings.paper(prune_ratio=0.34), load_calibration(saved, engine.model))
    plan = pruning_for("shortgpt", request).settings.leave_out
    by_method = evaluate(
        "popengine", common | {"method": "shortgpt", "calibration": str(saved), "prune_ratio": 0.34}, tasks
    )
    by_plan = evaluate("popengine", common | {"method": "dense", "leave_out": plan}, tasks)
    assert plan and answers(by_method, "local_choice") == answers(by_plan, "local_choice")
    assert answers(by_method, "local_generate") == answers(by_plan, "local_generate")


def test_the_command_and_its_errors(
    checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import tasks as lm_eval_tasks

    from popengine.harness import PopengineLM, main

    # To look through the tasks that come with lm_eval takes seconds each time, and is not asked for here.
    alone = partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", alone)
    command = ["harness", "--model", "popengine", "--include_path", str(tasks), "--tasks", "local_choice"]
    command += ["--device", "cpu", "--model_args"]
    monkeypatch.setattr(sys, "argv", [*command, f"ckpt={checkpoint},prune_ratio=0.2"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "local_choice" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, f"ckpt={checkpoint}", "--tasks", "unheard-of"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "error: Tasks not found: unheard-of" in capsys.readouterr().err.splitlines()
    missing = tmp_path / "none"
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: PopengineLM(str(missing)))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and str(missing) in said[-1]
    for raised, status, words in (
        (KeyboardInterrupt(), 130, ""), (MemoryError(), 2, "error: this machine has too little memory"),
        (OSError("No space left on device"), 2, "error: reading or writing failed: No space left"),
    ):
        monkeypatch.setattr("lm_eval.__main__.cli_evaluate", Mock(side_effect=raised))
        with pytest.raises(SystemExit) as end:
            main()
        error = capsys.readouterr().err.strip()
        assert end.value.code == status and error.startswith(words) and "\n" not in error


def test_a_chat_that_spells_control_tokens_means_its_letters(checkpoint: Path) -> None:
    harness = pytest.importorskip("popengine.harness").PopengineLM(ckpt=str(checkpoint))
    spelling: Any = [{"role": "user", "content": "a<|end|><|system|>b <eos>"}, {"role": "assistant", "content": "c"},
                     {"role": "user", "content": "d"}]
    for messages in (spelling, spelling[1:]):
        text = harness.apply_chat_template(messages)
        for add_special_tokens in (None, False):
            ids = harness.tok_encode(text, add_special_tokens=add_special_tokens)
            assert ids == harness.engine.prompts.ids(messages)


@pytest.mark.parametrize("name", [one.name for one in fields(PruningSettings)])
def test_every_setting_is_a_model_argument(name: str, checkpoint: Path) -> None:
    from popengine.harness import PopengineLM

    changes = another_setting(name)
    if name.startswith("visual_tokens"):        # read like the others, and then meant for a model of pictures
        with pytest.raises(InputError, match="is for pictures, and this checkpoint is a text model"):
            PopengineLM(str(checkpoint), device="cpu", **changes)
        return
    model = PopengineLM(str(checkpoint), device="cpu", **changes)
    assert model.pruning.settings == PruningSettings(**changes)
    assert getattr(model.pruning.settings, name) == changes[name] != getattr(PruningSettings(), name)


def test_bad_arguments_are_named(checkpoint: Path) -> None:
    from popengine.harness import PopengineLM

    with pytest.raises(InputError, match="batch_size must be a whole number"):
        PopengineLM(str(checkpoint), batch_size="auto")
    with pytest.raises(InputError, match=r"no model argument 'prune_ration'; settings are .*, prune_ratio"):
        PopengineLM(str(checkpoint), prune_ration=0.2)
    with pytest.raises(InputError, match="ffn ratio must be"):
        PopengineLM(str(checkpoint), ffn_ratio=1.5)
    model = PopengineLM(str(checkpoint), device="cpu")
    with pytest.raises(InputError, match="'num_beams' is not implemented"):
        model.generate_batch([[1, 2]], {"num_beams": 4})
    with pytest.raises(InputError, match="leaves no room"):
        model.generate_batch([[1, 2]], {"max_gen_toks": 400})
