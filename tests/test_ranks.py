"""Ranks: processes that torchrun starts compute what one process does with as many groups, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import REPOSITORY, complete_checkpoint
from rank_cases import CASES, compute

from models.ranks import Ranks
from popengine.shares import narrowed
from weights.errors import InputError
from weights.groups import group

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases everywhere, and sides that two ranks share in whole groups of four bits."""
    return complete_checkpoint(
        tmp_path_factory.mktemp("ranks"), hidden_size=128, head_dim=32, intermediate_size=128, attention_bias=True,
        mlp_bias=True, num_attention_heads=8, num_key_value_heads=2,
    )


def started(ranks: int, *arguments: object, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, str(ranks), *map(str, arguments)], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"} | changes,
    )


def said(process: subprocess.Popen[str], within: float = 60) -> tuple[int, str, list[str]]:
    """Status, standard output, and the lines that ranks (not torchrun) say on stderr."""
    out, err = process.communicate(timeout=within)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_compute_what_one_process_does_with_as_many_groups(
    ranks: int, tiny: Path, tmp_path: Path
) -> None:
    status, out, lines = said(started(ranks, REPOSITORY / "tests" / "rank_cases.py", tiny, tmp_path, ranks), 120)
    assert status == 0, (out, lines)
    alone = compute(tiny, ranks, ranks)
    for rank in range(ranks):
        found, _ = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, (logits, tokens) in found.items():
            wanted, wanted_tokens = alone[name]
            largest = max(1.0, float(wanted.abs().max()))          # sums of other parts round otherwise
            assert float((logits - wanted).abs().max()) <= 1e-5 * largest, name
            assert tokens == wanted_tokens, name


def test_a_command_speaks_once_and_samples_alike(tiny: Path) -> None:
    flags = ("--ckpt", tiny, "--prompt", "abc", "-n", 12, "--temperature", 1, "--paper", "--json", "--ignore-eos")
    status, out, lines = said(started(2, "-m", "popengine.generate", *flags))
    assert (status, lines) == (0, [])
    assert len(json.loads(out)["token_ids"]) == 12              # of one rank, one object


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        (("--prune-ratio", "2"), 2, "prune ratio must be"),
        ((), 3, "3 ranks cannot share 8 num attention heads, 2 num key value heads, 128 intermediate size evenly"),
        (("--image", "nowhere.png"), 2, "this checkpoint is a text model"),
    ],
)
def test_what_is_wrong_is_said_once_and_all_end(tiny: Path, flags: tuple[str, ...], ranks: int, words: str) -> None:
    began = time.monotonic()
    status, out, lines = said(started(ranks, "-m", "popengine.generate", "--ckpt", tiny, "--prompt", "a", *flags))
    assert status != 0 and out == "" and time.monotonic() - began < 30
    assert len(lines) == 1 and words in lines[0]


DIFFERENTLY = """
import os, runpy, sys
rank, (_, checkpoint, how) = os.environ["RANK"], sys.argv
sys.argv = ["generate", "--ckpt", checkpoint, "--prompt", "a", "-n", rank if how == "flags" else "99"]
if how == "dies":
    from popengine import run
    def accept(self, chosen):
        self.new_tokens += 1
        if rank == "1" and self.new_tokens == 5:
            os.kill(os.getpid(), 9)
        return [0]
    run.Run.accept = accept
if how == "memory" and rank == "1":
    from models import llama
    def new_state(*_, **__):
        raise MemoryError("of this test")
    llama.LlamaForCausalLM.new_state = new_state
runpy.run_module("popengine.generate", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [("flags", "ranks must be started alike"), ("dies", "another"), ("memory", "too little memory: of this test")],
)
def test_ranks_end_together(tiny: Path, tmp_path: Path, how: str, words: str) -> None:
    (tmp_path / "differently.py").write_text(DIFFERENTLY)
    began = time.monotonic()
    status, _, lines = said(started(2, tmp_path / "differently.py", tiny, how))
    assert status != 0 and time.monotonic() - began < 30
    assert len(lines) == 1 and words in lines[0], lines


def test_an_interrupt_ends_all(tiny: Path) -> None:
    flags = ("--ckpt", tiny, "--prompt", "a", "-n", 200, "--ignore-eos", "--paper", "--prune-ratio", 0)
    process = started(2, "-m", "popengine.generate", *flags)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    status, _, lines = said(process, 20)
    assert status != 0 and len(lines) <= 1


def test_numbers_that_ranks_do_not_divide_name_those_that_would() -> None:
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    assert Ranks(1, 3).divided(sizes) == {
        "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 512
    }
    with pytest.raises(InputError, match="so many ranks could: 1, 3"):
        Ranks(0, 2).divided(sizes)


def test_a_part_is_found_inside_whatever_a_checkpoint_keeps_together() -> None:
    fused = torch.arange(4 * 12 * 5).view(4, 12, 5)             # [E, 2 I, H]
    up = (2, slice(6, None))
    assert torch.equal(fused[narrowed(up, fused.shape, 0, 3, 3)], fused[2, 6:][3:6])
    assert torch.equal(fused[narrowed((2,), fused.shape, 1, 1, 2)], fused[2][:, 1:3])
    assert torch.equal(fused[0][narrowed((), (12, 5), 0, 4, 4)], fused[0][4:8])


def test_parts_of_groups_are_whole_groups() -> None:
    whole = group(torch.rand(8, 128), 32)
    part = whole.part((slice(2, 4), slice(64, 128)), "a matrix")
    assert torch.equal(part.values(), whole.values()[2:4, 64:])
    with pytest.raises(InputError, match="not whole groups of 32"):
        whole.part((slice(None), slice(0, 48)), "a matrix")
