"""The wheel, built from this tree and installed where other projects have packages named `models` and `weights`."""

import json
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


def run(*command: Any, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
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


@pytest.mark.parametrize("command", [["popengine", "generate"], ["python", "-m", "popengine.generate"]], ids=str)
def test_it_runs_where_others_have_packages_of_these_names(
    installed: Path, tmp_path: Path, command: list[str]
) -> None:
    for name in ("models", "weights"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported the wrong package')\n")
    words = ("--ckpt", "mixtral-tiny", "--prompt", "tally cabbacdafe?", "-n", "3", "--prune-ratio", "0", "--json")
    assert json.loads(run(installed / command[0], *command[1:], *words, cwd=tmp_path))["token_ids"]


def test_the_packages_of_others_are_left_alone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import popengine, sys\n"
        "engine = popengine.load('weights/mixtral-tiny')\n"
        "assert isinstance(popengine.PruningSettings(), popengine.PruningSettings)\n"
        "assert not {'models', 'weights'} & sys.modules.keys()\n"
        "import models, weights\n"
        "assert models.THEIRS and weights.THEIRS\n"
    )
    run(installed / "python", "-c", code, cwd=tmp_path)
