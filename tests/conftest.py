"""Fixtures that several test files share."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.matrices import packed
from popengine.studies import rules
from weights.default_checkpoint import DEFAULT_DIRECTORY, found_in


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept in the user's cache from run to run must neither help a test nor be left there by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module", autouse=True)
def memory_given_back() -> Iterator[None]:
    """Models and compiled steps of one file are gone when the next one runs, and their pages are the system's again."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim"):      # musl has none
        ctypes.CDLL(None).malloc_trim(0)


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
def default_model_of_transformers(default_checkpoint_path: Path) -> Any:
    from builders import default_of_transformers

    return default_of_transformers(default_checkpoint_path)


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
