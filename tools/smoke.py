"""Smoke test for other versions of Python: import every module, and run generate and score on the shipped checkpoints.

    python tools/smoke.py [PYTHON ...]

Each PYTHON is an interpreter; without one it is the interpreter that runs this file. An interpreter without torch only
compiles the sources. The exit status is 1 if one of them fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("weights", "models", "popengine")
# Modules that need a package of an extra of pyproject.toml, and that package.
NEED_EXTRAS = {"popengine.harness": "lm_eval", "popengine.evaluation.harness_model": "lm_eval"}

VERSIONS = """
import importlib.util, platform
found = "no torch"
if importlib.util.find_spec("torch"):
    import torch
    found = f"torch {torch.__version__}"
print(platform.python_version(), "|", found)
"""
COMPILE = """
import sys
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        compile(file.read(), path, "exec")
"""
IMPORT = """
import importlib, importlib.util, json, sys
names, needed = json.loads(sys.argv[1])
for name in names:
    if name not in needed or importlib.util.find_spec(needed[name]):
        importlib.import_module(name)
"""


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def modules() -> list[str]:
    """Names of all modules but the child process's, which runs alone and reads requests as soon as it starts."""
    parts = [path.relative_to(REPOSITORY).with_suffix("").parts for path in sources()]
    names = [".".join(one).removesuffix(".__init__") for one in parts]
    return [name for name in names if name not in ("popengine.__main__", "popengine.text.sandbox.child")]


def run(python: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [python, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:60].strip()!r} failed:\n{done.stderr.strip()}")
    return done.stdout


def smoke(python: str) -> str:
    """What was run, in a few words. RuntimeError where something fails."""
    about = run(python, "-c", VERSIONS).strip()
    if about.endswith("no torch"):
        run(python, "-c", COMPILE, *map(str, sources()))
        return f"{about}: {len(sources())} sources compile"
    run(python, "-c", IMPORT, json.dumps([modules(), NEED_EXTRAS]))
    for name, more in [("mixtral-tiny", []), ("llava-tiny", ["--image", "weights/llava-tiny/example.png"])]:
        flags = ["--ckpt", f"weights/{name}", "--prompt", "tally cabba?", "-n", "8", "--ignore-eos", "--json", *more]
        made = json.loads(run(python, "-m", "popengine.generate", "--prune-ratio", "0.4", *flags))
        if len(made["token_ids"]) != 8:
            raise RuntimeError(f"{name} gave {made['token_ids']}, not 8 tokens")
    flags = ["--text", "README.md", "--windows", "2", "--prompt-tokens", "32", "--score-tokens", "32", "--json"]
    scored = json.loads(run(python, "-m", "popengine.score", "--ckpt", "weights/mixtral-tiny", *flags))
    if not scored["perplexity"] > 1:
        raise RuntimeError(f"score gave a perplexity of {scored['perplexity']}")
    return f"{about}: {len(modules())} modules imported; generate (mixtral-tiny, llava-tiny) and score run"


def main() -> int:
    failed = 0
    for python in sys.argv[1:] or [sys.executable]:
        try:
            print(smoke(python), flush=True)
        except (OSError, RuntimeError) as error:
            print(f"{python}: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
