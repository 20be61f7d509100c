"""Who may import whom: packages, the levels inside popengine, no circles, and nothing hidden inside functions.

Read from the source, so that an import that is seldom run counts like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import REPOSITORY

PACKAGES = ("weights", "models", "popengine")
# Where each part stands; nobody imports what stands higher. The package itself only names what its users may import.
LEVELS = [
    "weights", "models", "text, images and studies", "engine", "popengine", "evaluation", "benchmark and page",
    "commands",
]
FOLDERS = {
    "text": "text, images and studies", "images": "text, images and studies", "studies": "text, images and studies",
    "engine": "engine", "evaluation": "evaluation", "benchmark": "benchmark and page", "page": "benchmark and page",
    "dialogue": "commands",                 # it takes Ctrl-C and the words of errors from popengine/command_line
}
ISOLATED_SCRIPTS = ("popengine.text.sandbox.child", "popengine.evaluation.code_sandbox")


@dataclass(frozen=True)
class Import:
    """What a file imports.

    function   the outermost one around it; None at the top of the file
    by_call    import_module("..."): for what may be missing
    """

    target: str
    function: str | None
    by_call: bool


def modules_below(root: Path) -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: Collection[str]) -> Iterator[Import]:
    """Everything a file imports; what it takes from a package is the module of that name, if there is one."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def walk(node: ast.AST, function: str | None) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = function or getattr(node, "name", "lambda")
        targets: set[str] = set()
        if isinstance(node, ast.Import):
            targets = {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = {full if (full := f"{base}.{one.name}") in modules else base for one in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            targets = {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        for target in sorted(targets):
            yield Import(target, function, isinstance(node, ast.Call))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), None)


def is_command(name: str, path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_the_top = name.count(".") == 1 and name.startswith("popengine.") and path.name != "__init__.py"
    return at_the_top and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def level_of(name: str, path: Path) -> int:
    package, *rest = name.split(".")
    if package != "popengine":
        return LEVELS.index(package)
    if not rest or rest[0] in FOLDERS:
        return LEVELS.index(FOLDERS[rest[0]] if rest else "popengine")
    return LEVELS.index("commands")


def problems(root: Path) -> list[str]:
    """What is wrong with the imports of the packages below `root`, one line each."""
    modules = modules_below(root)
    levels = {name: level_of(name, path) for name, path in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    found = []
    for name, path in modules.items():
        may_hide = {"run"} if is_command(name, path) else set()
        for one in imports_of(name, path, modules):
            if one.function and not one.by_call and one.function not in may_hide and name not in ISOLATED_SCRIPTS:
                found.append(f"{name} imports {one.target} inside {one.function}")
            if one.target not in modules:
                continue
            if levels[one.target] > levels[name]:
                found.append(f"{name} is below {one.target} and imports it")
            graph[name].add(one.target)
    return found + [f"a circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle, from its first name, through every file that is part of one."""
    found, told = [], set()
    for start in sorted(graph):
        if start in told:
            continue
        came_from: dict[str, str] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop(0)
            for target in sorted(graph[name]):
                if target not in came_from:
                    came_from[target] = name
                    waiting.append(target)
        if start in came_from:
            circle = [start]
            while (before := came_from[circle[-1]]) != start:
                circle.append(before)
            circle = [start, *reversed(circle[1:]), start]
            told.update(circle)
            found.append(circle)
    return found


def test_nobody_imports_upwards_in_circles_or_inside_functions() -> None:
    modules = modules_below(REPOSITORY)
    assert {name.split(".")[0] for name in modules} == set(PACKAGES) and len(modules) > 50
    # That the rules below are about something: these stand where they are said to stand.
    for name, level in {"popengine.generate": "commands", "popengine.harness": "commands", "models.llama": "models",
                        "popengine.command_line.flags": "commands",
                        "popengine.engine.run": "engine", "popengine.evaluation.scoring": "evaluation",
                        "popengine.text.chat": "text, images and studies"}.items():
        assert LEVELS[level_of(name, modules[name])] == level
    assert problems(REPOSITORY) == []


MADE_UP = {
    "weights/__init__.py": "",
    "weights/load.py": "import os\nfrom models import layers\n",                            # upwards
    "models/__init__.py": "",
    "models/layers.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models.llama import Llama\n",
    "models/llama.py": "import models.layers\n",                                            # a circle, by way of types
    "popengine/__init__.py": "if TYPE_CHECKING:\n    from popengine.engine.engine import Engine\n",
    "popengine/engine/__init__.py": "",
    "popengine/engine/run.py": "if TYPE_CHECKING:\n    from popengine.engine.engine import Engine\n",
    "popengine/engine/engine.py": "from popengine.engine.run import Run\n\ndef load():\n    import torch\n",    # hidden
    "popengine/text/__init__.py": "",
    "popengine/text/chat.py": "from ..evaluation import scoring\n",                         # upwards, relative
    "popengine/text/sandbox/__init__.py": "",
    "popengine/text/sandbox/child.py": "def render():\n    import jinja2\n",                 # may
    "popengine/evaluation/__init__.py": "",
    "popengine/evaluation/scoring.py": "from popengine import score, __version__\n",         # upwards, to a command
    "popengine/evaluation/plots.py": "import importlib\ndef draw():\n    importlib.import_module('popengine.score')\n",
    "popengine/score.py": "def main():\n    import json\n\ndef run():\n    from popengine.evaluation import scoring\n",
}


def test_made_up_files_that_break_the_rules_are_caught(tmp_path: Path) -> None:
    for name, text in MADE_UP.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(problems(tmp_path)) == [
        "a circle: models.layers -> models.llama -> models.layers",
        "a circle: popengine.engine.engine -> popengine.engine.run -> popengine.engine.engine",
        "a circle: popengine.evaluation.scoring -> popengine.score -> popengine.evaluation.scoring",
        "popengine.engine.engine imports torch inside load",
        "popengine.evaluation.plots is below popengine.score and imports it",
        "popengine.evaluation.scoring is below popengine.score and imports it",
        "popengine.score imports json inside main",
        "popengine.text.chat is below popengine.evaluation.scoring and imports it",
        "weights.load is below models.layers and imports it",
    ]


def test_no_test_imports_another() -> None:
    tests = REPOSITORY / "tests"
    names = {path.stem for path in tests.rglob("test_*.py")}
    assert len(names) > 30
    for path in tests.rglob("*.py"):
        for one in imports_of(path.stem, path, names):
            assert not names & set(one.target.split(".")), f"{path.name} imports {one.target}"


def without_torch(code: str) -> str:
    code += "\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_popengine_takes_no_torch() -> None:
    without_torch("import sys, popengine\npopengine.PruningSettings(prune_ratio=0.4)\nassert 'load' in dir(popengine)")


# The harness has no flags of its own: its command line is lm_eval's.
WITH_FLAGS = [
    name for name, path in modules_below(REPOSITORY).items() if is_command(name, path) and name != "popengine.harness"
]


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_help_of_a_command_takes_no_torch(name: str) -> None:
    said = without_torch(
        "import runpy, sys\nsys.argv = ['command', '--help']\n"
        f"try:\n    runpy.run_module({name!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "else:\n    raise AssertionError('it went on')\n"
    )
    assert "usage: " in said and "--ckpt" in said


def test_there_are_commands_to_look_at() -> None:
    assert {"popengine.generate", "popengine.score", "popengine.compare", "popengine.bench"} <= set(WITH_FLAGS)
