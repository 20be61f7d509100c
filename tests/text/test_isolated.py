"""Tokenizer files that mean harm: bounds on time and memory, panics, crashes, and the next text as before."""

import base64
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import sentencepiece_model

from popengine.text.sandbox.process import Sandbox
from popengine.text.tokenizer import FastTokenizer, SentencePieceTokenizer, open_tokenizer
from weights.errors import InputError

pytestmark = pytest.mark.usefixtures("started_sandboxes")


@pytest.fixture(scope="module")
def sound(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "tokenizer.json").read_text())


contents = st.sampled_from(["", "a", "aa", "x" * 1000, "\x1b"])
patterns = st.one_of(
    contents.map(lambda text: {"String": text}),
    st.sampled_from(
        ["(a+)+$", "(a|a)*b", "((a{1,1000}){1,1000}){1,1000}", "[", "", "(?=", "a*a*a*a*a*a*b", r"(.)\1+"]
    ).map(lambda expression: {"Regex": expression}),
)
steps: Any = st.one_of(
    st.builds(lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}, patterns, contents),
    st.builds(lambda content: {"type": "Prepend", "prepend": content}, contents),
    st.builds(lambda content, n: {"type": "Strip", "strip_left": n, "strip_right": True, "content": content, "start": n,
                                  "stop": n}, contents, st.sampled_from([0, -1, 2**63])),
    st.sampled_from([{"type": "ByteFallback"}, {"type": "NFKD"}, {"type": "Fuse"}, {"type": "Lowercase"},
                     {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Unheard"}, {}, None, 3]),
)
splits = st.one_of(
    st.builds(lambda pattern, how, invert: {"type": "Split", "pattern": pattern, "behavior": how, "invert": invert},
              patterns, st.sampled_from(["Isolated", "Removed", "MergedWithNext", "?"]), st.booleans()),
    st.sampled_from([{"type": "Digits", "individual_digits": True}, {"type": "Metaspace", "replacement": "aa"}, None]),
)
many = st.lists(steps, max_size=24) | steps.map(lambda one: [one] * 24)
parts = st.one_of(
    st.tuples(st.just("normalizer"), many.map(lambda each: {"type": "Sequence", "normalizers": each})),
    st.tuples(st.just("decoder"), many.map(lambda each: {"type": "Sequence", "decoders": each})),
    st.tuples(st.just("pre_tokenizer"), splits),
    st.tuples(st.just("model"), st.fixed_dictionaries({
        "type": st.sampled_from(["BPE", "Unigram", "WordLevel", "WordPiece"]), "vocab": st.sampled_from(
            [{}, {"a": 2**32 - 1}, {"a": 0, "b": 0}, [], [["a", 0.0], ["", -1.0]], None]),
        "merges": st.sampled_from([[], ["a b"], [["a", "b"]], 3]), "unk_id": st.sampled_from([0, 9, None]),
        "unk_token": st.sampled_from(["a", "?", None]),
    })),
    st.tuples(st.just("post_processor"), st.just({"type": "TemplateProcessing", "single": [], "pair": [],
                                                  "special_tokens": {}})),
    st.tuples(st.just("added_tokens"), st.lists(st.fixed_dictionaries({
        "id": st.sampled_from([0, 3, 2**32 - 1, -1]), "content": contents, "special": st.booleans(),
        "single_word": st.booleans(), "lstrip": st.booleans(), "rstrip": st.booleans(), "normalized": st.booleans(),
    }), max_size=3)),
)


@contextmanager
def bounded() -> Iterator[list[Sandbox]]:
    """Processes that are put into the list have taken at most 2 s and 500 MB when they are ended."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    made: list[Sandbox] = []
    yield made
    for sandbox in made:
        if sandbox.process is not None:
            assert resource.prlimit(sandbox.process.pid, resource.RLIMIT_AS)[0] < 500_000_000
        sandbox.stop()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 2


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(parts, min_size=1, max_size=3), text=st.sampled_from(["a" * 40, "Hi"]))
@pytest.mark.slow
def test_any_parts_of_a_tokenizer(sound: dict[str, Any], changes: list[tuple[str, Any]], text: str) -> None:
    with bounded() as made:
        try:
            made.append(Sandbox("tokenizers", json.dumps(sound | dict(changes)), "tokenizer.json"))
            tokenizer = FastTokenizer(made[0])
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert isinstance(tokenizer.decode(ids[:1000]), str)
        except InputError as error:
            assert str(error).startswith("tokenizer.json: ") and str(error).isprintable()


@pytest.fixture(scope="module")
def sound_pieces() -> bytes:
    return sentencepiece_model().serialized_model_proto()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8), cut=st.integers(0, 10**6),
       whole=st.booleans())
@pytest.mark.slow
def test_any_bytes_of_a_sentencepiece_model(
    sound_pieces: bytes, places: list[tuple[int, int]], cut: int, whole: bool
) -> None:
    content = bytearray(sound_pieces)
    for place, value in places:
        content[place % len(content)] = value
    with bounded() as made:
        try:
            model = bytes(content if whole else content[: cut % len(content)])
            made.append(Sandbox("sentencepiece", base64.b64encode(model or b"\0").decode(), "model"))
            tokenizer = SentencePieceTokenizer(made[0])
            ids = tokenizer.encode("Hi there <s>", add_special_tokens=True)
            assert isinstance(tokenizer.decode(ids), str)
        except InputError as error:
            assert str(error).startswith("model: ") and str(error).isprintable()


def test_after_a_failure_the_next_text_is_encoded_as_before(
    checkpoint: Path, sound: dict[str, Any], tmp_path: Path
) -> None:
    runaway = {"type": "Split", "pattern": {"Regex": "(z+)+$"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [runaway, sound["pre_tokenizer"]]}
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(sound | {"pre_tokenizer": both}))
    hostile, usual = open_tokenizer(tmp_path), open_tokenizer(checkpoint)
    assert isinstance(hostile, FastTokenizer)
    text = "Hello <|end|> there <eos>"
    for _ in range(2):
        assert hostile.encode(text, True) == usual.encode(text, True)
        assert hostile.special_ids == usual.special_ids
        hostile.sandbox.process.kill()              # as its limits do  # type: ignore[union-attr]
        with pytest.raises(InputError, match="more time or memory than any tokenizer needs"):
            hostile.encode("Hi", True)
