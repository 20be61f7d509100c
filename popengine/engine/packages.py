"""Packages of compiled decode steps in the user's cache (models/packages.py makes them).

A package is native code. It is loaded only from the user's own cache: a folder and a file of this user that no one
else may write, and whose content has the digest in the file's name. A checkpoint's folder is never searched.
"""

import contextlib
import inspect
import os
import sys
import tempfile
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.compiled import CompiledDecode, compiler_problem
from models.flat_functions import Function, NotPackable
from models.llama import LlamaForCausalLM
from models.matrices.plain import Matrix
from models.packages import Loader, PackagedDecode, head_function
from models.state import DecodeState
from popengine.engine.choices import Choices, lay_out, set_streams
from popengine.engine.machine import digest, machine, not_trusted
from popengine.studies.rules import StudyRule
from weights.errors import InputError, one_line
from weights.output_file import write_output
from weights.user_folders import cache_folder

# A change here leaves older packages unused.
FORMAT = "popengine package 1"
# Days without use after which a package is deleted: another version of the engine or of PyTorch cannot use it.
UNUSED_DAYS = 60


class Packages:
    """The packages of this machine, one file per function, named by its key and the digest of the file.

    folder  where they are kept; may not exist
    said    lines that were printed, each once
    """

    def __init__(self) -> None:
        self.folder = cache_folder("packages")
        self.said: set[str] = set()

    def key(self, function: Function) -> str:
        """Return the key of a function's package: a digest of everything that shapes its code."""
        return digest("\n".join([FORMAT, *machine(), source_digest(), function.description]).encode())

    def files(self, function: Function) -> list[Path]:
        """Return the files under the function's key: one, or none."""
        if not self.folder.is_dir():
            return []
        with contextlib.suppress(OSError):
            return sorted(self.folder.glob(f"{self.key(function)}.*.pt2"))
        return []

    def load(self, function: Function) -> Loader | None:
        """Load a function's package, if there is one. One that may not be used is refused with a line on stderr."""
        for path in self.files(function):
            if problem := not_trusted(self.folder) or not_trusted(path):
                self.refuse(problem)
                continue
            try:
                if path.name.split(".")[1] != digest(path.read_bytes()):
                    self.refuse(f"{path} is damaged")
                    continue
                loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
            except (OSError, RuntimeError) as error:
                self.refuse(f"{path} cannot be loaded: {error}")
                continue
            if loader.get_metadata().get("popengine") == self.key(function):
                with contextlib.suppress(OSError):
                    os.utime(path)
                made: Loader = loader
                return made
            self.refuse(f"{path} is the package of something else")
        return None

    def make(self, function: Function) -> None:
        """Compile the package of a function and keep it. Raises InputError, OSError or what the compiler raises."""
        key = self.key(function)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := not_trusted(self.folder):
            raise InputError(problem)
        with tempfile.TemporaryDirectory(dir=self.folder) as unfinished:
            path = Path(unfinished) / "package.pt2"
            function.package(path, {"popengine": key})
            content = path.read_bytes()
        for old in self.files(function):
            old.unlink()
        kept = self.folder / f"{key}.{digest(content)}.pt2"
        write_output(kept, content)
        kept.chmod(0o600)
        self.delete_unused()

    def delete_unused(self) -> None:
        """Delete packages that were neither made nor loaded for UNUSED_DAYS."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for path in self.folder.glob("*.pt2"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < oldest:
                    path.unlink()

    def refuse(self, problem: str) -> None:
        """Say in one line why steps run eagerly although there are packages."""
        self.say(f"warning: steps run eagerly, not from packages: {problem}")

    def say(self, line: str) -> None:
        """Print a line on stderr, once."""
        if line not in self.said:
            self.said.add(line)
            print(one_line(line, 400), file=sys.stderr)


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return a digest of the Python files of which steps are made."""
    of_each = (LlamaForCausalLM, StudyRule, InputError)         # the folders models, popengine/studies and weights
    folders = [Path(inspect.getfile(one)).resolve().parent for one in of_each]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return digest(b"".join(path.read_bytes() for path in files))


class CachedSteps:
    """Decode steps of an engine: from packages where there are some, made if that was asked for.

    Where no package can be made, steps are compiled by torch.compile; if that fails, they run eagerly.
    """

    def __init__(self, model: LlamaForCausalLM, makes: bool) -> None:
        """makes: make missing packages. Raises InputError if the user has no folder for them"""
        self.model, self.makes, self.packages = model, makes, Packages()
        self.packaged = PackagedDecode(model, self.packages)
        self.by_compiler: CompiledDecode | None = None

    @torch.inference_mode()
    def of_model(self) -> bool:
        """Return True if there is a package of this model's output projection for one sequence, as it is stored now."""
        x = self.model.embed(torch.zeros(1, 1, dtype=torch.int64))
        try:
            return bool(self.packages.files(head_function(self.model, x, self.model.lm_head)))
        except NotPackable:
            return False

    def missing(self, state: DecodeState) -> list[Function]:
        """Return the functions of a state's steps without a usable package. Raises NotPackable if none can be made."""
        return self.packaged.missing(state)

    def knows(self, state: DecodeState) -> bool:
        """Return True if nothing will be compiled for this state."""
        if self.by_compiler is not None:
            return self.by_compiler.knows(state)
        try:
            return not (self.makes and self.missing(state))
        except NotPackable:
            return False

    def prepare(self, state: DecodeState) -> float:
        """Load the packages of a state's steps, or make them if that was asked for. Returns the seconds of making."""
        if (self.by_compiler is None and self.packaged.prepare(state)) or not self.makes:
            return 0.0
        began = time.perf_counter()
        if self.by_compiler is None and self.made(state):
            self.packaged.prepare(state)
        if self.by_compiler is not None:
            self.by_compiler.prepare(state)
        return time.perf_counter() - began

    def made(self, state: DecodeState) -> bool:
        """Make the packages of a state's steps, with a line on stderr. If that fails, torch.compile takes over."""
        began = time.perf_counter()
        try:
            count = self.make(state)
        except InputError as error:
            self.packages.say(f"warning: {error}; torch.compile takes over")
            if problem := compiler_problem(self.model.device):
                self.packages.say(f"warning: torch.compile does not work here, so steps run eagerly: {problem}")
                self.makes = False
            else:
                self.by_compiler = CompiledDecode(self.model)
            return False
        seconds = time.perf_counter() - began
        self.packages.say(f"made {count} packages of compiled steps in {seconds:.0f} s, kept in {self.packages.folder}")
        return True

    @torch.inference_mode()
    def make(self, state: DecodeState) -> int:
        """Make the missing packages of a state's steps, and return their number. Raises InputError if that fails."""
        try:
            missing = self.missing(state)
            for function in missing:
                self.packages.make(function)
        except Exception as error:      # a compiler may raise anything
            reason = one_line(str(error) or type(error).__name__, 200)
            raise InputError(f"packages of these steps cannot be made ({reason})") from None
        return len(missing)

    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Compute the model's `decode`. tokens int64 [B] -> logits [B, V]"""
        return (self.by_compiler or self.packaged).decode(tokens, state)

    def dense_step(self, tokens: Tensor, state: DecodeState, partitions: bool) -> Tensor:
        """Compute the model's `dense_step`."""
        return (self.by_compiler or self.packaged).dense_step(tokens, state, partitions)

    def kind(self, state: DecodeState) -> str:
        """Return how the steps of this state run: "package", "compiled" or "eager"."""
        if self.by_compiler is not None:
            return self.by_compiler.kind(state)
        return "package" if self.packaged.runs(state) else "eager"

    def trusting_guards(self) -> AbstractContextManager[object]:
        """Return the context manager for steps (see CompiledDecode)."""
        return nullcontext() if self.by_compiler is None else self.by_compiler.trusting_guards()

    def made_eager(self, state: DecodeState) -> bool:
        """Store plain weights as eager steps read them, if there are any and this state has no packages.

        Returns True if that was done: the state must be made anew, and no package fits any more.
        """
        plain = any(type(one) is Matrix for one in self.model.modules()) and self.model.dtype != torch.float16
        if not plain or self.makes or self.packaged.prepare(state):
            return False
        lay_out(self.model, Choices())
        return True


def compiled_steps(model: LlamaForCausalLM, asked: bool | None) -> CachedSteps | CompiledDecode | None:
    """Return the compiled steps of a model, or None for eager ones.

    asked  True: compile them; a warning says if nothing can. False: eager steps. None: compiled if there are packages
    """
    if asked is False:
        return None
    if asked and not model.can_compile:
        raise InputError("compiled steps are not implemented for mixtures of experts; their steps run eagerly")
    cached = None
    if model.can_compile and model.device.type == "cpu":
        set_streams(model, Choices(), measures=bool(asked))
    if model.can_compile and model.device.type == "cpu" and model.config.ranks.count == 1:
        with contextlib.suppress(InputError):           # no folder of the user
            cached = CachedSteps(model, bool(asked))
    if cached is not None and cached.of_model():
        return cached
    if not asked:
        return None
    if problem := compiler_problem(model.device):
        warnings.warn(f"torch.compile does not work here, so steps run eagerly: {problem}", stacklevel=3)
        return None
    return cached or CompiledDecode(model)
