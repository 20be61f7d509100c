"""Prompts to token ids: who says what, batches in one template process, and texts that no context can hold."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from builders import LLAVA_TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.text.chat import render_chat
from popengine.text.sandbox.process import Sandbox
from weights.errors import InputError

SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<eos>"]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint)


def controls(engine: Engine, ids: list[int]) -> list[str]:
    return [engine.tokenizer.decode([one], skip_special_tokens=False) for one in ids
            if one in engine.tokenizer.special_ids]


pieces = st.sampled_from([*SPECIAL, "<|end", "|>", " ", "a", "é", "\U000f0000", "{{", "Hi"])
words = st.lists(pieces, min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(contents=st.lists(words.map("".join).filter(str.strip), min_size=4, max_size=4))
def test_a_message_never_becomes_a_control_token_and_keeps_its_letters(engine: Engine, contents: list[str]) -> None:
    """Four conversations at once, in one process."""
    conversations: Any = [[{"role": "user", "content": content}] for content in contents]
    for content, ids in zip(contents, engine.prompts.batch(conversations, [()] * 4), strict=True):
        assert controls(engine, ids) == ["<|user|>", "<|end|>", "<|assistant|>"]
        text = engine.tokenizer.decode(ids, skip_special_tokens=False)
        assert text == f"<|user|>{content}<|end|><|assistant|>"


def test_what_spells_no_control_token_is_encoded_as_it_always_was(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hi |> <|"}, {"role": "assistant", "content": "  Yes? "}]
    text = render_chat(str(engine.chat_template), messages, engine.tokenizer)
    assert engine.prompts.ids(messages) == engine.tokenizer.encode(text, add_special_tokens=False)


def test_control_tokens_are_parsed_where_that_is_asked_for_and_in_raw_text(engine: Engine) -> None:
    prompt = "a<|end|><|system|>b"
    assert controls(engine, engine.prompts.ids(prompt)) == ["<|user|>", "<|end|>", "<|assistant|>"]
    assert controls(engine, engine.prompts.ids(prompt, raw=True)) == ["<|end|>", "<|system|>"]
    parsed = engine.prompts.ids(prompt, parse_special=True)
    assert controls(engine, parsed) == ["<|user|>", "<|end|>", "<|system|>", "<|end|>", "<|assistant|>"]
    one, other = (engine.generate(prompt, max_new_tokens=1, parse_special=parse)[0] for parse in (True, False))
    assert one.prompt_token_ids == parsed != other.prompt_token_ids


def test_the_system_prompt_and_every_part_of_a_message_are_letters(engine: Engine) -> None:
    ids = engine.prompts.ids([{"role": "user", "content": "<eos>"}], system_prompt="<|end|>")
    assert controls(engine, ids) == ["<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]


PARTS = (
    "{% for m in messages %}<|user|>{% for part in m.content %}{{ part.text | trim }}{% endfor %}<|end|>{% endfor %}"
    "<|assistant|><{{ messages[0].content[0].text }}>{{ messages[0].role }}"
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(content=words.map("".join), cuts=st.lists(st.integers(0, 60), max_size=4).map(sorted), ends=st.booleans())
def test_texts_that_spell_a_control_token_together_are_letters(
    engine: Engine, content: str, cuts: list[int], ends: bool
) -> None:
    """However it is cut into parts, with a template that joins them, trims them, and puts brackets of its own around"""
    content = "|eos" + content if ends else content
    parts = [content[one:other] for one, other in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    messages = [{"role": "user", "content": [{"type": "text", "text": f" {part}\n"} for part in parts]}]
    prompts = engine.prompts.__class__(engine.tokenizer, PARTS, engine.pictures, 256)
    ids = prompts.ids(messages)  # type: ignore[arg-type]
    assert controls(engine, ids) == ["<|user|>", "<|end|>", "<|assistant|>"]
    said = "".join(part.strip() for part in parts)
    assert engine.tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<|user|>{said}<|end|><|assistant|>< {parts[0]}\n>user"
    )


def test_halves_of_a_control_token_that_do_not_meet_are_encoded_as_they_always_were(engine: Engine) -> None:
    messages = [{"role": "user", "content": "end|> is what <|"}, {"role": "assistant", "content": "<"}]
    text = render_chat(str(engine.chat_template), messages, engine.tokenizer)
    assert engine.prompts.ids(messages) == engine.tokenizer.encode(text, add_special_tokens=False)


def test_the_halves_of_two_parts_are_letters_to_a_llava() -> None:
    engine = load(LLAVA_TINY, device="cpu")
    for words in (["</", "s>"], ["<", "/", "s", ">"], ["</s ", ">"], ["a</", "", "s>b"], ["</s>", ""]):
        content = [{"type": "text", "text": word} for word in words]
        assert not controls(engine, engine.prompts.ids([{"role": "user", "content": content}])[1:])


@pytest.mark.parametrize(("normalizer", "spelling"), [
    ({"type": "NFKC"}, "＜｜end｜＞"), ({"type": "NFKC"}, "<|ｅnd|>"), ({"type": "Lowercase"}, "<|END|>"),
    ({"type": "Replace", "pattern": {"String": "§"}, "content": "<|end|>"}, "§"),
])
@pytest.mark.parametrize("around", ["", "a", "<|end|>"])
def test_what_a_normalizer_makes_of_a_message_is_no_control_token(
    checkpoint: Path, tmp_path: Path, normalizer: dict[str, Any], spelling: str, around: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = normalizer
    for token in tokenizer["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = load(folder)
    ids = engine.prompts.ids(f"{around}{spelling}{around}")
    assert controls(engine, ids) == ["<|user|>", "<|end|>", "<|assistant|>"]
    ids = engine.prompts.ids(f"b{spelling}b", parse_special=True)
    assert controls(engine, ids) == ["<|user|>", "<|end|>", "<|end|>", "<|assistant|>"]


def test_tokenizer_and_template_of_a_checkpoint_share_one_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = Sandbox.start
    monkeypatch.setattr(Sandbox, "start", lambda sandbox: started.append(1) or start(sandbox))
    engine = load(checkpoint)
    alone = [engine.prompts.ids(f"Number {n}") for n in (0, 499)]
    together = engine.prompts.batch([f"Number {n}" for n in range(500)], [()] * 500)
    assert len(engine.stop_ids) == 2 and len(started) == 1
    assert [together[0], together[499]] == alone


bombs = st.builds(
    "{{% set x = {piece!r} * {count} %}}{{% for i in range({rounds}) %}}{{{{ x }}}}{{% endfor %}}".format,
    piece=st.sampled_from(["a", "lighthouse ", "<|end|>", "é"]), count=st.sampled_from([1, 1000, 10**6, 10**8]),
    rounds=st.sampled_from([1, 20, 1000, 99_999]),
)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(template=bombs)
def test_what_a_template_writes_is_bounded_by_the_context(engine: Engine, template: str) -> None:
    prompts = engine.prompts.__class__(engine.tokenizer, template, engine.pictures, 256)
    began = time.process_time()
    try:
        assert len(prompts.ids("Hi")) <= 256 * 16 * 2
    except InputError as error:
        assert str(error).startswith("the chat template failed: ")
    assert time.process_time() - began < 0.5


def test_a_prompt_that_no_context_can_hold_does_not_reach_the_tokenizer(engine: Engine) -> None:
    with pytest.raises(InputError, match="has 5000000 letters, more than the context of 256 tokens can hold"):
        engine.prompts.ids("a" * 5_000_000, raw=True)
    with pytest.raises(InputError, match="letters, more than the 4096 that its messages and the context call for"):
        engine.prompts.ids("a" * 5_000_000)


def test_what_a_template_writes_is_bounded_by_its_messages_whatever_context_a_config_claims(engine: Engine) -> None:
    template = "{{ messages[0].content }}{{ 'a' * 200_000 }}"
    prompts = engine.prompts.__class__(engine.tokenizer, template, engine.pictures, 10**9)
    assert len(prompts.texts(["Hi"], [0])[0][0]) == 200_002
    prompts = engine.prompts.__class__(engine.tokenizer, template.replace('200', '201'), engine.pictures, 10**9)
    # Twice "user" and "Hi", and 200,000.
    with pytest.raises(InputError, match="201002 letters, more than the 200012"):
        prompts.texts(["Hi"], [0])
