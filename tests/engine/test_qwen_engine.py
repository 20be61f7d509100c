"""Qwen-VL checkpoints from prompt to text: templates, pictures of different sizes, batches, conversations, commands."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exit_status, one_line_error, resolved
from PIL import Image
from tiny_qwen_vl import FAMILIES, PROCESSOR, complete_qwen, picture
from tolerance import assert_same
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.evaluation.gates import gated_loss
from popengine.evaluation.scoring import Window, dense_log_probabilities, log_probabilities
from popengine.generate import main as generate
from popengine.images.patches import PatchVision
from popengine.info import main as info
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

SMALL, TALL, SQUARE = picture(24, 16), picture(26, 37), picture(32, 32)         # of 6, 15 and 16 tokens
PRUNED = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_qwen(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder, device="cpu", dtype="float32")


def asked(*pictures: Image.Image) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": "What?"}]}]


@torch.inference_mode()
def test_greedy_tokens_equal_hugging_face(folder: Path, engine: Engine) -> None:
    """Two pictures of different sizes, a text and one picture, as a batch with padding."""
    shown = [[TALL, SMALL], [], [SQUARE]]
    ids = engine.prompts.batch(["What?"] * 3, shown)
    tokenizer = engine.tokenizer
    pad = "<|vision_start|>" + "<|image_pad|>" * 15 + "<|vision_end|><|vision_start|>" + "<|image_pad|>" * 6
    assert pad + "<|vision_end|>What?<|im_end|>" in tokenizer.decode(ids[0], skip_special_tokens=False)
    run = engine.run(ids, 12, DENSE, ignore_eos=True, images=[TALL, SMALL, SQUARE])
    found = torch.tensor(list(run)).T

    reference = AutoModelForImageTextToText.from_pretrained(folder).eval()
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    given = Qwen2VLImageProcessorPil(**PROCESSOR)(images=[TALL, SMALL, SQUARE], return_tensors="pt")
    types = (tokens == tokenizer.token_id("<|image_pad|>")).int()
    out = reference.generate(
        input_ids=tokens, attention_mask=real, mm_token_type_ids=types, **given, max_new_tokens=12, min_new_tokens=12,
        do_sample=False, eos_token_id=[], pad_token_id=0,
    )
    assert torch.equal(found, out[:, longest:])


@pytest.mark.parametrize("pruning", [DENSE, PRUNED])
def test_each_prompt_of_a_batch_has_pictures_of_its_own_size(engine: Engine, pruning: PruningSettings) -> None:
    prompts, images = [asked(TALL, SMALL), asked(), asked(SQUARE)], [[TALL, SMALL], [], [SQUARE]]
    together = engine.generate(prompts, images=images, pruning=pruning, max_new_tokens=8, ignore_eos=True)
    assert together[0].statistics.image_tokens == 15 + 6 + 16
    assert together[0].statistics.image_ms > 0
    if pruning is DENSE:
        for prompt, own, answer in zip(prompts, images, together, strict=True):
            alone = engine.generate(prompt, images=own, pruning=pruning, max_new_tokens=8, ignore_eos=True)[0]
            assert alone.token_ids == answer.token_ids


def test_a_conversation_with_pictures_is_that_prompt(engine: Engine) -> None:
    conversation = engine.chat(pruning=DENSE, max_new_tokens=6)
    for text, images in (("What?", [TALL]), ("And now?", []), ("And these?", [SMALL, SQUARE])):
        said = conversation.say(text, images)
        afresh = engine.generate(
            conversation.messages[:-1], images=conversation.images, max_new_tokens=6, pruning=DENSE
        )[0]
        assert said.token_ids == afresh.token_ids
        assert (said.statistics.kept_tokens > 0) == (text != "What?")
    assert said.statistics.image_tokens == 15 + 6 + 16


def test_every_setting_runs_with_a_picture(engine: Engine) -> None:
    for settings in (
        PruningSettings.paper(prune_ratio=0.2),
        PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6),
        PruningSettings.paper(prune_ratio=0.2, prefill_skip=0.25, boundary_tokens=4),
        PruningSettings.paper(prune_ratio=0.2, rule="up", prior=4, dense_every=3, scored_tokens="text"),
    ):
        answer = engine.generate("What?", images=[TALL], pruning=settings, max_new_tokens=6, ignore_eos=True)[0]
        assert len(answer.token_ids) == 6


@pytest.mark.parametrize("method", ["frozen", "all-channels", "random", "magnitude"])
def test_baselines_run_with_a_picture(engine: Engine, method: str) -> None:
    pruning = pruning_for(method, Request(engine.model, PRUNED))
    answer = engine.generate("What?", images=[TALL], pruning=pruning, max_new_tokens=6, ignore_eos=True)[0]
    assert len(answer.token_ids) == 6


def test_packed_weights_read_pictures(folder: Path, engine: Engine) -> None:
    packed = load(folder, weights="int8", dtype="float32")
    assert "int8" in packed.weights
    x, _, pictures, _ = packed.pictures.embed(
        torch.tensor([packed.prompts.ids("What?", images=[TALL])]), None, packed.pictures.given([TALL])
    )
    logits = [
        one.model.prefill(x, one.model.new_state(1, 128, resolved(one.model, DENSE)), pictures=pictures)
        for one in (packed, engine)
    ]
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.2 * logits[1].std()


@torch.inference_mode()
def test_a_text_is_scored_as_the_dense_model_does(engine: Engine) -> None:
    ids = engine.prompts.ids("Some words to be scored, and no picture.", raw=True)
    window = Window(ids[:20], ids[20:])
    found = log_probabilities(engine, window, engine.resolve(DENSE))
    assert_same(found, dense_log_probabilities(engine.model, window))


@torch.inference_mode()
def test_gates_see_pictures_where_they_stand(engine: Engine) -> None:
    """Gates that are all one leave the loss of the answer, as steps give it."""
    ids, answer = engine.prompts.ids("What?", images=[TALL]), [5, 8, 2]
    rows = engine.pictures.embed(torch.tensor([ids + answer[:-1]]), None, engine.pictures.given([TALL]))
    gates = torch.ones(rows.x.shape[1], engine.model.config.num_hidden_layers)
    loss = gated_loss(engine.model, rows.x, gates, answer, rows.pictures)
    x, _, pictures, _ = engine.pictures.embed(torch.tensor([ids]), None, engine.pictures.given([TALL]))
    state = engine.model.new_state(1, 128, resolved(engine.model, DENSE))
    logits = [engine.model.prefill(x, state, pictures=pictures)]
    logits += [engine.model.decode(torch.tensor([token]), state) for token in answer[:-1]]
    wanted = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(answer), reduction="sum")
    assert_same(loss, wanted)


@pytest.mark.slow
def test_compiled_steps_go_on_after_pictures(tmp_path: Path, short_calls: None) -> None:
    folder = complete_qwen(tmp_path, "qwen3")
    eager, compiled = load(folder, dtype="float32"), load(folder, dtype="float32", compile=True)
    for images in ([TALL, SMALL], []):
        answers = [
            one.generate("What?", images=images, pruning=PRUNED, max_new_tokens=10, ignore_eos=True)[0].token_ids
            for one in (eager, compiled)
        ]
        assert answers[0] == answers[1]


def test_pictures_stand_where_the_prompt_says(engine: Engine) -> None:
    assert isinstance(engine.pictures, PatchVision)
    put = "<|vision_start|><|image_pad|><|vision_end|>"
    (text, _), = engine.prompts.texts([f"Is {put} it?"], [1])
    assert text.count("<|image_pad|>") == 1
    ids = engine.prompts.ids(f"Is {put} it?", images=[SMALL])
    assert engine.pictures.image_tokens([ids]) == 6
    assert engine.pictures.plain_text("Which?", 2) == f"{put}\n{put}\nWhich?"


def test_the_command_reads_pictures_and_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TALL.save(tmp_path / "tall.png")
    picture(30, 3).save(tmp_path / "flat.png")
    picture(900, 4).save(tmp_path / "long.png")
    with pytest.raises(SystemExit) as end:
        generate(["--ckpt", str(folder), "--prompt", "Hi", "--image", str(tmp_path / "tall.png"), "-n", "3", "--json"])
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["image_tokens"] == 15
    shared = ("--ckpt", folder, "--prompt", "Hi", "--image")
    assert exit_status(generate, *shared, tmp_path / "flat.png", "-n", 1) == 0      # is enlarged to a patch
    capsys.readouterr()
    assert "at most 200 times as long as wide" in one_line_error(generate, capsys, *shared, tmp_path / "long.png")
    with pytest.raises(SystemExit) as end:
        info([str(folder)])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "of any size, a token for each 8 x 8 pixels" in out
    assert "supported   yes\n" in out


def test_a_video_is_one_clear_line(engine: Engine) -> None:
    film = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(InputError, match="has the token of a video, which is not read here"):
        engine.generate(film)
    with pytest.raises(InputError, match=r"0 image tokens .* and 1 image was given"):
        engine.generate("What?", raw=True, images=[SMALL])


@pytest.mark.parametrize(
    ("file", "part", "change", "message"),
    [
        ("preprocessor_config.json", None, {"patch_size": 6}, "makes patches of 6 pixels.* reads 4, 2 and 2"),
        ("preprocessor_config.json", None, {"max_pixels": 10}, "at most 10 pixels cannot be"),
        ("config.json", "text_config", {"rope_parameters": {"mrope_section": [2, 3, 4]}}, "add up to 8, half of the"),
        ("config.json", "text_config", {"rope_parameters": {"mrope_section": [8]}}, "three numbers that add up to 8"),
        ("config.json", "text_config", {"rope_parameters": {"mrope_section": [10, -1, -1]}}, "add up to 8"),
        ("config.json", "text_config", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not implemented"),
        ("config.json", "vision_config", {"in_channels": 1}, "in_channels must be 3"),
        ("config.json", "vision_config", {"num_heads": 7}, "multiple of four times num_heads"),
        ("config.json", "vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not one of axial"),
        ("config.json", "vision_config", {"depth": 2**20}, "depth must be an integer of at least 1 and at most 1024"),
        ("config.json", "vision_config", {"depth": 900}, "has 90[46] layers and experts, but there are only"),
        ("config.json", "vision_config", {"spatial_merge_size": 2**20}, "no tensor has one above|window_size .* must"),
        ("config.json", "vision_config", {"hidden_act": "mish"}, "'mish' is not implemented"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_are_one_clear_line(
    folder: Path, tmp_path: Path, file: str, part: str | None, change: dict, message: str
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    fields = json.loads((broken / file).read_text())
    target = fields if part is None else fields[part]
    for name, value in change.items():
        target[name] = target.get(name, {}) | value if isinstance(value, dict) else value
    (broken / file).write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        load(broken).generate("What?", images=[SMALL], max_new_tokens=1)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"hidden_size": 60}, "the tower makes features of size 60, and the language model has 64"),
        ("qwen2.5", {"window_size": 7}, r"window_size \(7\) must be at least a token's 8 pixels"),
        ("qwen3", {"num_position_embeddings": 26}, "must be a square, not 26"),
        ("qwen3", {"deepstack_visual_indexes": [0, 3]}, "must name blocks of 3, each once and in order"),
        ("qwen3", {"deepstack_visual_indexes": [2, 0]}, "must name blocks of 3, each once and in order"),
    ],
)
def test_towers_that_cannot_be_are_one_clear_line(tmp_path: Path, family: str, change: dict, message: str) -> None:
    broken = complete_qwen(tmp_path, family)
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"] |= change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(broken)
