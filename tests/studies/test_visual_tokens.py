"""Visual tokens left out of prompts, against a slow version, in batches, with POP, in conversation, compiled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import tiny_qwen_vl
import torch
from builders import LLAVA_TINY, complete_checkpoint, generated, one_line_error, resolved
from PIL import Image
from slow_prefill import two_passes
from slow_visual_tokens import slow_logits
from tiny_llava import IMAGE, VARIANTS, load_ours, padded, pictures, prompt, reference_model
from tolerance import assert_same
from torch import Tensor

from models.cache import KVCache
from models.families.llava import LlavaForConditionalGeneration as OurLlava
from models.passes import ImageSpan, PictureRows, prefill_pass
from models.slots import AttentionPattern
from models.state import DecodeState
from popengine import generate
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.results import measured, report
from popengine.engine.run import next_logits
from popengine.evaluation.picture_tasks import picture_questions
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.settings import DENSE, PruningSettings
from popengine.studies.visual_tokens import DroppedTokens, most_diverse
from weights.errors import InputError

ATTENTION = replace(DENSE, visual_tokens=4, visual_tokens_layer=1)
DIVERSITY = replace(DENSE, visual_tokens=4, visual_tokens_by="diversity")
NEW = [5, 17, 40, 3]


@pytest.fixture(scope="module", params=["grouped", "as many key heads", "mistral", "mixtral"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    reference = reference_model(VARIANTS[request.param])
    directory = tmp_path_factory.mktemp("llava")
    reference.save_pretrained(directory)
    return reference, load_ours(directory)


def stretches(prompts: list[list[int]], length: int) -> list[ImageSpan]:
    """Where the pictures of a padded batch are."""
    longest, found = max(map(len, prompts)), []
    for sequence, ids in enumerate(prompts):
        row = 0
        while row < len(ids):
            if ids[row] == IMAGE:
                found.append(ImageSpan(sequence, longest - len(ids) + row, length))
            row += length if ids[row] == IMAGE else 1
    return found


def dropped(cache: KVCache) -> DroppedTokens:
    """The slots of the layers that drop tokens."""
    return next(one for one in cache.maps.values() if isinstance(one, DroppedTokens))


@torch.inference_mode()
def run(
    model: OurLlava, prompts: list[list[int]], count: int, settings: PruningSettings, new: list[int]
) -> tuple[Tensor, DecodeState]:
    """Logits [B, 1 + new, V] of prompts and of steps on these tokens. count: how many pictures there are"""
    tokens, real = padded(prompts)
    text = model.language_model
    pruning = resolved(text, settings)
    where = stretches(prompts, model.config.tokens_per_image)
    missing = pruning.dropped_rows(where, [len(ids) for ids in prompts])
    capacity = tokens.shape[1] + len(new)
    state = text.new_state(len(prompts), capacity, pruning, dropped=missing)
    x = model.embed(tokens, model.encode_images(pictures(count)) if count else None)
    logits = [text.prefill(x, state, None if real.all() else real, pictures=PictureRows(stretches=where))]
    logits += [next_logits(text, torch.full((len(prompts),), token), state) for token in new]
    return torch.stack(logits, dim=1), state


@pytest.mark.parametrize("settings", [ATTENTION, DIVERSITY])
@pytest.mark.parametrize("parts", [(3, 0, 6), (0, 4, 0, 5), (0, 0, 12)])
def test_what_stays_and_what_is_said_equal_the_slow_way(pair: tuple, settings: PruningSettings, parts: tuple) -> None:
    reference, ours = pair
    ids, count = prompt(ours, *parts), parts.count(0)
    logits, state = run(ours, [ids], count, settings, NEW)
    x = ours.embed(torch.tensor([ids]), ours.encode_images(pictures(count)))[0]
    rows = [range(one.first, one.first + one.length) for one in stretches([ids], ours.config.tokens_per_image)]
    after = settings.visual_tokens_layer if settings is ATTENTION else None
    wanted, stays = slow_logits(reference, x, rows, NEW, 4, after)
    assert_same(logits[0], wanted)
    cache = state.cache
    assert dropped(cache).tokens[0, : len(stays)].tolist() == stays and len(stays) == len(ids) - 5 * count
    for index, keys in enumerate(cache.keys):           # what is not kept has no slot, and none is empty at the end
        thin = index >= (after or 0)
        assert keys.shape[2] == len(ids) + len(NEW) - 5 * count * thin
        assert keys.abs().sum(dim=(0, 1, 3)).all()


@pytest.mark.parametrize("settings", [
    ATTENTION, DIVERSITY,
    PruningSettings.paper(ffn_ratio=0.4, visual_tokens="1/2", visual_tokens_layer=1, prefill="dense"),
])
def test_prompts_of_a_batch_are_thinned_each_for_itself(pair: tuple, settings: PruningSettings) -> None:
    """Pictures none, one and two, so that padding stands in the thin layers too."""
    _, ours = pair
    prompts = [prompt(ours, 2, 0, 5), prompt(ours, 9), prompt(ours, 1, 0, 0, 3)]
    together, state = run(ours, prompts, 3, settings, NEW if settings.ffn_ratio is None else [])
    features = pictures(3)
    for index, (ids, own) in enumerate(zip(prompts, (features[:1], features[:0], features[1:]), strict=True)):
        alone = own.clone()
        pruning = resolved(ours.language_model, settings)
        x = ours.embed(torch.tensor([ids]), ours.encode_images(alone) if len(alone) else None)
        single = ours.language_model.new_state(1, 64, pruning)
        where = PictureRows(stretches=stretches([ids], ours.config.tokens_per_image))
        with torch.inference_mode():
            logits = [ours.language_model.prefill(x, single, pictures=where)]
            logits += [
                ours.language_model.decode(torch.tensor([token]), single) for token in NEW[: together.shape[1] - 1]
            ]
        assert_same(together[index], torch.cat(logits))
    evidence = state.layers[-1].ffn
    if settings.ffn_ratio is not None and hasattr(evidence, "evidence"):
        left = sum(map(len, prompts)) - 3 * (9 - 4)
        assert evidence.evidence.tokens == left and state.layers[0].ffn.evidence.tokens == sum(map(len, prompts))
        assert state.schedule.tokens == left


def test_all_that_stays_changes_nothing(pair: tuple) -> None:
    _, ours = pair
    ids = prompt(ours, 3, 0, 6)
    dense, _ = run(ours, [ids], 1, DENSE, NEW)
    for settings in (replace(ATTENTION, visual_tokens=9), replace(DIVERSITY, visual_tokens=99)):
        whole, _ = run(ours, [ids], 1, settings, NEW)
        assert_same(whole, dense)


def test_of_equal_features_one_stays() -> None:
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0], [-1, 0.1]])
    assert sorted(most_diverse(features, 3).tolist()) == [0, 2, 4]


@torch.inference_mode()
def by_hand(engine: Engine, ids: list[int], images: list[Image.Image], gone: set[int], first: int) -> Tensor:
    """The dense network without a cache, rows taken out of everything by hand before the layer `first`: [1, rows, V]"""
    tokens, model = torch.tensor([ids]), engine.model
    x, _, found, _ = engine.pictures.embed(tokens, None, engine.pictures.given(images, [ids]))
    given = found or PictureRows()
    step = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, None, given)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    stay = [row for row in range(len(ids)) if row not in gone]
    added = list(given.added)
    for index, layer in enumerate(model.model.layers):
        if index == first:
            x, added = x[:, stay], [one[:, stay] for one in added]
            seen = {pattern: causal if mask is None else mask for pattern, mask in step.masks.items()}
            masks = {pattern: mask[..., stay, :][..., stay] for pattern, mask in seen.items()}
            turns = {pattern: (cos[:, stay], sin[:, stay]) for pattern, (cos, sin) in step.rotary.items()}
            step = replace(step, masks=masks, rotary=turns)
        x = layer(x, step)
        x = x + added[index] if index < len(added) else x
    return model.head(x)


FAMILIES: dict[str, tuple[Callable[..., Path], tuple[Any, ...], Callable[[int, int], Image.Image]]] = {
    "gemma3": (tiny_gemma.complete_gemma, (), tiny_gemma.picture),
    **{
        name: (tiny_qwen_vl.complete_qwen, (name,), tiny_qwen_vl.picture)
        for name in ("qwen2 window", "qwen2.5", "qwen3")
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_leave_out_the_same_way(family: str, tmp_path: Path) -> None:
    """Positions by row and column, features added after the first layers, pictures that see themselves both ways."""
    complete, arguments, draw = FAMILIES[family]
    engine = load(complete(tmp_path, *arguments), device="cpu", dtype="float32")
    images = [draw(32, 32), draw(24, 32)]
    ids = engine.prompts.ids("What is that?", images=images)
    for settings in (replace(ATTENTION, visual_tokens="1/2"), replace(DIVERSITY, visual_tokens="1/2")):
        run = engine.run([ids], 5, settings, ignore_eos=True, images=images)
        new = [token for (token,) in run]
        cache, first = run.state.cache, run.state.pruning.thin_from
        here = {int(place) for place in dropped(cache).tokens[0, : cache.filled - dropped(cache).missing]}
        gone = set(range(len(ids))) - here
        lengths = [one.length for one in run.given.stretches]
        assert len(gone) == sum(length - length // 2 for length in lengths) == run.missing > 0
        logits = by_hand(engine, ids + new[:-1], images, gone, first)
        assert logits[0, -len(new) :].argmax(dim=-1).tolist() == new
        state = engine.model.new_state(1, 256, run.state.pruning)
        x, _, found, _ = engine.pictures.embed(torch.tensor([ids]), None, run.given)
        with torch.inference_mode():
            mine = engine.model.prefill(x, state, pictures=found)
        assert_same(mine[0], logits[0, -len(new)])


@pytest.fixture(scope="module")
def llava() -> Engine:
    return load(LLAVA_TINY, device="cpu", dtype="float32")


SCENES = [question.picture() for question in picture_questions(3, 1)]


def test_a_prompt_without_pictures_is_as_ever(llava: Engine) -> None:
    for settings in (ATTENTION, DIVERSITY):
        text, dense = (
            llava.generate("What colour?", pruning=one, max_new_tokens=8, ignore_eos=True)[0]
            for one in (settings, DENSE)
        )
        assert text.token_ids == dense.token_ids
        assert report(text.statistics)["visual_tokens"] == {"of_pictures": 0, "left_out": 0, "from_layer": None}


def test_a_cache_goes_back_to_every_slot() -> None:
    stays = [0, 1, 6, 7, 8, 9]                                      # of ten rows, four of a picture are left out
    pattern = AttentionPattern(None, DroppedTokens)
    cache = KVCache([pattern] * 2, [True] * 2, 1, 1, 16, 0, 4, torch.float32, torch.device("cpu"))
    cache.start(10, None)
    dropped(cache).tokens[:, : len(stays)] = torch.tensor(stays)
    dropped(cache).drop(4, len(stays))
    for slots in range(10, 0, -1):
        cache.go_back(slots)
        before = [place for place in stays if place < slots]
        assert dropped(cache).missing == slots - len(before)
        assert dropped(cache).tokens[0, : len(before) + 2].tolist() == [*before, slots, slots + 1]


@pytest.mark.parametrize("settings", [ATTENTION, DIVERSITY])
def test_a_conversation_leaves_out_each_turns_pictures(llava: Engine, settings: PruningSettings) -> None:
    """By diversity that is the whole prompt afresh; by attention a turn's last token chooses among its own pictures."""
    conversation = llava.chat(pruning=settings, max_new_tokens=6)
    for turn, text in enumerate(("What do you see?", "And here?", "And now?")):
        said = conversation.say(text, SCENES[turn : turn + 1] if turn < 2 else [])
        cache = conversation.state.cache
        assert dropped(cache).missing == 32 * min(turn + 1, 2)
        assert dropped(cache).tokens[0, : cache.filled - dropped(cache).missing].tolist() == sorted(
            set(dropped(cache).tokens[0, : cache.filled - dropped(cache).missing].tolist())
        )
        if settings is DIVERSITY:
            afresh = llava.generate(
                conversation.messages[:-1], images=conversation.images, max_new_tokens=6, pruning=settings
            )[0]
            assert said.token_ids == afresh.token_ids
    filled = cache.filled
    with torch.inference_mode():
        cache.go_back(20)
    left, positions = 20 - dropped(cache).missing, dropped(cache).tokens[0]
    assert (positions[:left] < 20).all() and positions[left] == 20
    assert filled > 20 > dropped(cache).missing > 0


@torch.inference_mode()
def test_left_out_tokens_and_skipped_layers_compose(llava: Engine) -> None:
    """The boundary are the last rows of those that stay: two passes over them say the same."""
    settings = replace(DIVERSITY, prefill_skip="1/2", boundary_tokens=2)
    ids = llava.prompts.ids("What do you see?", images=SCENES[:1])
    run = llava.run([ids], 6, settings, ignore_eos=True, images=SCENES[:1])
    new = [token for (token,) in run]
    places = dropped(run.state.cache).tokens[0, : len(ids) - run.missing]
    x, *_ = llava.pictures.embed(torch.tensor([ids]), None, run.given)
    positions = PictureRows(positions=places[None], rope_delta=torch.tensor([[run.missing]]))
    logits, state = two_passes(
        llava.model, x[:, places], llava.resolve(DENSE), (2, 3), 2, capacity=128, pictures=positions
    )
    slow = [int(logits.argmax())]
    while len(slow) < 6:
        slow.append(int(next_logits(llava.model, torch.tensor(slow[-1:]), state).argmax()))
    assert slow == new


@pytest.mark.slow
def test_compiled_steps_go_on_from_what_stays(short_calls: None) -> None:
    """Capacities that are alike and that are not, a batch, pruned and dense."""
    plain, fast = load(LLAVA_TINY, device="cpu"), load(LLAVA_TINY, device="cpu", compile=True)
    assert fast.compiled is not None
    one, other = (fast.prompts.ids(text, images=SCENES[:1]) for text in ("What do you see?", "What do you see? " * 12))
    for settings in (ATTENTION, PruningSettings.paper(prune_ratio=0.4, visual_tokens=4, visual_tokens_layer=2)):
        for ids in (one, other):
            made = [
                list(engine.run([ids], 12, settings, ignore_eos=True, images=SCENES[:1])) for engine in (plain, fast)
            ]
            assert made[0] == made[1]
    assert generated(fast, [[5, 6, 7]], 6, ATTENTION) == generated(plain, [[5, 6, 7]], 6, DENSE)


def test_statistics_say_what_was_left_out(llava: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    run = llava.run(
        [llava.prompts.ids("What?", images=SCENES[:1])], 3, ATTENTION, ignore_eos=True, images=SCENES[:1]
    )
    list(run)
    assert report(measured(run))["visual_tokens"] == {"of_pictures": 36, "left_out": 32, "from_layer": 1}
    with pytest.raises(SystemExit):
        generate.main([
            "--ckpt", str(LLAVA_TINY), "--image", str(LLAVA_TINY / "example.png"), "--prompt", "What?", "-n", "2",
            "--visual-tokens", "1/3", "--paper", "--device", "cpu",
        ])
    assert "pictures  12 of 36 image tokens stay after layer 2, by attention" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--visual-tokens", "0"], "visual tokens must be a share between 0 and 1, a number of tokens or all, not 0"),
    (["--visual-tokens", "1.5"], "must be a share between 0 and 1, a number of tokens or all, not 1.5"),
    (["--visual-tokens", "some"], "visual tokens must be a number or a fraction like 1/3, not some"),
    (["--visual-tokens", "1/99"], "visual tokens 1/99 leaves none of the 36 tokens of a picture; raise it"),
    (["--visual-tokens", "4", "--visual-tokens-by", "chance"], "visual tokens by must be one of attention, diversity"),
    (["--visual-tokens", "4", "--visual-tokens-layer", "4"], "layer 4 leaves no layer after it: the model has 4"),
])
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = LLAVA_TINY / "example.png"
    assert said in one_line_error(
        generate.main, capsys, "--ckpt", LLAVA_TINY, "--image", picture, "--prompt", "What?", "--paper", *words
    )


def test_a_text_model_has_none_to_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = complete_checkpoint(tmp_path)
    words = ["--ckpt", folder, "--prompt", "x", "--visual-tokens", "1/2"]
    assert "visual tokens 1/2 is for pictures, and this checkpoint is a text model" in one_line_error(
        generate.main, capsys, *words
    )


def test_the_method_is_dense_but_for_the_prompt(llava: Engine) -> None:
    pruning = pruning_for("visual-tokens", Request(llava.model, replace(ATTENTION, prune_ratio=0.4)))
    assert (pruning.ratio, pruning.thin_from, pruning.visual_tokens(36)) == (0, 1, 4)
    with pytest.raises(InputError, match="give --visual-tokens"):
        pruning_for("visual-tokens", Request(llava.model, DENSE))
    with pytest.raises(InputError, match="keeps all tokens of pictures"):
        pruning_for("skip-no-keys", Request(llava.model, replace(ATTENTION, prefill_skip="1/3")))
