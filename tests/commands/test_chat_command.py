"""The conversation as a user has it: lines from a pipe, lines from a terminal, and the front door."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders import ENDLESS, LLAVA_TINY, REPOSITORY, endless_checkpoint, exit_status

import popengine
from popengine import __main__ as front_door
from popengine.chat import main
from popengine.dialogue.commands import COMMANDS, OF_SAMPLING
from popengine.engine.sampling import Sampling

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Lines into a pipe: the exit status, the answers, and what else was said."""

    def lines(*said: str | bytes, flags: tuple[Any, ...] = ("-n", 6)) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)                                 # where /save goes without a name
        text = b"".join((one.encode() if isinstance(one, str) else one) + b"\n" for one in said)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        ckpt = () if "--ckpt" in flags else ("--ckpt", checkpoint)
        return exit_status(main, *ckpt, "--prune-ratio", 0, *flags), *capsys.readouterr()

    return lines


def test_a_pipe_is_answered_line_by_line(talk: Talk, checkpoint: Path) -> None:
    status, out, err = talk("Hello there", "", " /usr is a folder", "/quit", "not heard", flags=("-n", 6, "--quiet"))
    assert (status, out.count("\n")) == (0, 2)
    assert "starting" not in err and "loading" not in err
    assert err.count("ended after 6 tokens; /max-new-tokens allows more") == 2


def test_settings_are_shown_and_changed(talk: Talk) -> None:
    status, _, err = talk(
        "/ratio", "/ratio 0.3", "/prune-ratio", "/ffn-ratio 0.5", "/ffn-ratio", "/rule up", "/rule", "/dense-every 4",
        "/dense-every none", "/dense-every", "/temperature 0.5", "/temperature", "/seed 1", "/max-new-tokens 3",
        "/max-new-tokens", "Hello", "/stats",
    )
    assert status == 0
    for said in ("prune-ratio 0.0\n", "prune-ratio 0.3\n", "ffn-ratio 0.5\n", "rule up\n", "dense-every None\n",
                 "temperature 0.5\n", "max-new-tokens 3\n", "ended after 3 tokens", "tokens/s"):
        assert said in err, said


def test_every_setting_can_be_said(talk: Talk) -> None:
    assert set(OF_SAMPLING) == {one.name for one in fields(Sampling)}
    status, _, err = talk(*[name for name in COMMANDS if name not in ("/quit", "/stats", "/image", "/load")])
    assert status == 0
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize(("line", "named"), [
    ("/rato 0.3", "/help lists them.*did you mean /ratio?"),
    ("/ratio a lot", "/prune-ratio takes a number, not 'a lot'"),
    ("/ratio 0.95", "must stay below"),
    ("/rule none", "rule must be one of"),
    ("/redraw-every 4", "needs dense every"),
    ("/max-new-tokens 0", "at least 1"),
    ("/temperature -1", "temperature"),
    ("/temperature none", "/temperature takes a number, not 'none'"),
    ("/top-k none", "/top-k takes a whole number, not 'none'"),
    ("/top-p none", "/top-p takes a number, not 'none'"),
    ("/max-new-tokens none", "/max-new-tokens takes a whole number, not 'none'"),
    ("/quit now", "stands alone, without 'now'"),
    ("/reset all of it", "stands alone"),
    ("/save /", "/ is not a file, and is not replaced by one"),
    ("/save .", ". is not a file, and is not replaced by one"),
    ("/save " + 300 * "n", "cannot be written: File name too long"),
    ("/save a\0b", "no file can have the name"),
    ("/load a\0b", "no file can have the name"),
    ("/load " + 400 * "n", "cannot be read: File name too long"),
    ("/load .", "is not a file, but a directory"),
    ("/image picture.png", "this checkpoint is a text model"),
    ("/image", "/image takes the path of a picture"),
    ("/load nowhere.json", "nowhere.json cannot be read: No such file"),
    ("/save /nowhere/at/all.json", "cannot be written"),
    ("/stats", "nothing was answered yet"),
    (b"caf\xe9", "line 1 on standard input is not UTF-8"),
    ("x" * 300, "context is full"),
])
def test_the_first_wrong_line_of_a_pipe_ends_it(talk: Talk, line: str | bytes, named: str) -> None:
    status, out, err = talk(line, "not heard")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert all(word in err for word in named.split(".*")), err


def test_a_conversation_is_saved_and_goes_on(talk: Talk, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    _, both, _ = talk("/system Be brief.", "Hello", f"/save {kept}", "And now?")
    assert [one["role"] for one in json.loads(kept.read_text())["messages"]] == ["system", "user", "assistant"]
    _, second, _ = talk("Something else", "/reset", f"/load {kept}", "And now?")
    assert second.splitlines()[-1] == both.splitlines()[-1]


WORDS = ["", "none", "0", "1", "-1", "0.3", "1/3", "2/0", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000, "now",
         "all", ".", "..", "/", "/dev/null", "n" * 300, "a\0b", "caf\udce9", "\x1b[2J", "'", '"', "*", "file", "folder",
         "pipe", "kept.json", "pop", "glass", "cats", "draft", "dense", "text", "1.mlp", "0-2", "=", "é", "\u202e"]


def random_lines(draw: Random, until: Callable[[], bool]) -> Iterator[str]:
    """Whatever a person types, but for the one command that ends it."""
    while not until():
        words = draw.choices(WORDS, k=draw.choice([1, 1, 1, 1, 2, 3]))
        name = draw.choice([*COMMANDS, *COMMANDS, "/", "/rato", "/save\t", "//"])
        line = draw.choice([f"{name} {' '.join(words)}", f"{name} {' '.join(words)}", name, f"{name}{words[0]}"])
        if line.strip() != "/quit":
            yield line
        if draw.random() < 0.1:
            yield draw.choice([" /etc is a folder", "Hello", "/reset", "x" * 100, "\0", "\udce9"])


def test_nothing_that_a_person_types_ends_a_chat(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random lines on a terminal: 250 of them, or for so many seconds as RANDOM_TEST_SECONDS says, from a new seed."""
    seconds = float(os.environ.get("RANDOM_TEST_SECONDS", "0"))
    seed = Random().randrange(10**6) if seconds else 0
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    began, asked = time.monotonic(), []

    def enough() -> bool:
        return time.monotonic() - began > seconds if seconds else len(asked) >= 250

    lines = random_lines(Random(seed), enough)

    def typed(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        asked.append(line)
        return line

    monkeypatch.setattr("builtins.input", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    status = exit_status(main, "--ckpt", checkpoint, "--prune-ratio", 0, "-n", 2)
    err = capsys.readouterr().err
    assert status == 0, (seed, asked[-3:], err[-500:])
    assert "of popengine itself" not in err, (seed, err[err.index("of popengine itself") :][:500])
    assert len(asked) > 100 and next(lines, None) is None
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir() and not (tmp_path / "n").exists()


def test_a_picture_goes_with_the_next_turn(talk: Talk, tmp_path: Path) -> None:
    flags = ("--ckpt", LLAVA_TINY, "-n", 12)
    status, out, err = talk(f"/image {LLAVA_TINY / 'example.png'}", "What do you see?", "/stats", flags=flags)
    assert status == 0
    assert "of images" in err
    (tmp_path / "words.png").write_text("not a picture")
    for name, said in (("nowhere.png", "nowhere.png"), ("words.png", "words.png"), (".", "is not a file")):
        status, out, err = talk(f"/image {tmp_path / name}", "What?", flags=flags)
        assert (status, out, err.count("\n")) == (2, "", 1) and said in err, err


def test_a_terminal_goes_on_after_mistakes_and_interrupts(tmp_path: Path) -> None:
    folder = endless_checkpoint(tmp_path)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    environment = os.environ | {"TERM": "dumb"}
    flags = ["--ckpt", str(folder), "-n", "50000", "--prune-ratio", "0", *ENDLESS]
    process = subprocess.Popen(
        [sys.executable, "-m", "popengine", "chat", *flags],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment, cwd=REPOSITORY,
    )
    os.close(theirs)
    shown = ""

    def until(words: str) -> None:
        nonlocal shown
        began = time.perf_counter()
        while words not in shown:
            assert select.select([ours], [], [], 30)[0] and time.perf_counter() - began < 60, shown[-500:]
            shown += os.read(ours, 65536).decode("utf-8", "replace")
        shown = shown.partition(words)[2]

    def write(line: str) -> None:
        os.write(ours, line.encode())

    for said in ("starting ...", "loading", "plain weights, float32, dense; /help says more"):
        until(said)
    until("> ")
    write("/rato\n")
    until("did you mean /ratio?")
    until("> ")
    write("Hello\n")
    until("Hello")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)               # ends the answer,
    write("/ratio\n")
    until("prune-ratio 0.0")
    until("> ")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)               # and here there is none to end
    until("Ctrl-D or /quit ends the conversation")
    write("/stats\n")
    until("nothing was answered yet")                   # to its end
    write("/save " + str(tmp_path / "kept.json") + "\n/quit\n")
    assert process.wait(timeout=30) == 0
    os.close(ours)
    messages = json.loads((tmp_path / "kept.json").read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"]
    assert messages[1]["content"]


def test_a_block_is_one_message_and_never_a_command(talk: Talk, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    status, out, _ = talk(
        '"""/quit is', "", 'what I said"""', '"""one line"""', f"/save {kept}", '"""to the end', "of it"
    )
    assert (status, out.count("\n")) == (0, 3)
    said = [one["content"] for one in json.loads(kept.read_text())["messages"] if one["role"] == "user"]
    assert said == [" /quit is\n\nwhat I said", "one line"]


def test_pasted_lines_are_one_message_and_history_is_kept_for_the_user_alone(
    checkpoint: Path, tmp_path: Path
) -> None:
    kept, history = tmp_path / "kept.json", tmp_path / "state" / "popengine" / "history"
    for again in (False, True):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path / "state")}
        process = subprocess.Popen(
            [sys.executable, "-m", "popengine", "chat", "--ckpt", str(checkpoint), "-n", "3", "--prune-ratio", "0"],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment, cwd=REPOSITORY,
        )
        os.close(theirs)
        shown = ""

        def until(words: str, ours: int = ours) -> None:
            nonlocal shown
            while words not in shown:
                assert select.select([ours], [], [], 30)[0], shown[-500:]
                shown += os.read(ours, 65536).decode("utf-8", "replace")
            shown = shown.partition(words)[2]

        until("> ")
        if again:
            os.write(ours, f"/save {kept}\n/quit\n".encode())
        else:
            os.write(ours, b"first\n")
            until("of the dense model's bytes; /stats says more]")
            until("> ")
            os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\n")
            until("of the dense model's bytes; /stats says more]")
            until("> ")
            os.write(ours, f"/save {kept}\n/quit\n".encode())
        assert process.wait(timeout=30) == 0
        os.close(ours)
        if not again:
            said = [one["content"] for one in json.loads(kept.read_text())["messages"] if one["role"] == "user"]
            assert said == ["first", "one\ntwo"]
    assert history.read_text().splitlines()[:2] == ["first", "one two"]
    assert history.read_text().count("/quit") == 2                                  # of both conversations
    assert history.stat().st_mode & 0o777 == 0o600 and history.parent.stat().st_mode & 0o077 == 0


def knock(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["popengine", *words])
    return exit_status(lambda _: front_door.main())


def test_the_front_door_lists_its_commands_and_suggests(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert knock(monkeypatch) == knock(monkeypatch, "--help") == knock(monkeypatch, "--version") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in front_door.COMMANDS)
    assert out.endswith(f"popengine {popengine.__version__}\n")
    assert knock(monkeypatch, "genrate") == 2
    assert capsys.readouterr().err.startswith("error: genrate is no command; did you mean generate?")
    assert knock(monkeypatch, "generate", "--prompt", "x", "--prune-ration", "0.3") == 2
    assert "did you mean --prune-ratio?" in capsys.readouterr().err


def test_the_front_door_leads_to_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    assert knock(monkeypatch, "generate", "--ckpt", str(checkpoint), "--prompt", "x", "-n", "3", "--quiet") == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", [[], *([name, "--help"] for name in front_door.COMMANDS if name != "harness")])
def test_help_fits_a_screen_and_the_rest_is_behind_help_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert knock(monkeypatch, *words) == 0
    short = capsys.readouterr().out
    assert short.count("\n") <= 28
    assert "    popengine " in short.split("flags:" if words else "commands")[0]
    if words and words[0] != "info":
        assert knock(monkeypatch, words[0], "--help-all") == 0
        assert capsys.readouterr().out.count("\n") > short.count("\n")


@pytest.mark.parametrize(("line", "wanted"), [
    ("popengine ch", {"chat"}), ("popengine ", set(front_door.COMMANDS)), ("popengine chat", {"chat"}),
    ("popengine generate --prune-r", {"--prune-ratio"}), ("popengine harness --ta", set()),
])
def test_a_shell_is_told_what_could_come_next(line: str, wanted: set[str], tmp_path: Path) -> None:
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "told"), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }
    command = [sys.executable, "-m", "popengine"]
    subprocess.run(command, env=os.environ | asked, cwd=REPOSITORY, check=False, timeout=60, capture_output=True)
    told = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""
    assert {word.strip() for word in told.split("\n")} - {""} - {"-h", "--help"} == wanted
