"""docs/minimal_pop.py, both papers in one file, gives the engine's tokens, and stays one short file."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import REPOSITORY, complete_checkpoint
from transformers import LlamaForCausalLM

import popengine
from popengine.engine.engine import Engine
from weights.checkpoint import open_checkpoint

SCRIPT = REPOSITORY / "docs" / "minimal_pop.py"
PROMPT, NEW = "The tide table says when the water is high.", 48
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FOLDERS: dict[str, dict[str, Any]] = {
    "grouped_query": {"num_attention_heads": 8, "hidden_size": 64},
    "tied_with_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3_rope_and_wide_heads": {"rope_parameters": LLAMA_3_ROPE, "head_dim": 20},
}


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_pop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_pop"] = module         # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = complete_checkpoint(tmp_path_factory.mktemp(request.param), **FOLDERS[request.param])
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            parameter.mul_(1 if "norm" in name else 2)      # else some of these models repeat a few tokens
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return popengine.load(folder, dtype="float32", weights="plain", device="cpu")


def tokens_of(engine: Engine, ratio: float, skip: int, count: int = NEW) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the new ones, with the settings of the papers."""
    settings = popengine.PruningSettings.paper(
        prune_ratio=ratio, candidate_width=0.1, prefill_skip=f"{skip}/{len(engine.model.model.layers)}"
    )
    (made,) = engine.generate(PROMPT, raw=True, max_new_tokens=count, pruning=settings, ignore_eos=True)
    return made.prompt_token_ids, made.token_ids


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4])
def test_it_gives_the_tokens_of_the_engine(
    minimal: ModuleType, folder: Path, engine: Engine, ratio: float, skip: int
) -> None:
    prompt, tokens = tokens_of(engine, ratio, skip)
    config, weights = minimal.load(folder)
    assert minimal.generate(minimal.Llama(config, weights, ratio, 0.1), prompt, NEW, skip) == tokens
    assert len(set(tokens)) > 20
    # No choice is left to rounding.
    exact = minimal.Llama(*minimal.load(folder, torch.float64), ratio, 0.1)
    assert minimal.generate(exact, prompt, NEW, skip) == tokens


def test_every_ratio_and_every_skip_gives_other_tokens(engine: Engine) -> None:
    """So none of them can be ignored by the file and the test still pass."""
    answers = [tuple(tokens_of(engine, ratio, skip)[1]) for ratio in (0.0, 0.2, 0.4) for skip in (0, 2)]
    assert len(set(answers)) == 6


def test_a_prompt_of_one_token_skips_nothing(minimal: ModuleType, folder: Path) -> None:
    config, weights = minimal.load(folder)
    model = minimal.Llama(config, weights, 0.4, 0.1)
    assert minimal.generate(model, [7], 12, 0) == minimal.generate(model, [7], 12, 2)


def test_it_gives_the_tokens_of_the_engine_on_the_default_checkpoint(
    minimal: ModuleType, default_checkpoint_path: Path
) -> None:
    # The engine is gone when the other model comes: 1 GB.
    engine = popengine.load(default_checkpoint_path, dtype="float32", weights="plain", device="cpu")
    prompt, tokens = tokens_of(engine, 0.2, skip=7, count=12)
    del engine
    with open_checkpoint(default_checkpoint_path) as checkpoint:
        config = minimal.read_config(checkpoint.config)
        weights = {name: checkpoint.read(name).float() for name in checkpoint.entries}
    assert minimal.generate(minimal.Llama(config, weights, 0.2, 0.1), prompt, 12, 7) == tokens


def test_its_command_prints_the_text(checkpoint: Path) -> None:
    flags = ["--prompt", PROMPT, "--ratio", "0.4", "--skip", "2", "-n", "12"]
    command = [sys.executable, "-I", SCRIPT, checkpoint, *flags]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    engine = popengine.load(checkpoint, dtype="float32", device="cpu")
    wanted = engine.tokenizer.decode(tokens_of(engine, 0.4, 2)[1][:12])
    assert (found.returncode, found.stderr, found.stdout) == (0, "", wanted + "\n")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--ratio", "0.9"], "the ratio must be at least 0 and below"), (["--skip", "3"], "a skip below 3"),
    (["-n", "0"], "-n of 1 or more"), ([], "tokenizer.json"),
])
def test_what_cannot_be_is_one_clear_line(
    minimal: ModuleType, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str,
) -> None:
    folder = checkpoint if arguments else tmp_path
    monkeypatch.setattr(sys, "argv", ["minimal_pop.py", str(folder), "--prompt", PROMPT, *arguments])
    with pytest.raises(SystemExit) as end:
        minimal.main()
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def names_in_the_file() -> set[str]:
    """Functions, classes and Class.method."""
    found: set[str] = set()
    for node in ast.parse(SCRIPT.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def sections_of_the_page() -> dict[str, str]:
    """The sections of docs/how_it_works.md by their titles."""
    text = (REPOSITORY / "docs" / "how_it_works.md").read_text("utf-8")
    return {section.partition("\n")[0]: section for section in text.split("\n## ")[1:]}


def equations() -> list[list[str]]:
    """Rows of the page's table: where in the papers, formula, lines, code of the first of them, function."""
    table = sections_of_the_page()["From equation to line"].splitlines()
    return [row.split("|")[1:-1] for row in table if row.startswith("|") and "`" in row]


def extent(name: str) -> range:
    """Lines of a function or of Class.method."""
    body: list[ast.stmt] = ast.parse(SCRIPT.read_text("utf-8")).body
    for part in name.split("."):
        (node,) = (one for one in body if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == part)
        body = node.body
    assert node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


@pytest.mark.parametrize("row", equations(), ids=lambda row: row[2].strip())
def test_the_lines_that_the_page_names_begin_with_its_code(row: list[str]) -> None:
    _, _, lines, code, function = (cell.strip().strip("`") for cell in row)
    first, _, last = lines.partition("-")
    named = range(int(first), int(last or first) + 1)
    assert set(named) <= set(extent(function))
    text = SCRIPT.read_text("utf-8").splitlines()
    assert code in text[named[0] - 1]


def test_the_page_that_walks_through_it_names_what_is_there() -> None:
    sections, rows, names = sections_of_the_page(), equations(), names_in_the_file()
    assert len(rows) > 5 and {name for *_, place in rows for name in re.findall("`(.+?)`", place)} <= names
    assert {"POP, Table 8", "POP, Eq. 1-3", "Prefill-Only, Eq. 14, 15"} <= {where.strip() for where, *_ in rows}
    for title in [*(one for one in sections if one.startswith(("POP", "Prefill-Only"))), "Both together"]:
        assert names & set(re.findall("`([A-Za-z_.]+)`", sections[title])), f"{title} names no function of the file"


def test_it_is_one_short_file_that_needs_three_packages() -> None:
    text = SCRIPT.read_text("utf-8")
    assert len(text.splitlines()) <= 300
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module).partition(".")[0])
    assert modules - sys.stdlib_module_names == {"torch", "safetensors", "tokenizers"}
