"""Tokenizers against transformers on tiny vocabularies trained here; streaming decode against decode of everything."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from popengine.text.sandbox.process import Sandbox
from popengine.text.tokenizer import FastTokenizer, TextStream, TextTokenizer, open_tokenizer
from weights.errors import InputError

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun.",
    "  Two spaces before, two spaces after:  a list of things that are often said.",
    "She said hello, hello again, and nothing but hello to the user and the system.",
    "Numbers such as 12, 345 and 6789 are written between words; so are (brackets) and dashes - here.",
] * 30

TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "  hello again  ",
    "▁hello",
    "two\nlines\n\n and\ttabs ",
    "héllo wörld, 日本語 and 😀👩‍👩‍👧 e\u0301",
    "a zero \x00 byte",
    "one</s>two",
    "one </s> two",
    "<s>[INST] hello [/INST]",
    "<s> <s>  hello<unk>",
]
TEXTS_WITH_ADDED_TOKENS = [
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "hello <|im_end|> \n there",
    "a<|im|>b <wide>  c <widest> d <|im|>+ <|im|>-",
]
ADDED_TOKENS = {
    "<|im_start|>": {"special": True, "normalized": False},
    "<|im_end|>": {"special": True, "normalized": False, "rstrip": True},
    "<|im|>": {"special": False, "normalized": False},
    "<|im|>+": {"special": False, "normalized": False},
    "<wide>": {"special": False, "normalized": False, "lstrip": True},
    "<widest>": {"special": True, "normalized": False, "single_word": True},
}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A BPE model with Llama's settings: byte fallback, no normalization, a space mark in front."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


def sentencepiece_directory(directory: Path, model: bytes, **config: object) -> Path:
    (directory / "tokenizer.model").write_bytes(model)
    write_json(directory / "config.json", {"model_type": "llama"})
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **config})
    return directory


def byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level_directory(directory: Path, **config: object) -> Path:
    byte_level_backend().save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", {"model_type": "llama"})
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    return directory


def byte_fallback_directory(directory: Path, model: bytes, **config: object) -> Path:
    """A tokenizer.json as older Llama checkpoints carry it: the space rule is in its normalizer."""
    source = directory / "source"
    source.mkdir()
    AutoTokenizer.from_pretrained(sentencepiece_directory(source, model)).save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = None
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    write_json(directory / "tokenizer.json", content)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    write_json(directory / "config.json", {"model_type": "llama"})
    return directory


def assert_same_as_transformers(directory: Path, texts: list[str]) -> None:
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    for text in texts:
        for add_special_tokens in (True, False):
            expected = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
            assert ours.encode(text, add_special_tokens) == expected, (text, add_special_tokens)
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(ours.vocabulary_size) for _ in range(generator.randrange(12))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (ids, skip)


@pytest.mark.parametrize(
    "config",
    [
        {"legacy": True},
        {"legacy": False},
        {},
        {"add_prefix_space": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "</s>"}, "eos_token": "<s>"},
    ],
    ids=str,
)
def test_sentencepiece_agrees_with_transformers(tmp_path: Path, sentencepiece_model: bytes, config: dict) -> None:
    config = {"add_bos_token": True, **config}
    assert_same_as_transformers(sentencepiece_directory(tmp_path, sentencepiece_model, **config), TEXTS)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_added_tokens_agree_with_transformers(
    tmp_path: Path, sentencepiece_model: bytes, legacy: bool
) -> None:
    declared = {
        str(380 + index): {"content": content, **flags} for index, (content, flags) in enumerate(ADDED_TOKENS.items())
    }
    directory = sentencepiece_directory(
        tmp_path,
        sentencepiece_model,
        added_tokens_decoder=declared,
        bos_token="<|im_end|>",
        eos_token="<|im|>",
        pad_token="<wide>",
        legacy=legacy,
        add_bos_token=True,
    )
    assert_same_as_transformers(directory, TEXTS + TEXTS_WITH_ADDED_TOKENS)


def test_sentencepiece_reads_added_tokens_json_and_special_tokens_map(
    tmp_path: Path, sentencepiece_model: bytes
) -> None:
    directory = sentencepiece_directory(tmp_path, sentencepiece_model, add_bos_token=True)
    write_json(directory / "added_tokens.json", {"<|im_start|>": 380, "<|im_end|>": 381})
    write_json(directory / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    assert_same_as_transformers(directory, TEXTS + TEXTS_WITH_ADDED_TOKENS[:2])
    tokenizer = open_tokenizer(directory)
    assert tokenizer.token_id("<|im_end|>") == 381 in tokenizer.special_ids
    assert tokenizer.token_id("<|im_start|>") == 380 not in tokenizer.special_ids


def test_sentencepiece_without_configuration_puts_bos_in_front(tmp_path: Path, sentencepiece_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.encode("hello", add_special_tokens=True)[0] == tokenizer.token_id("<s>")
    assert tokenizer.token_id("<s>") not in tokenizer.encode("hello", add_special_tokens=False)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_byte_level_agrees_with_transformers(tmp_path: Path, add_bos_token: bool) -> None:
    """add_bos_token beside a tokenizer.json says nothing in transformers 5 either: its post-processor decides."""
    directory = byte_level_directory(tmp_path, add_bos_token=add_bos_token, bos_token="<s>", eos_token="</s>")
    assert_same_as_transformers(directory, TEXTS)


def test_post_processor_of_tokenizer_json_adds_bos(tmp_path: Path) -> None:
    directory = byte_level_directory(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=False)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)  # of somebody's training: never ours
    backend.enable_padding(length=32)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = open_tokenizer(directory)
    ids = tokenizer.encode("hello again and again and again", add_special_tokens=True)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "hello again and again and again"
    assert ids == AutoTokenizer.from_pretrained(directory)("hello again and again and again")["input_ids"]


def test_byte_fallback_tokenizer_json_agrees_with_transformers(tmp_path: Path, sentencepiece_model: bytes) -> None:
    directory = byte_fallback_directory(tmp_path, sentencepiece_model, bos_token="<s>", eos_token="</s>")
    assert_same_as_transformers(directory, TEXTS)


def test_tokens_declared_beside_tokenizer_json_are_known(tmp_path: Path) -> None:
    declared = {
        str(400 + index): {"content": content, **flags} for index, (content, flags) in enumerate(ADDED_TOKENS.items())
    }
    directory = byte_level_directory(
        tmp_path,
        added_tokens_decoder=declared,
        bos_token="<s>",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>"},
        pad_token="<pad>",
        additional_special_tokens=["<|im|>", "<tool>"],  # <|im|> stays what added_tokens_decoder says it is
    )
    assert_same_as_transformers(directory, TEXTS + TEXTS_WITH_ADDED_TOKENS)
    tokenizer = open_tokenizer(directory)
    assert tokenizer.eos_token == "<|im_end|>"
    special = {"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<widest>", "<tool>", "<pad>"}
    assert tokenizer.special_ids == {tokenizer.token_id(token) for token in special}
    assert tokenizer.vocabulary_size == 400 + len(ADDED_TOKENS) + 2


def test_tokenizer_json_is_preferred(tmp_path: Path, sentencepiece_model: bytes) -> None:
    byte_level_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert isinstance(open_tokenizer(tmp_path), FastTokenizer)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "sentencepiece"])
def test_an_id_without_a_token_is_no_text(tmp_path: Path, sentencepiece_model: bytes, kind: str) -> None:
    tokenizer = tokenizer_of(kind, tmp_path, sentencepiece_model)
    ids = tokenizer.encode("hello", add_special_tokens=False)
    beyond = tokenizer.vocabulary_size
    assert tokenizer.decode([beyond, *ids, beyond + 7]) == "hello"
    assert stream(tokenizer, [beyond, *ids, beyond + 7]) == "hello"


# --- letters that spell control tokens


@pytest.mark.parametrize("rule", ["byte level", "byte fallback", "first", "always", "never", "metaspace"])
def test_letters_after_a_control_token_are_as_the_rest_of_a_text(
    rule: str, tmp_path: Path, sentencepiece_model: bytes
) -> None:
    flags = {"always": {"legacy": True}, "never": {"add_prefix_space": False}}.get(rule, {})
    if rule == "metaspace":         # of tokenizer.json, as transformers 5 writes Llama's: a space at the very start
        (tmp_path / "source").mkdir()
        source = sentencepiece_directory(tmp_path / "source", sentencepiece_model)
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
        }
        write_json(tmp_path / "tokenizer.json", content)
        tokenizer = open_tokenizer(tmp_path)
    elif rule.startswith("byte"):
        tokenizer = tokenizer_of(rule, tmp_path, sentencepiece_model)
    else:
        tokenizer = open_tokenizer(sentencepiece_directory(tmp_path, sentencepiece_model, **flags))
    end = tokenizer.token_id("</s>")
    for text in ("hello again", " hello", "a", "", "\n"):
        follows = tokenizer.encode(text, add_special_tokens=False, parse_special=False, begins=False)
        assert [end, *follows] == tokenizer.encode("</s>" + text, add_special_tokens=False)
    spelled = tokenizer.encode("hello </s> you", add_special_tokens=False, parse_special=False, begins=False)
    assert not tokenizer.special_ids & set(spelled)
    assert tokenizer.decode([end, *spelled], skip_special_tokens=False).replace("</s> hello", "</s>hello") == (
        "</s>hello </s> you"
    )


# --- streaming


def tokenizer_of(kind: str, directory: Path, model: bytes) -> TextTokenizer:
    if kind == "byte level":
        return open_tokenizer(byte_level_directory(directory, bos_token="<s>", eos_token="</s>"))
    if kind == "byte fallback":
        return open_tokenizer(byte_fallback_directory(directory, model, bos_token="<s>", eos_token="</s>"))
    return open_tokenizer(sentencepiece_directory(directory, model))


@pytest.fixture(scope="session", params=["byte level", "byte fallback", "sentencepiece"])
def any_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes
) -> TextTokenizer:
    return tokenizer_of(request.param, tmp_path_factory.mktemp("tokenizer"), sentencepiece_model)


def stream(tokenizer: TextTokenizer, ids: list[int]) -> str:
    text_stream = TextStream(tokenizer)
    return "".join(text_stream.push(token) for token in ids) + text_stream.finish()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_text_joins_to_the_whole_text(any_tokenizer: TextTokenizer, data: st.DataObject) -> None:
    low_ids = st.integers(0, 262)  # special tokens and single bytes in all three vocabularies
    all_ids = st.integers(0, any_tokenizer.vocabulary_size + 3)
    ids = data.draw(st.lists(low_ids | all_ids, max_size=60))
    assert stream(any_tokenizer, ids) == any_tokenizer.decode(ids)


def test_streamed_text_joins_over_long_runs_of_bytes(any_tokenizer: TextTokenizer) -> None:
    generator = random.Random(1)
    for length in (40, 200, 1000):
        for high in (262, any_tokenizer.vocabulary_size):
            ids = [generator.randrange(2, high) for _ in range(length)]
            assert stream(any_tokenizer, ids) == any_tokenizer.decode(ids)
    for token in range(0, any_tokenizer.vocabulary_size, 7):
        assert stream(any_tokenizer, [token] * 40) == any_tokenizer.decode([token] * 40)


def test_stream_never_gives_out_part_of_a_character(any_tokenizer: TextTokenizer) -> None:
    text = "hello 😀 日本語, 👩‍👩‍👧 and e\u0301 done"
    text_stream = TextStream(any_tokenizer)
    pieces = [text_stream.push(token) for token in any_tokenizer.encode(text, add_special_tokens=True)]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) == text  # nothing is left for finish: the last token is whole
    assert text_stream.finish() == ""


def test_held_back_bytes_come_out_at_the_end(any_tokenizer: TextTokenizer) -> None:
    ids = any_tokenizer.encode("hello 😀", add_special_tokens=False)[:-1]  # the emoji lacks its last byte
    text_stream = TextStream(any_tokenizer)
    assert "".join(text_stream.push(token) for token in ids) == "hello "
    held = text_stream.finish()
    assert set(held) == {"\N{REPLACEMENT CHARACTER}"}
    assert "hello " + held == any_tokenizer.decode(ids)
    assert text_stream.finish() == ""


def test_words_arrive_with_their_own_token(any_tokenizer: TextTokenizer) -> None:
    text_stream = TextStream(any_tokenizer)
    for token in any_tokenizer.encode("hello again and again", add_special_tokens=False):
        assert text_stream.push(token) != "" or any_tokenizer.decode([token]) == ""


def test_cost_of_a_token_does_not_grow(any_tokenizer: TextTokenizer) -> None:
    ids = any_tokenizer.encode("hello again and again, 日本語 " * 40, add_special_tokens=False)

    def decoded(ids: list[int]) -> int:
        """How many ids the stream decodes in all, a cost that needs no clock."""
        counts = []

        class Counting:
            special_ids, byte_ids = any_tokenizer.special_ids, any_tokenizer.byte_ids
            vocabulary_size = any_tokenizer.vocabulary_size
            decode = staticmethod(lambda ids: counts.append(len(ids)) or any_tokenizer.decode(ids))

        assert stream(Counting(), ids) == any_tokenizer.decode(ids)  # type: ignore[arg-type]
        return sum(counts)

    one, four = decoded(ids), decoded(ids * 4)
    assert four <= 4.2 * one
    assert one <= 32 * len(ids)


# --- bad input


def assert_one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_tokenizer_names_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, str(tmp_path), "tokenizer.json", "tokenizer.model")


def test_vocab_and_merges_alone_say_how_to_convert(tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, "vocab.json", "save_pretrained")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": {"type": "Magic"}}'], ids=repr
)
def test_broken_tokenizer_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"IQ== 0\nIg== 1\n"], ids=repr)
def test_broken_tokenizer_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, str(tmp_path / "tokenizer.model"), "sentencepiece")


def test_truncated_tokenizer_model_is_one_line(tmp_path: Path, sentencepiece_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model[: len(sentencepiece_model) // 2])
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, str(tmp_path / "tokenizer.model"))


def test_large_file_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, "git lfs pull")


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"added_tokens_decoder": {"x": {"content": "a"}}}', '{"added_tokens_decoder": {"9": "a"}}'],
)
def test_broken_tokenizer_config_is_one_line(tmp_path: Path, sentencepiece_model: bytes, config: str) -> None:
    for make in (byte_level_directory, lambda path: sentencepiece_directory(path, sentencepiece_model)):
        directory = tmp_path / str(random.random())
        directory.mkdir()
        make(directory)
        (directory / "tokenizer_config.json").write_text(config)
        with pytest.raises(InputError) as error:
            open_tokenizer(directory)
        assert_one_line(error, "tokenizer_config.json")


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_are_read_at_once_up_to_a_number_far_above_any_model(tmp_path: Path, place: str) -> None:
    byte_level_directory(tmp_path)
    for count in (10_000, 50_000):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        tokens = [{"id": 600 + one, "content": f"<{one}>"} | flags for one in range(count)]
        content: dict[str, Any] = json.loads((tmp_path / "tokenizer.json").read_text())
        if place == "tokenizer.json":
            content["added_tokens"] = tokens
        elif place == "tokenizer_config.json":
            content = {"added_tokens_decoder": {str(token["id"]): token for token in tokens}}
        else:
            content = {str(token["content"]): token["id"] for token in tokens}
            (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        write_json(tmp_path / place, content)
        began = time.process_time()         # the child's own limit is below this
        if count < 32_000:
            assert open_tokenizer(tmp_path).token_id("<9999>") is not None
        else:
            with pytest.raises(InputError, match=r"it has 50\d{3} added tokens, and at most 32000 are read"):
                open_tokenizer(tmp_path)
        assert time.process_time() - began < 2.0


def test_lone_surrogate_is_refused(any_tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError) as error:
        any_tokenizer.encode("caf\udce9", add_special_tokens=True)
    assert_one_line(error, "character 3", "UTF-8")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("config", [
    {"image_token": "<img>", "prefix_token": "<pre>", "pad_token": "<pad>"},
    {"extra_special_tokens": {"image_token": "<img>", "end_of_image": "<pre>"}, "unk_token": "<pad>"},
    {"extra_special_tokens": ["<img>", "<pre>"], "video_token": "<pad>"},
    {"additional_special_tokens": ["<pre>", {"__type": "AddedToken", "content": "<img>", "special": True}]},
], ids=str)  # fmt: skip
def test_every_token_with_a_name_is_special_as_in_transformers(
    tmp_path: Path, config: dict[str, Any], known: bool
) -> None:
    """known: as ordinary tokens, in tokenizer.json"""
    backend = byte_level_backend()
    if known:
        backend.add_tokens([AddedToken("<img>", special=False), AddedToken("<pre>", special=False)])
    byte_level_directory(tmp_path, **config)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = open_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "a<img>b<pre>c<pad>d"
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocabulary_size == len(theirs)


HALF = "<\ud83d>"
WITH_HALF: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer_config.json", {"pad_token": HALF}),
    ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": HALF}}),
    ("tokenizer_config.json", {"extra_special_tokens": [HALF]}),
    ("tokenizer_config.json", {"extra_special_tokens": {"image_token": HALF}}),
    ("tokenizer_config.json", {"additional_special_tokens": [{"content": HALF}]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": HALF, "special": True}}}),
    ("special_tokens_map.json", {"unk_token": HALF}),
    ("added_tokens.json", {HALF: 400}),
    ("tokenizer.json", {"added_tokens": [{"id": 400, "content": HALF, "special": True, "single_word": False,
                                          "lstrip": False, "rstrip": False, "normalized": False}]}),
]


@pytest.mark.parametrize("kind", ["fast", "sentencepiece"])
@pytest.mark.parametrize(("file", "change"), WITH_HALF, ids=str)
def test_half_a_character_in_a_token_is_refused(
    tmp_path: Path, sentencepiece_model: bytes, kind: str, file: str, change: dict[str, Any]
) -> None:
    if kind == "fast":
        byte_level_directory(tmp_path)
    else:
        sentencepiece_directory(tmp_path, sentencepiece_model)
    path = tmp_path / file
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | change)
    if kind == "sentencepiece" and file == "tokenizer.json":
        return                              # which would be read instead
    with pytest.raises(InputError) as error:
        open_tokenizer(tmp_path)
    assert_one_line(error, file, "escape" if file == "tokenizer.json" else "surrogate")


def test_fast_tokenizer_marks_the_named_tokens_special() -> None:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = FastTokenizer(Sandbox("tokenizers", backend.to_str(), "here"), bos_token=None, eos_token="<end>")
    assert tokenizer.token_id("<end>") in tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode("hello<end>", add_special_tokens=False)) == "hello"
