"""A tokenizer.json that means harm: bounds on time and memory, panics, and the next text as before."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popengine.text.isolated import IsolatedTokenizer
from popengine.text.tokenizer import FastTokenizer, open_tokenizer
from weights.errors import InputError


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


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(parts, min_size=1, max_size=3), text=st.sampled_from(["a" * 40, "Hi"]))
def test_any_parts_of_a_tokenizer(sound: dict[str, Any], changes: list[tuple[str, Any]], text: str) -> None:
    began = time.monotonic()
    try:
        tokenizer = FastTokenizer(IsolatedTokenizer(json.dumps(sound | dict(changes)), "tokenizer.json"))
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert isinstance(tokenizer.decode(ids[:1000]), str)
    except InputError as error:
        assert str(error).startswith("tokenizer.json: ") and str(error).isprintable()
    assert time.monotonic() - began < 12            # some seconds of processor time, on a machine that has other work


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
    assert isinstance(hostile, FastTokenizer) and isinstance(hostile.backend, IsolatedTokenizer)
    text = "Hello <|end|> there <eos>"
    for _ in range(2):
        assert hostile.encode(text, True) == usual.encode(text, True)
        assert hostile.special_ids == usual.special_ids
        hostile.backend.process.kill()              # as its limits do  # type: ignore[union-attr]
        with pytest.raises(InputError, match="more time or memory than any tokenizer needs"):
            hostile.encode("Hi", True)
