"""A conversation: what is kept from turn to turn is not computed again, and changes no answer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    LLAVA_TINY,
    MIXTRAL,
    MODELS,
    QWEN2_MOE,
    SETTINGS,
    complete_checkpoint,
    heads_partition,
    regions,
    resolved,
    saved_pair,
)
from tiny_gemma import complete_gemma
from tiny_qwen_vl import complete_qwen
from tolerance import assert_same

from models.blocks import FeedForwardBlock
from models.feed_forward import FeedForward
from models.pruning.evidence import Evidence
from popengine.engine.conversation import Conversation, common_prefix
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.results import Generation
from popengine.engine.run import next_logits
from popengine.images.vision import Vision
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

HALF = PruningSettings.paper(ffn_ratio=0.5, candidate_width=0.3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load(complete_checkpoint(tmp_path_factory.mktemp("talker"), max_position_embeddings=512))


def asked_afresh(conversation: Conversation) -> Generation:
    """The answer to the last turn as a run on the whole conversation gives it."""
    engine, spoken = conversation.engine, conversation.messages[:-1]
    return engine.generate(
        spoken, images=conversation.images, max_new_tokens=conversation.max_new_tokens, pruning=conversation.pruning
    )[0]


@pytest.mark.parametrize("name", [*MODELS, "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("settings", SETTINGS)
@torch.inference_mode()
def test_a_prompt_in_two_pieces_is_one_prompt(tmp_path: Path, name: str, settings: str) -> None:
    """Where the prompt is finished on all channels, so that the hidden states are the same: evidence and partition."""
    models = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
    _, model = saved_pair(tmp_path, models[name])
    pruning = resolved(model, replace(SETTINGS[settings], prefill="dense"))
    tokens = torch.randint(96, (1, 30), generator=torch.Generator().manual_seed(3))
    state, whole = (model.new_state(1, 64, pruning) for _ in range(2))
    expected = model.prefill(model.embed(tokens), whole)
    model.prefill(model.embed(tokens[:, :17]), state)
    for token in (5, 6, 7):                                         # said, and then taken back
        next_logits(model, torch.tensor([token]), state)
    logits = model.prefill(model.embed(tokens[:, 17:]), state, kept=17)
    assert (state.cache.filled, int(state.cache.length)) == (30, 30)
    assert_same(logits, expected)
    assert state.schedule.tokens == whole.schedule.tokens == 30
    for mine, theirs in zip(state.layers, whole.layers, strict=True):
        if isinstance(model.model.layers[0].mlp, FeedForward):
            assert_same(mine.ffn.evidence.squares, theirs.ffn.evidence.squares)
            assert regions(mine.ffn.partition) == regions(theirs.ffn.partition)
        else:
            assert mine.ffn.prompt_tokens == theirs.ffn.prompt_tokens
        assert torch.equal(heads_partition(mine).order, heads_partition(theirs).order)
    step = torch.tensor([11])
    assert_same(next_logits(model, step, state), next_logits(model, step, whole))


@torch.inference_mode()
def test_later_pieces_skip_layers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = saved_pair(tmp_path, MODELS["grouped_query"])
    state = model.new_state(1, 64, resolved(model, replace(HALF, prefill_skip="1/3", boundary_tokens=4)))
    tokens = torch.randint(96, (1, 30), generator=torch.Generator().manual_seed(3))
    model.prefill(model.embed(tokens[:, :17]), state)
    rows, add = [], Evidence.add
    monkeypatch.setattr(Evidence, "add", lambda own, h, *rest: (rows.append(h.shape[1]), add(own, h, *rest))[1])
    model.prefill(model.embed(tokens[:, 17:]), state, kept=17)
    assert rows == [13, 13, 4]                                      # networks of three layers
    assert state.schedule.tokens == 4 + 4
    assert all(layer.cache.keys[:, :, :30].abs().sum(dim=(0, 1, 3)).all() for layer in state.layers)


@torch.inference_mode()
def test_an_expert_that_a_later_turn_reaches_is_cut(tmp_path: Path) -> None:
    _, model = saved_pair(tmp_path, MIXTRAL)
    state = model.new_state(1, 64, resolved(model, replace(HALF, unseen_experts="dense")))
    tokens = torch.randint(96, (1, 30), generator=torch.Generator().manual_seed(3))
    model.prefill(model.embed(tokens[:, :1]), state)
    for token in tokens[0, 1:16]:
        next_logits(model, token[None], state)
    layers = [layer.ffn for layer in state.layers]
    assert any(one is not None and not one.sizes.prunes for layer in layers for one in layer.active)
    model.prefill(model.embed(tokens[:, 16:]), state, kept=16)
    for layer in layers:
        reached = [one for one, seen in zip(layer.active, layer.prompt_tokens, strict=True) if seen]
        assert len(reached) > 2
        assert all(one.sizes.prunes and one.evidence.tokens > 0 for one in reached)


@pytest.mark.parametrize("settings", [DENSE, replace(HALF, prefill="dense")])
@torch.inference_mode()
def test_a_piece_of_one_token_is_the_last_token_of_a_prompt(engine: Engine, settings: PruningSettings) -> None:
    """Its slot and position are taken before the cache counts it."""
    model, tokens = engine.model, torch.arange(3, 12)[None]
    whole, pieces = (model.new_state(1, 64, resolved(model, settings)) for _ in range(2))
    wanted = model.prefill(model.embed(tokens), whole)
    model.prefill(model.embed(tokens[:, :-1]), pieces)
    assert_same(model.prefill(model.embed(tokens[:, -1:]), pieces, kept=8), wanted)
    for token in (5, 7):
        one, other = (next_logits(model, torch.tensor([token]), state) for state in (pieces, whole))
        assert_same(one, other)


def test_later_turns_answer_as_a_fresh_run_does(engine: Engine) -> None:
    conversation = engine.chat("Be brief.", pruning=DENSE, max_new_tokens=24)
    for turn, text in enumerate(("Hello there", "And now?", "What else is there to say?")):
        said = conversation.say(text)
        assert said.token_ids == asked_afresh(conversation).token_ids
        assert said.statistics.kept_tokens > 0 or turn == 0
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]


def test_only_what_is_new_is_computed(engine: Engine) -> None:
    conversation = engine.chat(pruning=HALF, max_new_tokens=20)
    first = conversation.say("Hello there")
    rows = []
    prefill = engine.model.prefill
    engine.model.prefill = lambda x, *rest, **named: rows.append(x.shape[1]) or prefill(x, *rest, **named)
    try:
        second = conversation.say("And now?")
    finally:
        engine.model.prefill = prefill
    said = first.prompt_token_ids + first.token_ids
    kept = common_prefix(said[:-1], second.prompt_token_ids)        # the last token was chosen and not yet run
    assert kept >= len(first.prompt_token_ids)
    assert rows == [len(second.prompt_token_ids) - kept]
    assert second.statistics.kept_tokens == kept
    assert second.statistics.evidence_tokens == len(first.prompt_token_ids) + rows[0]


def test_evidence_goes_on_and_a_new_beginning_forgets_it(engine: Engine) -> None:
    conversation = engine.chat(pruning=replace(HALF, dense_every=2, redraw_every=4), max_new_tokens=12)
    first = conversation.say("Hello there")
    steps = first.statistics.dense_steps
    assert steps == 5
    second = conversation.say("And now?")
    assert second.statistics.dense_steps > steps
    assert second.statistics.evidence_tokens == (
        len(second.prompt_token_ids) - second.statistics.kept_tokens + len(first.prompt_token_ids)
        + second.statistics.dense_steps
    )
    conversation.begin_anew()
    again = conversation.say("Hello there")
    assert again.token_ids == first.token_ids
    assert again.statistics.evidence_tokens == first.statistics.evidence_tokens


def test_an_answer_that_reads_otherwise_is_taken_back(engine: Engine) -> None:
    """As where a template trims: the cache goes back to where the texts part."""
    conversation = engine.chat(pruning=DENSE, max_new_tokens=24)
    conversation.say("Hello there")
    conversation.messages[-1]["content"] = "something else altogether"
    said = conversation.say("And now?")
    assert said.token_ids == asked_afresh(conversation).token_ids
    assert said.statistics.kept_tokens < len(said.prompt_token_ids) - len("something else altogether")


def test_an_answer_that_is_ended_early_is_what_was_said(engine: Engine) -> None:
    conversation = engine.chat(pruning=DENSE, max_new_tokens=30)
    stream = conversation.stream("Hello there")
    said = [next(stream).token_id for _ in range(5)]
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": engine.tokenizer.decode(said)}
    assert conversation.state is not None
    after = conversation.say("And now?")
    assert after.statistics.kept_tokens > 0
    assert after.token_ids == asked_afresh(conversation).token_ids
    conversation.stream("never listened to").close()
    assert len(conversation.messages) == 4


@pytest.mark.parametrize("settings", [DENSE, HALF], ids=["dense", "half"])
def test_a_step_that_is_cut_in_two_is_not_gone_on_with(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, settings: PruningSettings
) -> None:
    conversation = engine.chat(pruning=settings, max_new_tokens=30)
    stream = conversation.stream("Hello there")
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(FeedForwardBlock, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert conversation.state is None
    after = conversation.say("And now?")
    assert after.statistics.kept_tokens == 0
    assert after.token_ids == asked_afresh(conversation).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(FeedForwardBlock, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.say("Not heard")
    assert len(conversation.messages) == 4


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_settings_may_change_between_turns(engine: Engine) -> None:
    conversation = engine.chat(pruning=HALF, max_new_tokens=16)
    conversation.say("Hello there")
    conversation.pruning = DENSE
    said = conversation.say("And now?")
    assert said.statistics.kept_tokens == 0
    assert said.token_ids == asked_afresh(conversation).token_ids


def test_a_full_context_is_said_and_an_answer_ends_with_it(tmp_path: Path) -> None:
    engine = load(complete_checkpoint(tmp_path, max_position_embeddings=96))
    conversation = engine.chat(pruning=DENSE, max_new_tokens=60)
    said = conversation.say("x" * 60)
    assert len(said.prompt_token_ids) + len(said.token_ids) == 96 or said.finish_reason == "stop"
    with pytest.raises(InputError, match=r"context is full: .* tokens, and the context holds 96"):
        conversation.say("y" * 60)
    assert len(conversation.messages) == 2


def test_a_saved_conversation_goes_on(engine: Engine, tmp_path: Path) -> None:
    conversation = engine.chat("Be brief.", pruning=DENSE, max_new_tokens=16)
    conversation.say("Hello there")
    conversation.save(tmp_path / "kept.json")
    wanted = conversation.say("And now?")
    another = engine.chat(pruning=DENSE, max_new_tokens=16)
    another.say("Something else")
    another.load(tmp_path / "kept.json")
    assert another.say("And now?").token_ids == wanted.token_ids
    assert another.messages == conversation.messages
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


@pytest.mark.parametrize(("change", "named"), [
    (lambda text: "{", "is not valid JSON"),
    (lambda text: text.replace("popengine conversation 1", "popengine conversation 9"), "not a conversation"),
    (lambda text: text.replace('"model": "', '"model": "0'), "another model"),
    (lambda text: text.replace('"user"', '"nobody"'), "messages"),
    (lambda text: text.replace('"Hello there"', '[{"type": "text"}]'), "messages"),
    (lambda text: text.replace('"images": []', '"images": [1]'), "images"),
])
def test_what_is_no_conversation_of_this_model_is_refused(
    engine: Engine, tmp_path: Path, change: Callable[[str], str], named: str
) -> None:
    conversation = engine.chat(pruning=DENSE, max_new_tokens=4)
    conversation.say("Hello there")
    path = tmp_path / "kept.json"
    conversation.save(path)
    before = list(conversation.messages)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=named):
        conversation.load(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        conversation.load(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot be written"):
        conversation.save(tmp_path / "no" / "folder.json")
    assert conversation.messages == before


def test_a_picture_s_name_may_be_no_text(engine: Engine, tmp_path: Path) -> None:
    conversation = engine.chat(pruning=DENSE)
    conversation.images = [str(tmp_path / "caf\udce9.png")]         # a byte that is no UTF-8, as Python has it
    conversation.save(tmp_path / "kept.json")
    again = engine.chat(pruning=DENSE)
    again.load(tmp_path / "kept.json")
    assert again.images == conversation.images


def test_nothing_said_is_refused_and_so_is_a_model_without_a_template(engine: Engine, tmp_path: Path) -> None:
    conversation = engine.chat()
    for text in ("", "  \n", "bad \udce9 byte"):
        with pytest.raises(InputError):
            conversation.say(text)
    engine.prompts.chat_template, engine.chat_template, before = None, None, engine.chat_template
    try:
        with pytest.raises(InputError, match="no chat template"):
            engine.chat()
    finally:
        engine.prompts.chat_template = engine.chat_template = before


def test_pictures_may_come_at_any_turn(tmp_path: Path) -> None:
    engine = load(LLAVA_TINY, dtype="float32")
    picture = LLAVA_TINY / "example.png"
    conversation = engine.chat(pruning=DENSE, max_new_tokens=24)
    for text, images in (("Hello", []), ("What do you see?", [picture]), ("And here?", [picture]), ("Really?", [])):
        said = conversation.say(text, images)
        assert said.token_ids == asked_afresh(conversation).token_ids
    conversation.save(tmp_path / "kept.json")
    again = engine.chat(pruning=DENSE, max_new_tokens=24)
    again.load(tmp_path / "kept.json")
    assert again.say("Well?").token_ids == conversation.say("Well?").token_ids


@pytest.mark.parametrize("family", ["llava", "qwen2", "gemma"])
def test_a_mark_of_pictures_that_the_model_spells_is_no_place_of_one(family: str, tmp_path: Path) -> None:
    makers = {"qwen2": partial(complete_qwen, variant="qwen2"), "gemma": complete_gemma}
    engine = load(makers[family](tmp_path) if family in makers else LLAVA_TINY, dtype="float32")
    assert isinstance(engine.pictures, Vision)
    image, ids = LLAVA_TINY / "example.png", engine.prompts.ids
    answer = f"I write {engine.pictures.mark} for it."
    said = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}]
    for asked, images in ("And?", []), ([{"type": "image"}, {"type": "text", "text": "And?"}], [image]):
        tokens = ids([*said, {"role": "user", "content": asked}], images=images)
        assert engine.pictures.image_tokens([tokens]) == sum(rows * columns for rows, columns in
                                                             map(engine.pictures.grid, images))
        assert answer in engine.tokenizer.decode(tokens, skip_special_tokens=False)
    conversation = engine.chat(pruning=DENSE, max_new_tokens=4)
    conversation.messages = said
    assert conversation.say("And?").token_ids
    # An image part is a place whoever has it, and so is what a user writes.
    of_parts = [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "See."}]}]
    assert engine.pictures.image_tokens([ids([said[0], *of_parts, said[0]], images=[image])])
    with pytest.raises(InputError, match="the prompt has 1 image token"):
        ids([{"role": "user", "content": f"{engine.pictures.mark} what?"}])


def test_smollm2_answers_a_second_turn_as_a_fresh_run_does(default_checkpoint_path: Path) -> None:
    engine = load(default_checkpoint_path, dtype="float32")
    conversation = engine.chat(pruning=DENSE, max_new_tokens=12)
    for text in ("Name three trees.", "Which of them grows tallest?"):
        said = conversation.say(text)
        assert said.token_ids == asked_afresh(conversation).token_ids
    assert said.statistics.kept_tokens > len(said.prompt_token_ids) / 2
