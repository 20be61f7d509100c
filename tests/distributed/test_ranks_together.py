"""Ranks: processes that torchrun starts compute what one process does with as many groups, and end together."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import REPOSITORY, complete_checkpoint
from forked_ranks import ENDED_WITHIN, run_ranks
from rank_cases import compute
from safetensors.torch import load_file
from tolerance import assert_same, tolerated

from popengine.engine.distributed import contents

SHARED = REPOSITORY / "tests" / "shared"
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
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{SHARED}"} | changes,
    )


def said(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Status, standard output, and the lines that ranks (not torchrun) say on stderr."""
    out, err = process.communicate(timeout=ENDED_WITHIN)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error:")]


def by_forked_ranks(folder: Path, ranks: int, *arguments: object) -> tuple[int, str, list[str]]:
    """What `said` returns, of ranks that no torchrun watches: each of them must end by itself."""
    found = run_ranks(folder, ranks, *arguments)
    assert len(set(found.statuses)) == 1, found
    return found.statuses[0], found.out, [line for line in found.err.splitlines() if line.startswith("error:")]


def test_ranks_compute_what_one_process_does_with_as_many_groups(
    tiny: Path, tmp_path: Path
) -> None:
    status, out, lines = by_forked_ranks(tmp_path, 2, SHARED / "rank_cases.py", tiny, tmp_path)
    assert status == 0, (out, lines)
    alone = compute(tiny, 2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == alone.keys()
        for name, (logits, tokens) in found.items():
            wanted, wanted_tokens = alone[name]
            assert_same(logits, wanted)                            # sums of other parts round otherwise
            assert tokens == wanted_tokens, name


def test_a_command_speaks_once_and_samples_alike(tiny: Path, tmp_path: Path) -> None:
    flags = ("--ckpt", tiny, "--prompt", "abc", "-n", 12, "--temperature", 1, "--paper", "--json", "--ignore-eos")
    status, out, lines = by_forked_ranks(tmp_path, 2, "-m", "popengine.generate", *flags)
    assert (status, lines) == (0, [])
    assert len(json.loads(out)["token_ids"]) == 12              # of one rank, one object


def test_what_ranks_keep_is_of_the_whole_model_and_says_how_many_they_were(tiny: Path, tmp_path: Path) -> None:
    """A comparison by two ranks, whose calibration is the one that one process makes, and which both read."""
    text = tmp_path / "text.txt"
    text.write_text("The harbour was built when the river still ran deep enough for ships. " * 40)
    common = ("--ckpt", tiny, "--dtype", "float32", "--text", text, "--windows", 1, "--prompt-tokens", 24)
    common += ("--score-tokens", 24, "--prune-ratio", 0.2)
    made = ("--calibration-text", text, "--save-calibration")
    compared = ("--methods", "flap", "--no-plots", "--out", tmp_path / "out", *made, tmp_path / "of-two.safetensors")
    scored = ("--method", "flap", "--json")
    found = []
    for ranks, command, more in [
        (2, "compare", compared),
        (1, "score", (*scored, "--groups", 2, *made, tmp_path / "of-one.safetensors")),
        (2, "score", (*scored, "--calibration", tmp_path / "of-one.safetensors")),
    ]:
        status, out, lines = by_forked_ranks(tmp_path, ranks, "-m", f"popengine.{command}", *common, *more)
        assert (status, lines) == (0, []), (command, lines)
        table = tmp_path / "out" / "table.json"
        found.append(json.loads(table.read_text())["rows"][0] if command == "compare" else json.loads(out))
    assert [one["perplexity"] for one in found] == pytest.approx([found[1]["perplexity"]] * 3, rel=tolerated(10))
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("of-one", "of-two"))
    assert one.keys() == other.keys()
    for key, values in one.items():
        if values.dtype.is_floating_point:
            assert_same(other[key], values)
        else:
            assert torch.equal(other[key], values)
    first, *_ = (tmp_path / "out" / "progress.jsonl").read_text().splitlines()
    assert json.loads(first)["comparison"]["ranks"] == 2            # so that one process does not go on with it


@pytest.mark.slow
def test_bench_tells_what_goes_between_ranks(tiny: Path, tmp_path: Path) -> None:
    flags = ("--ckpt", tiny, "--dtype", "float32", "-p", 8, "-n", 6, "--prune-ratio", 0.2, "--rounds", 1)
    command = ("-m", "popengine.bench", *flags, "--json", tmp_path / "bench.json")
    status, out, lines = by_forked_ranks(tmp_path, 2, *command)
    assert (status, lines) == (0, []) and "over 2 ranks" in out and "of it between ranks" in out
    rows = json.loads((tmp_path / "bench.json").read_text())["dtypes"][0]["rows"]
    assert [0 < row["between_ranks"] < 1 for row in rows] == [True, True]


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        (("--prune-ratio", "2"), 2, "prune ratio must be"),
        ((), 3, "cannot be shared out over 3 ranks"),
        (("--image", "nowhere.png"), 2, "this checkpoint is a text model"),
    ],
)
def test_what_is_wrong_is_said_once_and_all_end(
    tiny: Path, tmp_path: Path, flags: tuple[str, ...], ranks: int, words: str
) -> None:
    command = ("-m", "popengine.generate", "--ckpt", tiny, "--prompt", "a", *flags)
    status, out, lines = by_forked_ranks(tmp_path, ranks, *command)
    assert status != 0 and out == ""
    assert len(lines) == 1 and words in lines[0]


DIFFERENTLY = """
import os, runpy, sys
rank, (_, checkpoint, how) = os.environ["RANK"], sys.argv
checkpoint = how if os.path.isdir(how) and rank == "1" else checkpoint
sys.argv = ["generate", "--ckpt", checkpoint, "--prompt", "a", "-n", rank if how == "flags" else "99"]
sys.argv += ["--bogus"] if how == "bogus" and rank == "1" else []
if how == "dies":
    from popengine.engine import run
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


# Where one rank does not even join, or is killed, torchrun ends the others. Everything else they end by themselves.
@pytest.mark.parametrize(
    ("how", "words", "agent"),
    [
        ("flags", "rank 1 has another --max-new-tokens than rank 0", False),
        ("bogus", "unrecognized arguments: --bogus", True),
        ("config", "rank 1 has another config or tokenizer than rank 0", False),
        ("dies", "lost each other", True),
        ("memory", "too little memory", False),
    ],
)
def test_ranks_end_together(tiny: Path, tmp_path: Path, how: str, words: str, agent: bool) -> None:
    (tmp_path / "differently.py").write_text(DIFFERENTLY)
    if how == "config":
        how = str(shutil.copytree(tiny, tmp_path / "other"))
        config = json.loads((tiny / "config.json").read_text()) | {"rms_norm_eps": 1e-4}
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    command = (tmp_path / "differently.py", tiny, how)
    status, _, lines = said(started(2, *command)) if agent else by_forked_ranks(tmp_path, 2, *command)
    assert status != 0
    assert len(lines) == 1 and words in lines[0], lines


def test_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    for name, text in (("one", "a text"), ("same", "a text"), ("other", "another")):
        (tmp_path / name).write_text(text)
    one, same, other = (contents([tmp_path / name]) for name in ("one", "same", "other"))
    assert one == same != other
    assert contents(tmp_path / "none") == str(tmp_path / "none") and contents(None) == "None"


@pytest.mark.slow
def test_an_interrupt_ends_all(tiny: Path) -> None:
    flags = ("--ckpt", tiny, "--prompt", "a", "-n", 200, "--ignore-eos", "--paper", "--prune-ratio", 0)
    process = started(2, "-m", "popengine.generate", *flags)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    status, _, lines = said(process)
    assert status != 0 and len(lines) <= 1


@pytest.mark.slow
def test_two_hosts_give_the_text_of_one_process() -> None:
    done = subprocess.run(
        ["tools/two_hosts.sh"], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and "the same text" in done.stdout, done.stderr
