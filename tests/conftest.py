"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from popengine.errors import InputError
from weights.default_checkpoint import default_checkpoint


@pytest.fixture(scope="session")
def default_checkpoint_path() -> Path:
    """The checkpoint that `make checkpoint` fetched; without one the tests that need it cannot run, and fail."""
    try:
        return default_checkpoint()
    except InputError as error:
        pytest.fail(str(error))
