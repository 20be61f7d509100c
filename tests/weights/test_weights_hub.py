"""Hub ids, against a Hub-like server on the loopback interface. The client reads its settings when it is imported, so
that each download runs in a process of its own."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from builders import CHAT_TEMPLATE, REPOSITORY, complete_checkpoint
from loopback_hub import LoopbackHub
from safetensors.torch import save

from popengine.engine.loading import open_text_side
from weights import files
from weights.checkpoint import open_checkpoint
from weights.hub import is_hub_id

WEIGHTS = save({"model.norm.weight": torch.arange(6_000_000, dtype=torch.float32)})

DOWNLOAD = """
import sys
from weights.errors import InputError
from weights.hub import download
try:
    print(download(sys.argv[1]))
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    files = {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"never fetched",
        "consolidated.safetensors": b"never fetched",
        "onnx/model.safetensors": b"never fetched",
        "README.md": b"never fetched",
    }
    server = LoopbackHub({"someone/model": files}, private={"someone/private"}, gated={"someone/gated"})
    yield server
    server.close()


def settings(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | more


def download(repository: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DOWNLOAD, repository]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_only_needed_files_are_fetched_and_the_cache_serves_without_network(hub: LoopbackHub, tmp_path: Path) -> None:
    first = download("someone/model", settings(hub.url, tmp_path))
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.strip())
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert "%" not in first.stderr  # a progress bar is for terminals

    asked = len(hub.requests)
    offline = download("someone/model", settings(hub.url, tmp_path, HF_HUB_OFFLINE="1"))
    assert offline.stdout == first.stdout, offline.stderr
    assert len(hub.requests) == asked

    hub.close()
    unreachable = download("someone/model", settings(hub.url, tmp_path))
    assert unreachable.stdout == first.stdout, unreachable.stderr


def test_a_hub_id_reads_as_the_folder_of_the_same_files_does(hub: LoopbackHub, tmp_path: Path) -> None:
    """The template of a processor, and tokens that only added_tokens.json has."""
    folder = complete_checkpoint(tmp_path / "folder")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 261}))
    hub.files["someone/model"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    fetched = download("someone/model", settings(hub.url, tmp_path / "home"))
    sides = []
    for place in (folder, Path(fetched.stdout.strip())):
        with open_checkpoint(place) as checkpoint:
            tokenizer, template = open_text_side(checkpoint)
            sides.append((template, tokenizer.token_id("<extra>"), checkpoint.generation_config))
    assert sides[0] == sides[1] and sides[0][:2] == (CHAT_TEMPLATE, 261)


def test_every_file_that_is_read_is_in_the_list_that_is_fetched() -> None:
    """Names of files in the source of what opens checkpoints, and constants of the list that nobody uses."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for folder in ("weights", "models", "popengine/text", "popengine/images/"):
        for path in (REPOSITORY / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    if re.fullmatch(r"[\w*-]+\.(json|jinja|model|txt|safetensors)", node.value):
                        names[node.value] = path.name
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "files":
                    used.add(node.attr)
    unknown = {name for name in names if not any(fnmatch(name, known) for known in files.READ)}
    assert unknown == set(files.OTHER_TOKENIZERS)
    assert {name for name in vars(files) if name.isupper()} == used


def test_missing_private_and_gated_repositories_are_one_line_each(hub: LoopbackHub, tmp_path: Path) -> None:
    environment = settings(hub.url, tmp_path)
    missing = last_line(download("someone/missing", environment))
    assert "'someone/missing': no such path, and the Hub has no repository of that name" in missing
    private = last_line(download("someone/private", environment))
    assert "if it is private, log in" in private
    gated = last_line(download("someone/gated", environment))
    assert "gated: ask for access" in gated
    refused = last_line(download("someone/model", environment | {"HF_TOKEN": "wrong"}))
    assert "refuses access" in refused and "HF_TOKEN" in refused


def test_no_network_and_offline_mode_are_one_line_each(tmp_path: Path) -> None:
    unreachable = last_line(download("someone/model", settings("http://127.0.0.1:9", tmp_path)))
    assert "no such path, and the Hub cannot be asked" in unreachable
    offline = last_line(download("someone/model", settings("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")))
    assert "not in the cache, and HF_HUB_OFFLINE forbids" in offline


def test_an_interrupted_download_is_finished_by_the_next_run(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.stall_after = 15_000_000  # the client writes 10 MB at a time
    environment = settings(hub.url, tmp_path)
    command = [sys.executable, "-c", DOWNLOAD, "someone/model"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    incomplete: list[Path] = []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(path.stat().st_size for path in incomplete):
        time.sleep(0.05)
        incomplete = list(tmp_path.rglob("*.incomplete"))
    process.send_signal(signal.SIGKILL)
    process.wait()

    offline = last_line(download("someone/model", environment | {"HF_HUB_OFFLINE": "1"}))
    assert "HF_HUB_OFFLINE forbids" in offline  # what is half there is not taken for the whole

    hub.stall_after = None
    second = download("someone/model", environment)
    assert second.returncode == 0, second.stderr
    assert (Path(second.stdout.strip()) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("text", ["org/name", "gpt2", "Org-1/name.v2_x"])
def test_hub_ids_are_recognised(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["", "a/b/c", "/tmp/x", "./x", "../x", "model.gguf", "a b/c", "org/", "org/x.gguf"])
def test_paths_are_not_taken_for_hub_ids(text: str) -> None:
    assert not is_hub_id(text)
