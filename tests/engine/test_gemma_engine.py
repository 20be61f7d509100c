"""Gemma-3 through the engine and the commands: a whole tiny random checkpoint, beside transformers' processor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exit_status, generated, one_line_error
from PIL import Image
from tiny_gemma import complete_gemma, new_processor, picture
from tolerance import assert_same
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from popengine import compare, generate, score
from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.images.images import parse_image_processing
from popengine.images.vision import Vision
from popengine.info import main as info
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError
from weights.json_files import JsonObject

PICTURES = [picture(61, 33), picture(20, 47), picture(24, 24)]


@pytest.fixture(scope="module")
def processor() -> Gemma3Processor:
    return new_processor()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint)


@pytest.mark.parametrize("shown", [[[0]], [[0, 1]], [[]], [[1], [], [2, 0]]], ids=["one", "two", "none", "batch"])
@torch.inference_mode()
def test_prompts_pixels_and_logits_equal_transformers(
    engine: Engine, checkpoint: Path, processor: Gemma3Processor, shown: list[list[int]]
) -> None:
    """All by way of transformers' own processor: chat template, the picture's tokens, pixel values, padding."""
    reference = Gemma3ForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    chats = [
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
         {"role": "user", "content": [{"type": "image"}] * len(own) + [{"type": "text", "text": "\nWhat is it?"}]}]
        for own in shown
    ]  # fmt: skip
    images = [[PICTURES[index] for index in own] for own in shown]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        images=images if any(images) else None, padding=True, add_special_tokens=False, return_tensors="pt",
    )
    real = inputs["attention_mask"].bool()
    ids = [engine.prompts.ids(chat, images=own) for chat, own in zip(chats, images, strict=True)]
    assert ids == [row[mask].tolist() for row, mask in zip(inputs["input_ids"], real, strict=True)]
    flat = [image for own in images for image in own]
    assert isinstance(engine.pictures, Vision)
    pixel_values = engine.pictures.pixel_values(flat)
    if pixel_values is not None:
        assert_same(pixel_values, inputs["pixel_values"])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    wanted = reference(**inputs, position_ids=positions).logits
    logits = engine.pictures.model(inputs["input_ids"], pixel_values, real)
    assert_same(logits[real], wanted[real])
    made = torch.tensor(generated_with(engine, ids, 12, DENSE, flat))               # [steps, B]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~real, 0)
    theirs = reference.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(made.T, theirs[:, inputs["input_ids"].shape[1] :])


def test_a_processor_that_says_nothing_takes_the_defaults() -> None:
    processing = parse_image_processing(JsonObject({"image_processor_type": "Gemma3ImageProcessorFast"}, "test"))
    wanted = torch.as_tensor(Gemma3ImageProcessorPil()(PICTURES[0], return_tensors="pt")["pixel_values"][0])
    assert_same(processing.pixel_values(PICTURES[0]), wanted)


def generated_with(
    engine: Engine, ids: list[list[int]], count: int, pruning: PruningSettings, images: list[Image.Image]
) -> list[tuple[int | None, ...]]:
    return [tuple(step) for step in engine.run(ids, count, pruning, ignore_eos=True, images=images)]


def test_a_message_that_spells_tokens_of_pictures_means_their_letters(engine: Engine) -> None:
    """All but the mark, by which whoever writes it says where a picture stands."""
    assert isinstance(engine.pictures, Vision)
    image = engine.pictures.image_token_id
    ids = engine.prompts.ids("a <image_soft_token> b <end_of_image>")
    assert image not in ids
    ids = engine.prompts.ids("what <start_of_image> is", images=PICTURES[:1])
    assert ids.count(image) == 9
    assert engine.tokenizer.decode(ids, skip_special_tokens=False).count("what \n\n<start_of_image>") == 1
    with pytest.raises(InputError, match=r"1 image token \(<start_of_image>\) and 0 images were given"):
        engine.prompts.ids("what <start_of_image> is")


def test_a_conversation_with_pictures_computes_no_turn_again(engine: Engine) -> None:
    conversation = engine.chat(pruning=PruningSettings.paper(prune_ratio=0), max_new_tokens=6)
    conversation.say("What is it?", [PICTURES[0]])
    said = conversation.say("And this?", [PICTURES[1]])
    anew = engine.generate(conversation.messages[:-1], images=PICTURES[:2], max_new_tokens=6, pruning=DENSE)
    assert said.token_ids == anew[0].token_ids


@pytest.mark.parametrize(
    "settings",
    [
        PruningSettings.paper(prune_ratio=0.2),
        PruningSettings.paper(prune_ratio=0.3, head_ratio=0.5, candidate_width=0.5),
        PruningSettings.paper(prune_ratio=0.2, rule="draft", prior=8, dense_every=3, redraw_every=6),
        PruningSettings.paper(prune_ratio=0.2, rule="up", retained_share=0.2, candidate_width=1.0),
        PruningSettings.paper(prune_ratio=0.2, prefill_skip="1/3", boundary_tokens=2, scored_tokens="text"),
    ],
)
def test_a_batch_of_one_prompt_twice_decides_as_the_prompt_alone(engine: Engine, settings: PruningSettings) -> None:
    """Every kind of pruning, with a picture in the prompt."""
    ids = engine.prompts.ids("What is it?", images=PICTURES[:1])
    alone = generated_with(engine, [ids], 10, settings, PICTURES[:1])
    twice = generated_with(engine, [ids, ids], 10, settings, PICTURES[:1] * 2)
    assert [step * 2 for step in alone] == twice


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_stay_near_plain_ones(engine: Engine, checkpoint: Path, weights: str) -> None:
    packed = load(checkpoint, weights=weights, dtype="float32")
    ids = torch.tensor([engine.prompts.ids("Tell me of it.")])
    with torch.inference_mode():
        exact, rounded = engine.model(ids), packed.model(ids)
    assert 0 < (rounded - exact).norm() / exact.norm() < (0.15 if weights == "int8" else 0.5)
    assert generated(packed, ids.tolist(), 8, PruningSettings.paper(prune_ratio=0.3))


@pytest.mark.slow
def test_compiled_and_eager_steps_give_the_same_tokens(engine: Engine, checkpoint: Path) -> None:
    """Layers of both kinds through one compiled function, with a picture in the prompt."""
    compiled, pruning = load(checkpoint, compile=True), PruningSettings.paper(prune_ratio=0.3)
    assert compiled.compiled is not None
    ids = [engine.prompts.ids("What is it?", images=PICTURES[:1])]
    assert generated_with(compiled, ids, 24, pruning, PICTURES[:1]) == generated_with(
        engine, ids, 24, pruning, PICTURES[:1]
    )


def test_the_commands_run(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PICTURES[0].save(tmp_path / "picture.png")
    given = ("--ckpt", checkpoint, "--image", tmp_path / "picture.png", "--prompt", "What is it?", "-n", 4, "--json")
    assert exit_status(generate.main, *given, "--prune-ratio", 0.2) == 0
    assert json.loads(capsys.readouterr().out)["image_tokens"] == 9
    assert exit_status(info, checkpoint, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] is None
    assert found["pictures"] == {"tokens_per_image": 9, "pixels": 24}
    sizes = ("--text", text, "--windows", 1, "--prompt-tokens", 24, "--score-tokens", 16)
    assert exit_status(score.main, "--ckpt", checkpoint, *sizes, "--prune-ratio", 0.2) == 0
    assert "perplexity" in capsys.readouterr().out
    methods = ("--methods", "dense", "pop", "frozen", "all-channels", "magnitude", "--prune-ratio", 0.2)
    assert exit_status(compare.main, "--ckpt", checkpoint, *sizes, *methods, "--out", tmp_path, "--no-plots") == 0
    assert "all-channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pan_and_scan": True}, "an image processor with do_pan_and_scan is not supported"),
        ({"size": {"height": 28, "width": 28}}, "makes pictures of 28 x 28 pixels, and the vision tower reads 24 x 24"),
        ({"size": {"longest_edge": 24}}, "longest_edge is not supported"),
        ({"image_processor_type": "Gemma9ImageProcessor"}, "'Gemma9ImageProcessor' is not supported"),
    ],
)
def test_a_processor_that_does_what_is_not_done_here_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= changes
    path.unlink()
    path.write_text(json.dumps(settings))
    PICTURES[0].save(tmp_path / "picture.png")
    flags = ("--ckpt", tmp_path, "--image", tmp_path / "picture.png", "--prompt", "What?", "-n", 1)
    assert message in one_line_error(generate.main, capsys, *flags)
