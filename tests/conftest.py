"""Fixtures that several test files share."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_sandboxes import start_forked

from models import compiled
from models.matrices import packed
from popengine.engine import choices, packages
from popengine.studies import rules
from popengine.text.sandbox.process import Sandbox
from weights.default_checkpoint import DEFAULT_DIRECTORY, found_in
from weights.errors import InputError
from weights.memory import give_back

START = Sandbox.start


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept in the user's cache from run to run must neither help a test nor be left there by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_packages() -> Iterator[None]:
    """Steps are compiled by torch.compile and products are the defaults, as for a user without a folder of caches:
    test_packages.py and test_choices.py have some."""

    def nowhere(name: str) -> Path:
        raise InputError("there is no folder")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "cache_folder", nowhere)
        patch.setattr(choices, "cache_folder", nowhere)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_sandboxes() -> Iterator[None]:
    """The process of a tokenizer is forked, which takes a fiftieth of the time that starting it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sandbox, "start", start_forked)
        yield


@pytest.fixture(scope="module")
def started_sandboxes(forked_sandboxes: None) -> Iterator[None]:
    """The process of a tokenizer is started as for a user: for the tests of that process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sandbox, "start", START)
        yield


# First the files that load the default checkpoint, before others have left modules and holes in their worker's memory.
# Then those that take longest, the longest first: workers that begin with these end at about the same time.
LARGEST = (
    "test_smollm2", "test_compile", "test_smollm2_evidence", "test_minimal_pop", "test_packed", "test_score_command",
    "test_conversation", "test_mixtral",
)
LONGEST = (
    *LARGEST, "test_packages", "test_hostile_files", "test_ranks_together", "test_wheel", "test_neighbours",
    "test_gpu_check", "test_explain", "test_repeated_requests", "test_cuda_without_a_card", "test_input_sparsity",
    "test_ranks", "test_tasks", "test_isolated", "test_generate_command", "test_weights_gguf", "test_chat_command",
    "test_vision", "test_output", "test_tokenizer", "test_compare_command", "test_fewer_experts", "test_left_out",
    "test_matrix", "test_kinds", "test_qwen_vl", "test_gemma", "test_harness", "test_qwen_engine", "test_examples",
    "test_chat", "test_prefill_only", "test_rules", "test_engine", "test_gemma_engine", "test_visual_tokens",
    "test_bench",
)
# A file to which every file of tests adds a line: the peak of its worker's memory in MB while it ran.
PEAKS = os.environ.get("POPENGINE_TEST_PEAKS")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Objects that imports have made stay to the end: half a million that no collection of garbage need look at."""
    gc.collect()
    gc.freeze()


# Of each process that ran tests, a worker of pytest-xdist or the only one: the peak of its memory in bytes.
PEAK_OF = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PEAK_OF] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands its peak to the process that reports."""
    config = session.config
    if find_spec("resource") is None or config.getoption("numprocesses", None):      # not on Windows
        return
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    config.stash[PEAK_OF]["this process"] = peak
    if hasattr(config, "workeroutput"):
        config.workeroutput["peak"] = peak


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if peak := getattr(node, "workeroutput", {}).get("peak"):          # a worker that crashed has none
        node.config.stash[PEAK_OF][f"worker {node.gateway.id}"] = peak


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, peak in sorted(config.stash[PEAK_OF].items()):
        terminalreporter.write_line(f"peak memory of {name}: {peak / 1e9:.2f} GB")


@pytest.fixture(scope="module", autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models and compiled steps of one file are gone when the next one runs, and their pages are the system's again."""
    if PEAKS:
        Path("/proc/self/clear_refs").write_text("5")           # the peak is measured anew
    yield
    if PEAKS:
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        with open(PEAKS, "a", encoding="utf-8") as file:
            file.write(f"{int(peak) // 1000} {request.path.name}\n")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    give_back()


@pytest.fixture(scope="session")
def default_checkpoint_path() -> Path:
    """The checkpoint that `make checkpoint` fetched; without one the tests that need it cannot run, and fail."""
    return found_in(DEFAULT_DIRECTORY) or pytest.fail("the default checkpoint is not there: run `make checkpoint`")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint that the commands can run. Shared: a test that changes one makes one of its own."""
    from builders import complete_checkpoint  # takes seconds, which tests of files alone need not wait

    return complete_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that commands can score."""
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text(" ".join(str(number * number) for number in range(300)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def default_gguf(default_checkpoint_path: Path) -> Path:
    if default_checkpoint_path.suffix != ".gguf":
        pytest.skip("the default checkpoint came from the Hub, not as .gguf")
    return default_checkpoint_path


@pytest.fixture
def exact_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision two paths round scores differently, and choose differently where two are all but equal."""
    for module in (rules, packed):
        monkeypatch.setattr(module, "DRAFT_DTYPE", torch.float32)


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer in each call of compiled code: compiling takes a third where calls of several are not tested."""
    monkeypatch.setattr(compiled, "MOST_LAYERS_PER_CALL", 1)
