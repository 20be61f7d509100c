"""Fixtures that several test files share."""

from pathlib import Path
from typing import Any

import pytest
import torch

from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError


@pytest.fixture(scope="session")
def default_checkpoint_path() -> Path:
    """The checkpoint that `make checkpoint` fetched; without one the tests that need it cannot run, and fail."""
    try:
        return default_checkpoint()
    except InputError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def default_model_of_transformers(default_checkpoint_path: Path) -> Any:
    """The default checkpoint as transformers loads it, in float32 and eval mode; it takes a while to read a .gguf."""
    transformers = pytest.importorskip("transformers")
    path = default_checkpoint_path
    if path.suffix == ".gguf":
        where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    else:
        where = {"pretrained_model_name_or_path": path}
    return transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
