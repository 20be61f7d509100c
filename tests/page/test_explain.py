"""The page that explains a run: what is recorded of it, and the page itself in a real browser."""

import base64
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_chromium
from builders import LLAVA_TINY, MIXTRAL_TINY, REPOSITORY, exit_status, generated, one_line_error
from PIL import Image
from tiny_gemma import complete_gemma
from tiny_qwen_vl import complete_qwen, picture
from tolerance import assert_same, tolerated

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.run import next_logits
from popengine.engine.sampling import Sampling
from popengine.evaluation.scoring import Window
from popengine.evaluation.studies import picks, rank_drift
from popengine.explain import main
from popengine.images.vision import Vision
from popengine.page import page as page_file
from popengine.page.explained_run import embedded, explained_run, first_difference, picture_of
from popengine.page.page import MOST_BYTES, packed, page
from popengine.studies.settings import DENSE, PruningSettings

POP = PruningSettings.paper(ffn_ratio=0.5, candidate_width=0.4)
HOSTILE = "</script><img src=x onerror=\"document.title='seen'\"><!--<script>"

status, error = partial(exit_status, main), partial(one_line_error, main)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint, dtype="float32")


def recorded(engine: Engine, pruning: PruningSettings, text: str = "Seven ships", count: int = 12) -> dict[str, Any]:
    ids = engine.prompts.ids(text, raw=True)
    return explained_run(engine, ids, count, pruning, Sampling(), ignore_eos=True)


@pytest.fixture(scope="module")
def found(engine: Engine) -> dict[str, Any]:
    return recorded(engine, POP)


def bits(packed: dict[str, Any], columns: int) -> torch.Tensor:
    """bool [frames, columns]"""
    values = torch.frombuffer(bytearray(base64.b64decode(packed["bits"])), dtype=torch.uint8)
    rows = values.view(len(packed["frames"]), -1)
    return ((rows[:, :, None] >> torch.arange(8)) & 1).flatten(1)[:, :columns].bool()


def order_of(network: dict[str, Any], which: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(network["drawings"][which]["order"])), dtype=torch.int32).long()


def test_the_run_is_the_engines_and_the_dense_model_is_the_dense_models(engine: Engine, found: dict[str, Any]) -> None:
    prompt = engine.prompts.ids("Seven ships", raw=True)
    new = [token for (token,) in generated(engine, [prompt], 12, POP)]
    assert [one["token"] for one in found["frames"]] == new
    assert found["replayed_alike"] == len(new)
    assert "".join(one["text"] for one in found["frames"]) == engine.tokenizer.decode(new)
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    probabilities = logits.softmax(dim=-1)                                          # [F, V]
    for index, one in enumerate(found["frames"]):
        assert one["dense_probability"] == pytest.approx(float(probabilities[index, new[index]]), rel=tolerated(10))
        assert one["agrees"] == (int(probabilities[index].argmax()) == new[index])
    assert found["frames"][3]["bytes"] < found["frames"][3]["dense_bytes"]


def test_picks_and_ranks_are_those_of_the_studies(engine: Engine, found: dict[str, Any]) -> None:
    prompt = engine.prompts.ids("Seven ships", raw=True)
    new = [one["token"] for one in found["frames"]]
    dense_prefill = PruningSettings.paper(ffn_ratio=0.5, candidate_width=0.4, prefill="dense")
    again, window = recorded(engine, dense_prefill), Window(prompt, new)
    drift = rank_drift(engine.model, Window(prompt, [one["token"] for one in again["frames"]]))
    for index, (seen, layer, dense) in enumerate(
        zip(picks(engine, window, engine.resolve(POP)), found["layers"], again["layers"], strict=True)
    ):
        (network,) = layer["networks"]
        order = order_of(network)
        picked = bits(network["picked"], network["candidate"])                      # [F - 1, C], by column
        candidate = order[network["retained"] : network["retained"] + network["candidate"]]
        by_channel = torch.zeros(network["channels"], dtype=torch.int64).index_add(0, candidate, picked.sum(dim=0))
        assert torch.equal(by_channel[seen.partition.candidate], seen.picked)
        assert (picked.sum(dim=1) == network["picks"]).all()
        assert sorted(order[: network["retained"]].tolist()) == seen.partition.retained.tolist()
        # With a dense prefill the partition's scores are the dense model's: first layer to last, ranks move alike.
        moved = torch.tensor([*dense["networks"][0]["moved"].values()])
        assert_same(moved, drift.rank_difference[index, : len(moved)])


def test_what_dense_wants_is_what_it_ranks_highest(engine: Engine, found: dict[str, Any]) -> None:
    for layer in found["layers"]:
        (network,) = layer["networks"]
        wanted = bits(network["wanted"], network["channels"])
        assert (wanted.sum(dim=1) == network["retained"] + network["picks"]).all()
        for ours, least in network["left_out"].values():
            assert 0 < least <= ours < 1
        assert list(network["changed"]) == list(network["moved"])[1:]


def test_the_dense_model_answers_beside_it(engine: Engine, found: dict[str, Any]) -> None:
    prompt = engine.prompts.ids("Seven ships", raw=True)
    alone = [token for (token,) in generated(engine, [prompt], 12, DENSE)]
    answer, new = found["dense_answer"], [one["token"] for one in found["frames"]]
    assert [one["token"] for one in answer["tokens"]] == alone and answer["finish_reason"] == "length"
    assert "".join(one["text"] for one in answer["tokens"]) == engine.tokenizer.decode(alone)
    place = answer["first_difference"]
    assert new[:place] == alone[:place] and new[place] != alone[place]
    assert found["frames"][place]["agrees"] is False and all(one["agrees"] for one in found["frames"][:place])
    assert recorded(engine, DENSE)["dense_answer"]["first_difference"] is None


@pytest.mark.parametrize(("one", "other", "place"), [
    ([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1], 1), ([4], [1], 0),
])
def test_the_first_difference_is_a_token_or_an_end(one: list[int], other: list[int], place: int | None) -> None:
    assert first_difference(one, other) == place


def test_dense_steps_and_redraws_are_told(engine: Engine) -> None:
    found = recorded(engine, PruningSettings.paper(ffn_ratio=0.5, dense_every=3, redraw_every=6))
    dense = [index for index, one in enumerate(found["frames"]) if one["dense_step"]]
    assert dense == [3, 6, 9] and [one["redrawn"] for one in found["frames"]].index(True) == 6
    (network,) = found["layers"][0]["networks"]
    assert [one["frame"] for one in network["drawings"]] == [0, 6]
    assert not {*dense} & {*network["picked"]["frames"]} and not {*dense} & {*network["wanted"]["frames"]}
    # Packed matrices take no product of no rows, which a dense first step leaves.
    packed = load(engine.folder, weights="int8")
    assert recorded(packed, PruningSettings.paper(dense_every=1), count=3)["frames"][1]["dense_step"]
    late = recorded(engine, PruningSettings.paper(ffn_ratio=0.5, min_evidence=15))
    assert late["layers"][0]["networks"][0]["drawings"][0]["frame"] == 15 - len(late["prompt"])


@pytest.mark.parametrize(
    "pruning", [DENSE, PruningSettings.paper(ffn_ratio=0.5, candidate_width=0),
                PruningSettings.paper(rule="all-channels"), PruningSettings.paper(rule="up", retained_share=0.3),
                PruningSettings.paper(prefill_skip="1/3", boundary_tokens=2)],
    ids=["dense", "frozen", "all-channels", "up", "skipping"],
)
def test_every_rule_has_a_record(engine: Engine, pruning: PruningSettings) -> None:
    found = recorded(engine, pruning, count=4)
    (network,) = found["layers"][-1]["networks"]
    assert bool(network["drawings"]) == (found["statistics"]["pruning"]["ratio"] > 0)
    assert found["layers"][-1]["skipped"] == (pruning.prefill_skip != 0)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_pictures_of_any_size_have_their_own_grid(variant: str, tmp_path: Path) -> None:
    engine = load(complete_qwen(tmp_path, variant), dtype="float32")
    images = [picture(40, 24), picture(16, 32)]
    ids = engine.prompts.ids("What?", images=images)
    found = explained_run(engine, ids, 6, POP, Sampling(), images, ignore_eos=True)
    assert [(one["rows"], one["columns"]) for one in found["pictures"]] == [(3, 5), (4, 2)]
    assert sum(one["image"] for one in found["prompt"]) == 3 * 5 + 4 * 2
    assert found["replayed_alike"] == 6
    new = [one["token"] for one in found["frames"]]
    with torch.inference_mode():
        text = engine.pictures.embed(torch.tensor([ids + new]), None, engine.pictures.given(images))
        logits = engine.model.forward_embedded(text.x, None, text.pictures)[0, len(ids) - 1 : -1]
    assert [one["agrees"] for one in found["frames"]] == (logits.argmax(dim=-1) == torch.tensor(new)).tolist()


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma", "llava"])
def test_an_image_token_that_the_model_writes_is_an_ordinary_one(variant: str, tmp_path: Path) -> None:
    made = complete_gemma if variant == "gemma" else partial(complete_qwen, variant=variant)
    engine = load(LLAVA_TINY if variant == "llava" else made(tmp_path), dtype="float32")
    assert isinstance(engine.pictures, Vision)
    images, mark = [picture(40, 24)], engine.pictures.image_token_id
    ids = engine.prompts.ids("What?", images=images)
    engine.model.check_ids([mark])
    with torch.inference_mode():
        run = engine.run([ids], 5, POP, Sampling(), True, images)
        next(iter(run))
        text = embedded(engine, run, [3, mark, mark, 5])
        at_once = engine.model.forward_embedded(text.x, None, text.pictures)[0, len(ids) :]       # [4, V]
        prompt, state = embedded(engine, run, []), engine.new_state(1, len(ids) + 4, engine.resolve(DENSE))
        engine.model.prefill(prompt.x, state, pictures=prompt.pictures)
        steps = [next_logits(engine.model, torch.tensor([token]), state)[0] for token in (3, mark, mark, 5)]
    assert_same(at_once, torch.stack(steps))


def test_a_run_in_which_the_model_writes_one_is_recorded(tmp_path: Path) -> None:
    engine, images = load(complete_qwen(tmp_path, "qwen3"), dtype="float32"), [picture(40, 24)]
    assert isinstance(engine.pictures, Vision)
    ids = engine.prompts.ids("What?", images=images)
    found = explained_run(engine, ids, 200, POP, Sampling(temperature=1e4, seed=0), images, ignore_eos=True)
    assert engine.pictures.image_token_id in [one["token"] for one in found["frames"][:-1]]
    assert sum(one["image"] for one in found["prompt"]) == 3 * 5
    assert [*found["layers"][0]["networks"][0]["moved"]] == [*range(1, 200)]


def test_layers_beyond_the_room_are_left_out(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, out = found | {"model": checkpoint.name}, tmp_path / "page.html"
    bare = len(page(found | {"layers": []}).encode())
    one_layer = len(page(found | {"layers": found["layers"][:1]}).encode()) - bare
    assert one_layer == pytest.approx(len(page(found | {"layers": found["layers"][2:]}).encode()) - bare, rel=0.05)
    words = ("--ckpt", checkpoint, "--prompt", "Seven ships", "--raw", "--paper", "--ffn-ratio", 0.5,
             "--candidate-width", 0.4, "--ignore-eos", "--out", out)
    room = int(bare + 2.2 * one_layer)
    monkeypatch.setattr(page_file, "MOST_BYTES", room)
    assert status(*words, "-n", 12) == 0
    assert "1 of 3 layers do not fit and are left out" in capsys.readouterr().out
    assert room - one_layer < out.stat().st_size <= room
    monkeypatch.setattr(page_file, "MOST_BYTES", room := int(bare + 0.5 * one_layer))
    told = re.search(r"MB is the most: at most (\d+) of the 12 new tokens would fit", error(capsys, *words, "-n", 12))
    assert told is not None and 1 <= int(told[1]) < 12
    assert status(*words, "-n", told[1]) == 0 and out.stat().st_size <= room
    monkeypatch.setattr(page_file, "MOST_BYTES", 10)
    assert "a shorter prompt or a narrower model would fit" in error(capsys, *words, "-n", 12)


def test_pictures_beyond_the_room_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, one = tmp_path / "page.html", ("--image", LLAVA_TINY / "example.png")
    words = ("--ckpt", LLAVA_TINY, "--prompt", "Red?", "--paper", "-n", 2, "--ignore-eos", "--out", out)
    assert status(*words, *one, "--json") == 0
    run = json.loads(capsys.readouterr().out)
    others, picture = (len(json.dumps([*map(packed, some)])) for some in (run["layers"][1:], run["pictures"]))
    room = out.stat().st_size - others + picture // 2
    monkeypatch.setattr(page_file, "MOST_BYTES", room)
    with Image.open(LLAVA_TINY / "example.png") as example:         # the same picture twice would compress to one
        example.convert("RGB").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    two = (*one, "--image", tmp_path / "turned.png")
    assert "at most 1 of the 2 pictures would fit" in error(capsys, *words, *two)
    assert status(*words, *one) == 0 and out.stat().st_size <= room


def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--ckpt", checkpoint, "--prompt", "Seven", "--paper")
    assert "cannot be written" in error(capsys, *words, "--out", tmp_path / "none" / "page.html")
    assert "is not a file" in error(capsys, *words, "--out", tmp_path)
    # Before any work is done: this checkpoint is none.
    assert "cannot be written" in error(
        capsys, "--ckpt", tmp_path / "no", "--prompt", "x", "--out", tmp_path / "none" / "page.html"
    )
    assert "at least 1, not 0" in error(capsys, *words, "-n", 0, "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_text_of_prompt_and_model_is_no_markup(found: dict[str, Any]) -> None:
    plain = page(found | {"model": "a"})
    hostile = page(found | {"model": HOSTILE + "%SCRIPT%"})
    assert hostile.count("<") == plain.count("<") and HOSTILE not in hostile
    first, *layers = json.loads(re.search(r'type="application/json">(.*)</script>', hostile)[1])  # type: ignore[index]
    read = [json.loads(zlib.decompress(base64.b64decode(one))) for one in (first, *layers)]
    assert read[0]["model"] == HOSTILE + "%SCRIPT%" and read[1:] == json.loads(json.dumps(found["layers"]))


# In a browser.

NO_BROWSER = "no Chromium to look at the page with: apt-get install chromium"


@pytest.fixture
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip(NO_BROWSER)
    with Browser(1200, 900) as opened:
        yield opened


def made(folder: Path, capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[str, dict[str, Any]]:
    """The address of a page, and the JSON of the run that it is of."""
    out = folder / "page.html"
    capsys.readouterr()
    assert status(*words, "--out", out, "--json") == 0
    return out.as_uri(), json.loads(capsys.readouterr().out)


PICTURE = "document.getElementById('map').toDataURL()"


def text_of(browser: Browser, name: str) -> str:
    return str(browser.value(f"document.getElementById('{name}').textContent"))


def test_the_page_shows_the_runs_numbers_and_fetches_nothing(
    browser: Browser, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, run = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", HOSTILE, "-n", 9, "--ignore-eos", "--paper",
        "--ffn-ratio", 0.5,
    )
    browser.open(address + "#3")
    assert json.loads(browser.value("JSON.stringify(run)")) == run
    seen = {}
    for index in (2, 3, 8):
        browser.value(f"show({index})")
        seen[index] = browser.value(PICTURE)
        one = run["frames"][index]
        assert text_of(browser, "probability") == f"{100 * one['probability']:.1f} %"
        assert text_of(browser, "dense-probability") == f"{100 * one['dense_probability']:.1f} %"
        assert text_of(browser, "ms") == f"{one['ms']:.1f} ms"
        assert text_of(browser, "bytes") == f"{one['bytes'] / 1e6:.1f} MB"
        assert (text_of(browser, "agrees") == "the same token") == one["agrees"]
        rows = browser.value("[...document.getElementById('table').rows].slice(1).map(row => row.cells[1].textContent)")
        moved = [layer["networks"][0]["moved"][str(index)] for layer in run["layers"]]
        assert [float(text) for text in rows] == pytest.approx(moved, abs=0.00051)     # three decimals
    assert len({*seen.values()}) == 3
    shown = browser.value("document.getElementById('prompt').textContent")
    assert HOSTILE in shown and browser.value("document.images.length + document.scripts.length") == 2
    assert browser.value("document.title").startswith("One run, explained")
    assert browser.problems() == []
    assert browser.requests() == [address + "#3"] or browser.requests() == [address]


def test_keys_pointer_and_play(
    browser: Browser, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, run = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven", "-n", 8, "--ignore-eos", "--paper",
        "--ffn-ratio", 0.5,
    )
    browser.open(address)
    browser.value("document.getElementById('map').focus()")
    for key, position in (("Home", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 8)):
        browser.press(key)
        assert text_of(browser, "position") == f"{position} / 8"
    for key, layer in (("ArrowUp", 0), ("ArrowUp", 0), ("ArrowDown", 1)):
        browser.press(key)
        assert text_of(browser, "layer-name").startswith(f"layer {layer} ")
    browser.value("document.activeElement.blur()")                      # wherever the arrows work, the others do
    on_page = [("Home", 1, 1), ("End", 8, 1), ("ArrowUp", 8, 0), ("ArrowLeft", 7, 0), ("ArrowDown", 7, 1)]
    at_theme = [("Home", 1, 1), ("ArrowUp", 1, 0), ("ArrowDown", 1, 1)]
    in_fields = [(key, 1, 1) for key in ("End", "ArrowUp", "ArrowRight")]
    for place, pressed in (("body", on_page), ("#theme", at_theme), ("#speed", in_fields), ("#column", in_fields)):
        browser.value(f"document.querySelector('{place}').focus()")
        for key, position, layer in pressed:
            browser.press(key)
            assert text_of(browser, "position") == f"{position} / 8", (place, key)
            assert text_of(browser, "layer-name").startswith(f"layer {layer} "), (place, key)
    browser.value("document.getElementById('map').focus()")
    browser.press("End")
    (network,) = run["layers"][1]["networks"]
    browser.value("document.getElementById('column').value = 4")
    browser.value("document.getElementById('column').dispatchEvent(new Event('input'))")
    assert f"layer 1, channel {order_of(network)[4]}: score " in text_of(browser, "spot")
    assert ", rank 5 of 80; retained; dense " in text_of(browser, "spot")
    browser.value("document.getElementById('speed').value = '30'")
    browser.press(" ")
    assert browser.value("new Promise(done => setTimeout(() => done(frame), 1500))") == 7
    assert text_of(browser, "play") == "▶"
    light = browser.value(PICTURE)
    browser.value("document.getElementById('theme').click()")
    assert browser.value(PICTURE) != light and browser.problems() == []


def pointed(browser: Browser, kind: str, x: float, y: float) -> None:
    """A finger on a place of the window: down and up again (tap), or along a line (drag)."""
    if kind == "tap":
        browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    else:
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_a_finger_pins_tokens_and_channels(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_chromium() is None:
        pytest.skip(NO_BROWSER)
    address, run = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven", "-n", 8, "--ignore-eos", "--paper",
        "--ffn-ratio", 0.5,
    )
    place = """(() => { const one = document.querySelector('%s'); one.scrollIntoView({block: 'center'});
                const box = one.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"""
    with Browser(360, 740) as browser:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        browser.open(address)
        at = next(index for index, one in enumerate(run["frames"]) if one["text"].strip() and index > 2)
        x, y, wide, high = browser.value(place % f'#answer span[data-at="{at}"]')
        pointed(browser, "tap", x + wide / 2, y + high / 2)
        assert text_of(browser, "position") == f"{at + 1} / 8"
        assert text_of(browser, "hovered").startswith(f"Token {at + 1} ")
        x, y, wide, high = browser.value(place % "#map")
        top, row = browser.value("[layout.top, layout.high]")
        pointed(browser, "tap", x + 60, y + top + 1.5 * row)
        spot = text_of(browser, "spot")
        assert spot.startswith("Pinned: layer 1, channel ") and browser.value("pinned && selected === 1")
        pointed(browser, "mouse", x + 120, y + top + 2.5 * row)                 # a pinned channel stays
        assert text_of(browser, "spot") == spot
        pointed(browser, "tap", x + 60, y + top + 1.5 * row)                    # and is freed
        assert browser.value("pinned") is False
        pointed(browser, "mouse", x + 120, y + top + 2.5 * row)
        assert text_of(browser, "spot").startswith("layer 2, channel ")
        assert browser.problems() == []


def test_the_page_of_a_run_in_words(
    browser: Browser, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, run = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven ships", "-n", 12, "--ignore-eos", "--paper",
        "--ffn-ratio", 0.5,
    )
    browser.open(address)
    order = browser.value("[...document.querySelectorAll('canvas, main p')].map(one => one.id || one.textContent)")
    before = order[: order.index("map")]
    assert "verdict" not in before and all(len(words) < 250 for words in before)
    (network,) = run["layers"][0]["networks"]
    reads, runs = network["retained"] + network["candidate"], network["retained"] + network["picks"]
    networks = [layer["networks"][0] for layer in run["layers"]]
    kept = [1 - ours for one in networks for ours, _ in one["left_out"].values()]
    changed = [share for one in networks for share in one["changed"].values()]
    steps = run["frames"][1:]
    verdict = text_of(browser, "verdict")
    for words in (
        f"read {reads} of the {network['channels']} channels of a network and ran {runs} of them",
        f"changed {100 * sum(changed) / len(changed):.0f} % of its picks from the step before",
        f"kept {100 * sum(kept) / len(kept):.1f} % of the importance",
        f"took {100 * sum(one['bytes'] / one['dense_bytes'] for one in steps) / len(steps):.1f} % of the dense model's",
        f"{sum(one['agrees'] for one in run['frames'])} of 12 tokens",
    ):
        assert words in verdict, (words, verdict)
    answer, place = run["dense_answer"], run["dense_answer"]["first_difference"]
    assert text_of(browser, "dense-answer") == "".join(one["text"] for one in answer["tokens"])
    assert f"the first difference, token {place + 1}" in text_of(browser, "parting")
    framed = browser.value(
        "[...document.querySelectorAll('.parts')].map(one => [...one.parentElement.children].indexOf(one))"
    )
    assert framed == [place, place]


def test_blank_lines_of_the_text_are_kept(
    browser: Browser, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _ = made(tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven", "-n", 3, "--ignore-eos", "--paper")
    browser.open(address)
    high = "document.getElementById('answer').getBoundingClientRect().height"
    lines = (
        "['answer', 'dense-answer'].forEach(name => document.getElementById(name).replaceChildren()), "
        "frames.forEach((one, at) => { one.text = %s[at]; }), fillText(), "
    )
    one = browser.value(lines % "['a', 'b', 'c']" + high)
    assert browser.value(lines % "['a', '\\n\\n\\n', 'c']" + high) == pytest.approx(4 * one, rel=0.01)


def test_axes_are_named(
    browser: Browser, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _ = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven", "-n", 8, "--ignore-eos", "--paper",
        "--ffn-ratio", 0.5,
    )
    browser.open(address)
    written = browser.value("""(() => {
        const found = {}, fill = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text) {
            (found[this.canvas.id] ||= []).push(text); fill.apply(this, arguments); };
        redraw();
        CanvasRenderingContext2D.prototype.fillText = fill;
        return found;
    })()""")
    for name, across, up in (
        ("map", "channel, by its place", "layer"), ("curve", "channel, by its place", "score over the prompt (no unit"),
        ("history", "new token", "share, %"), ("chances", "new token", "probability of the token, %"),
        ("times", "new token", "time of the step, ms"),
    ):
        assert any(text.startswith(across) for text in written[name]), (name, written[name])
        assert any(text.startswith(up) for text in written[name]), (name, written[name])
        assert sum(text.replace(",", "").isdigit() for text in written[name]) >= 4, (name, written[name])


@pytest.mark.parametrize(("flags", "said"), [
    (("--ffn-ratio", 0), "Nothing is pruned: both are the same model"),
    (("--ffn-ratio", 0.5, "--candidate-width", 0), "its steps choose nothing: on a model"),
    (("--ffn-ratio", 0.5), "choosing among candidates costs more than not reading the others saves."),
    (("--ffn-ratio", 0, "--head-ratio", 0.5, "--candidate-width", 1), "choosing among candidates costs more"),
], ids=["dense", "frozen", "pop", "heads"])  # fmt: skip
def test_a_run_that_was_not_faster_says_why(
    flags: tuple[Any, ...], said: str, browser: Browser, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, _ = made(
        tmp_path, capsys, "--ckpt", checkpoint, "--prompt", "Seven", "-n", 4, "--ignore-eos", "--paper", *flags
    )
    browser.open(address)
    browser.value("frames.forEach(one => { one.ms = 2 * one.dense_ms; }), fillWords()")
    verdict = text_of(browser, "verdict")
    assert said in verdict and ("candidates" in verdict) == ("candidates" in said)


def test_a_token_without_text_is_shown_as_itself(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, run = made(
        tmp_path, capsys, "--ckpt", complete_qwen(tmp_path / "qwen", "qwen2"), "--prompt", "What?", "-n", 60,
        "--ignore-eos", "--paper", "--temperature", 1e4, "--seed", 1,
    )
    browser.open(address)
    silent = [index for index, one in enumerate(run["frames"]) if not one["text"]]
    assert {run["frames"][index]["written"] for index in silent} == {"\N{REPLACEMENT CHARACTER}"}
    for index in silent:
        browser.value(f"show({index})")
        assert text_of(browser, "said") == "\N{REPLACEMENT CHARACTER}"


def test_pictures_of_one_row_are_drawn_as_one_row(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = complete_qwen(tmp_path / "qwen", "qwen3")
    for name, size in (("row", (72, 8)), ("column", (8, 40))):
        picture(*size).save(tmp_path / f"{name}.png")
    address, run = made(
        tmp_path, capsys, "--ckpt", folder, "--prompt", "What?", "--image", tmp_path / "row.png", "--image",
        tmp_path / "column.png", "-n", 2, "--ignore-eos", "--paper",
    )
    assert [(one["rows"], one["columns"], one["tokens"]) for one in run["pictures"]] == [(1, 9, 9), (5, 1, 5)]
    browser.open(address)
    shown = browser.value("[...document.querySelectorAll('#pictures p')].map(words => words.textContent)")
    assert "1 × 9 image tokens" in shown[0] and "5 × 1 image tokens" in shown[1]
    corners = browser.value("""new Promise(done => {
        const drawn = [], fill = CanvasRenderingContext2D.prototype.fillRect;
        CanvasRenderingContext2D.prototype.fillRect = function (x, y) { drawn.push([Math.round(x), Math.round(y)]); };
        showPictures();
        setTimeout(() => { CanvasRenderingContext2D.prototype.fillRect = fill; done(drawn); }, 500);
    })""")
    places = {(round(300 / 9 * index), 0) for index in range(9)} | {(0, 300 * index) for index in range(5)}
    assert {*map(tuple, corners)} == places and browser.problems() == []


def test_summaries_and_tokens_left_out_of_squares_have_no_place() -> None:
    engine, image = load(LLAVA_TINY), LLAVA_TINY / "example.png"
    for tokens in (24, 25, 26):
        made = picture_of(engine, image, (1, tokens))
        assert (made["rows"], made["columns"], made["tokens"]) == (5, 5, tokens)


@pytest.mark.parametrize("words", [
    ("--ckpt", MIXTRAL_TINY, "--prompt", "tally cabbacdafe?", "--prune-ratio", 0.3),
    ("--ckpt", LLAVA_TINY, "--prompt", "What do you see?", "--image", LLAVA_TINY / "example.png",
     "--prefill-skip", "1/4", "--head-ratio", 0.5, "--prune-ratio", 0.4, "--candidate-width", 1, "--dense-every", 3),
    ("--ckpt", LLAVA_TINY, "--prompt", "Red?", "--prune-ratio", 0),
    ("--ckpt", LLAVA_TINY, "--prompt", "Red?", "--candidate-width", 0),
], ids=["experts", "pictures", "dense", "frozen"])
def test_on_a_phone_in_the_dark_nothing_overflows(
    words: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_chromium() is None:
        pytest.skip(NO_BROWSER)
    address, run = made(tmp_path, capsys, *words, "--paper", "-n", 6, "--ignore-eos")
    with Browser(360, 740, dark=True, scale=2) as browser:
        browser.open(address + "#3")
        assert browser.value("document.documentElement.dataset.theme") == "dark"
        assert browser.value("document.documentElement.scrollWidth") == 360
        assert browser.value("!document.getElementById('experts-box').hidden") == bool(run["experts"])
        assert browser.value("!document.getElementById('heads-box').hidden") == bool(run["heads"])
        assert browser.value("document.querySelectorAll('#pictures canvas').length") == len(run["pictures"])
        assert browser.value("show(0), show(frames.length - 1), frame") == 5
        assert browser.problems() == []


def test_the_example_of_the_docs_opens_and_fetches_nothing(browser: Browser) -> None:
    example = REPOSITORY / "docs" / "example.html"
    assert example.stat().st_size < MOST_BYTES
    browser.open(example.as_uri())
    assert text_of(browser, "verdict").startswith("In this run a step read ")
    assert text_of(browser, "dense-answer").startswith("```python\n")
    assert browser.problems() == [] and browser.requests() == [example.as_uri()]
