"""Qwen2-VL, 2.5 and 3 held to Hugging Face's, from tiny random models that the real loader reads, with pictures in."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import resolved
from PIL import Image
from safetensors.torch import load_file, save_file
from slow_masked import in_model_order, masked_decode
from slow_pop import SlowPOP
from slow_prefill import SlowPrefillOnly, two_passes
from tiny_qwen_vl import AFTER, BEFORE, FAMILIES, IMAGE, PROCESSOR, VARIANTS, picture, randomised, reference_model
from tolerance import assert_same
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from models.families.qwen2_vl import Qwen2VLForConditionalGeneration as OurQwen
from models.registry import architecture
from popengine.benchmark.shapes import SHAPES
from popengine.engine.loading import load_model
from popengine.engine.run import next_logits
from popengine.images.images import image_size, processor_fields
from popengine.images.patches import parse_patch_processing
from popengine.studies.known_text import evaluate
from popengine.studies.settings import DENSE, PruningSettings
from weights.checkpoint import open_checkpoint
from weights.errors import InputError
from weights.json_files import JsonObject


def load_ours(directory: Path) -> OurQwen:
    with open_checkpoint(directory) as checkpoint:
        model, _ = load_model(checkpoint, torch.float32, torch.device("cpu"))
    assert isinstance(model, OurQwen)
    return model


def saved_pair(variant: str, directory: Path) -> tuple[Any, OurQwen]:
    reference = reference_model(variant)
    reference.save_pretrained(directory)
    return reference, load_ours(directory)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return saved_pair(request.param, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return saved_pair(request.param, tmp_path_factory.mktemp("qwen"))


# Of 2 x 3, 5 x 3 and 4 x 4 tokens: windows that are whole and such that are cut, and every grid another.
PICTURES = [picture(24, 16), picture(26, 37), picture(32, 32)]
Inputs = tuple[Tensor, Tensor, Tensor | None, list[tuple[int, int]], dict[str, Tensor]]


def inputs(*prompts: list[int | Image.Image]) -> Inputs:
    """Prompts of so many text tokens and of pictures, padded on the left: tokens, real, pixel values and grids for our
    model, and all of it for transformers'."""
    shown = [part for prompt in prompts for part in prompt if not isinstance(part, int)]
    given: dict[str, Tensor] = {}
    if shown:
        given = dict(Qwen2VLImageProcessorPil(**PROCESSOR)(images=shown, return_tensors="pt"))
    grids = [(int(y) // 2, int(x) // 2) for _, y, x in given["image_grid_thw"]] if shown else []
    waiting, ids = iter(grids), []
    for prompt in prompts:
        row: list[int] = []
        for part in prompt:
            if isinstance(part, int):
                row += [(7 * len(row) + i) % 80 + 1 for i in range(part)]
            else:
                rows, columns = next(waiting)
                row += [BEFORE, *[IMAGE] * (rows * columns), AFTER]
        ids.append(row)
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    real = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in ids])
    given |= {"input_ids": tokens, "attention_mask": real.long(), "mm_token_type_ids": (tokens == IMAGE).int()}
    return tokens, real, given.get("pixel_values"), grids, given


BATCHES: dict[str, list[list[int | Image.Image]]] = {
    "text only": [[11]],
    "one picture": [[3, PICTURES[1], 6]],
    "two pictures": [[PICTURES[0], 4, PICTURES[1], 5]],
    "a batch": [[2, PICTURES[1], 5], [9], [1, PICTURES[0], PICTURES[2], 3]],
}


def longer(given: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """The same with tokens of text after the prompts."""
    ones = torch.ones_like(new)
    more = {"input_ids": new, "attention_mask": ones, "mm_token_type_ids": ones.int() * 0}
    return given | {name: torch.cat([given[name], tensor], dim=1) for name, tensor in more.items()}


@pytest.mark.numeric
@torch.inference_mode()
def test_logits_equal_hugging_face_with_and_without_cache(pair: tuple) -> None:
    reference, ours = pair
    for prompts in BATCHES.values():
        tokens, real, pixel_values, grids, given = inputs(*prompts)
        new = torch.tensor([[5, 1, 7, 2], [1, 2, 3, 4], [9, 9, 1, 6]])[: len(tokens)]
        whole = longer(given, new)
        expected = reference(**whole).logits
        all_real = whole["attention_mask"].bool()
        logits = ours(whole["input_ids"], pixel_values, all_real, grids)
        assert_same(logits[all_real], expected[all_real])

        text = ours.language_model
        state = text.new_state(len(tokens), tokens.shape[1] + 4, resolved(text, DENSE))
        features = None if pixel_values is None else ours.encode_images(pixel_values, grids)
        x, pictures = ours.place(tokens, real, features, grids)
        logits = text.prefill(x, state, real, pictures=pictures)
        for step in range(new.shape[1]):
            assert_same(logits, expected[:, tokens.shape[1] - 1 + step])
            logits = next_logits(text, new[:, step], state)


def test_positions_equal_hugging_face_exactly(family: tuple) -> None:
    reference, ours = family
    for prompts in list(BATCHES.values())[1:]:
        tokens, real, _, grids, given = inputs(*prompts)
        wanted, delta = reference.model.get_rope_index(
            tokens, given["mm_token_type_ids"], given["image_grid_thw"], attention_mask=given["attention_mask"]
        )
        positions, rope_delta = ours.positions(tokens, real, grids)
        assert torch.equal(positions, wanted)
        assert torch.equal(rope_delta, delta)


def prefilled(ours: OurQwen, prompts: list[list[int | Image.Image]], settings: Any, capacity: int = 160) -> tuple:
    """Prompts run: the logits after them, and the state that steps go on from."""
    tokens, real, pixel_values, grids, _ = inputs(*prompts)
    real_or_none = None if real.all() else real
    text = ours.language_model
    features = None if pixel_values is None else ours.encode_images(pixel_values.to(text.dtype), grids)
    x, pictures = ours.place(tokens, real_or_none, features, grids)
    state = text.new_state(len(tokens), capacity, resolved(text, settings))
    return text.prefill(x, state, real_or_none, pictures=pictures), state


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_a_slow_implementation_with_hooks_gives_the_same_tokens(family: tuple, ratio: float, prefill: Any) -> None:
    reference, ours = family
    settings = PruningSettings.paper(prune_ratio=ratio, candidate_width=0.3, prefill=prefill)
    pruning = resolved(ours.language_model, settings)
    prompt: list[int | Image.Image] = [2, PICTURES[0], 3, PICTURES[1], 8]
    with torch.inference_mode():
        logits, state = prefilled(ours, [prompt], pruning)
        new = [int(logits.argmax())]
        while len(new) < 48:
            new.append(int(next_logits(ours.language_model, torch.tensor(new[-1:]), state).argmax()))
    slow = SlowPOP(reference, pruning.ffn_ratio, 0.3, prefill, layers=reference.model.language_model.layers)
    given = inputs(prompt)[-1]
    assert new == slow.generate(given.pop("input_ids")[0].tolist(), 48, **given)
    slow.remove_hooks()
    assert len(set(new)) > 5  # a sequence that repeats one token would prove little


@torch.inference_mode()
def test_masked_and_active_decode_agree_with_channels_and_heads_pruned(family: tuple) -> None:
    model = deepcopy(family[1]).double()
    text = model.language_model
    for settings in (
        PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3),
        PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6),
    ):
        logits, pruned = prefilled(model, BATCHES["a batch"], settings)
        masked = text.new_state(3, 160, resolved(text, DENSE))
        in_model_order(pruned, masked)
        for _ in range(12):
            chosen = logits.argmax(-1)
            logits = next_logits(text, chosen, pruned)
            assert_same(masked_decode(text, chosen, pruned, masked), logits)


@torch.inference_mode()
def test_a_prompt_with_pictures_in_two_parts_is_that_prompt(family: tuple) -> None:
    """As in a conversation: the second part has a picture of its own, and positions that the first one's moves."""
    _, ours = family
    tokens, _, pixel_values, grids, given = inputs([3, PICTURES[1], 6, PICTURES[0], 5])
    text, kept = ours.language_model, 24
    whole, wanted = text.new_state(1, 80, resolved(text, DENSE)), []
    features = ours.encode_images(pixel_values, grids)
    x, pictures = ours.place(tokens, None, features, grids)
    wanted.append(text.prefill(x, whole, pictures=pictures))
    wanted.append(next_logits(text, torch.tensor([4]), whole))

    state = text.new_state(1, 80, resolved(text, DENSE))
    patches = given["image_grid_thw"].prod(dim=1).tolist()
    first, second = (
        ours.encode_images(own, [grid]) for own, grid in zip(pixel_values.split(patches), grids, strict=True)
    )
    x, pictures = ours.place(tokens[:, :kept], None, first, grids[:1])
    text.prefill(x, state, pictures=pictures)
    next_logits(text, torch.tensor([4]), state)               # an answer that is taken back
    x, pictures = ours.place(tokens, None, second, grids, kept)
    found = [text.prefill(x, state, kept=kept, pictures=pictures), next_logits(text, torch.tensor([4]), state)]
    assert_same(torch.cat(found), torch.cat(wanted))


@torch.inference_mode()
def test_a_known_text_after_a_picture_is_its_steps(family: tuple) -> None:
    _, ours = family
    text, new = ours.language_model, torch.tensor([5, 8, 2, 7, 1])
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3)
    _, state = prefilled(ours, [[4, PICTURES[1], 3]], settings)
    _, again = prefilled(ours, [[4, PICTURES[1], 3]], settings)
    wanted = torch.cat([next_logits(text, token[None], state) for token in new])
    assert_same(evaluate(text, new, again), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("boundary", [1, 4, 10])
def test_layers_that_skip_the_prompt_see_pictures_where_they_stand(family: tuple, boundary: int) -> None:
    """Prefill-Only pruning; the last rows reach into the picture."""
    _, ours = family
    text, prompt = ours.language_model, [[3, PICTURES[1], 6, PICTURES[0], 2]]
    tokens, _, pixel_values, grids, _ = inputs(*prompt)
    pruning = resolved(text, PruningSettings.paper(prune_ratio=0.0, prefill_skip="1/4", boundary_tokens=boundary))
    logits, state = prefilled(ours, prompt, pruning)
    x, pictures = ours.place(tokens, None, ours.encode_images(pixel_values, grids), grids)
    dense = resolved(text, DENSE)
    wanted, slow = two_passes(text, x, dense, pruning.skipped, boundary, capacity=160, pictures=pictures)
    for token in ([3], [9]):
        assert_same(logits, wanted)
        logits, wanted = (next_logits(text, torch.tensor(token), one) for one in (state, slow))


@pytest.mark.parametrize("boundary", [1, 4])
def test_a_slow_implementation_that_skips_layers_gives_the_same_tokens(family: tuple, boundary: int) -> None:
    """Prefill-Only pruning on transformers' own modules."""
    reference, ours = family
    settings = PruningSettings.paper(prune_ratio=0.0, prefill_skip="1/4", boundary_tokens=boundary)
    prompt: list[int | Image.Image] = [2, PICTURES[0], 3, PICTURES[1], 8]
    with torch.inference_mode():
        logits, state = prefilled(ours, [prompt], resolved(ours.language_model, settings))
        new = [int(logits.argmax())]
        while len(new) < 48:
            new.append(int(next_logits(ours.language_model, torch.tensor(new[-1:]), state).argmax()))
    given = inputs(prompt)[-1]
    tokens, types = given.pop("input_ids"), given.pop("mm_token_type_ids")
    del given["attention_mask"]
    positions, _ = reference.model.get_rope_index(tokens, types, given["image_grid_thw"])
    slow = SlowPrefillOnly(reference, 1, boundary, reference.model.language_model)
    given["mm_token_type_ids"] = types[:, :-boundary]
    assert new == slow.generate(tokens[0].tolist(), 48, positions, **given)
    assert len(set(new)) > 5


RELEASED = {
    "qwen2": {"patch_size": 14},
    "qwen2.5": {"patch_size": 14, "window_size": 112},
    "qwen3": {"patch_size": 16, "num_position_embeddings": 2304},
}


@pytest.mark.parametrize("variant", RELEASED)
@torch.inference_mode()
def test_towers_of_the_released_patches_and_windows_equal_hugging_face(variant: str, tmp_path: Path) -> None:
    """Pictures of a common size, of one token's height, and of more rows than the learned positions have."""
    model_class, config = VARIANTS[variant]
    config = deepcopy(config)
    for name, value in RELEASED[variant].items():
        setattr(config.vision_config, name, value)
    reference = randomised(model_class, config)
    reference.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    processor = Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size)
    given = processor(images=[picture(320, 240), picture(29, 400), picture(60, 900)], return_tensors="pt")
    grids = [(int(y) // 2, int(x) // 2) for _, y, x in given["image_grid_thw"]]
    wanted = reference.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    found = ours.encode_images(given["pixel_values"], grids)
    deeper = getattr(wanted, "deepstack_features", None)
    features = wanted.pooler_output if deeper is None else torch.stack([wanted.pooler_output, *deeper])
    assert_same(found, features)


SIZES = [(24, 16), (37, 26), (8, 8), (5, 4), (300, 40), (40, 301), (17, 131), (64, 64)]


@pytest.mark.parametrize("named", ["min and max", "size", "older size"])
@pytest.mark.parametrize(("least", "most"), [(8 * 8 * 4, 8 * 8 * 40), (1, 500), (5000, 5100)])
def test_pixel_values_and_their_order_equal_hugging_face(least: int, most: int, named: str) -> None:
    settings: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": least, "longest_edge": most}
    expected = Qwen2VLImageProcessorPil(**settings, size=edges)
    limits: dict[str, Any] = {"min_pixels": least, "max_pixels": most}
    ours = parse_patch_processing(JsonObject(
        settings | {"min and max": limits, "size": {"size": edges}, "older size": {"size": limits}}[named], "here"
    ))
    for size in SIZES:
        wanted = expected(images=[picture(*size)], return_tensors="pt")
        assert_same(ours.pixel_values(picture(*size)), wanted["pixel_values"])
        rows, columns = ours.grid(size[1], size[0])
        assert wanted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


@pytest.mark.parametrize(
    ("name", "raw", "sizes"),
    [
        ("Qwen2-VL", {
            "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
        }, [(640, 480), (100, 33)]),
        ("Qwen3-VL", {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
            "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast",
        }, [(640, 480), (100, 33)]),
    ],
)  # fmt: skip
def test_processors_as_released_equal_hugging_face(name: str, raw: dict, sizes: list) -> None:
    ours, expected = parse_patch_processing(JsonObject(raw, name)), Qwen2VLImageProcessorPil(**raw)
    for size in sizes:
        wanted = expected(images=[picture(*size)], return_tensors="pt")["pixel_values"]
        assert_same(ours.pixel_values(picture(*size)), wanted)


def test_processors_as_transformers_saves_them_are_read(tmp_path: Path) -> None:
    """Alone, and as a part of processor_config.json."""
    Qwen2VLImageProcessorPil(**PROCESSOR).save_pretrained(tmp_path)
    wanted = parse_patch_processing(JsonObject(PROCESSOR, "here"))
    assert parse_patch_processing(processor_fields(tmp_path)) == wanted
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved}))
    assert parse_patch_processing(processor_fields(tmp_path)) == wanted


def test_a_picture_lying_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(37, 26).save(tmp_path / "lying.jpg", exif=exif)
    ours = parse_patch_processing(JsonObject(PROCESSOR, "here"))
    assert image_size(tmp_path / "lying.jpg") == (37, 26)
    rows, columns = ours.grid(*image_size(tmp_path / "lying.jpg"))
    assert ours.pixel_values(tmp_path / "lying.jpg").shape == (rows * columns * 4, 3 * 2 * 4 * 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_pixels": 4000, "max_pixels": 3999}, "at least 4000 and at most 3999 pixels cannot be"),
        ({"max_pixels": 700, "min_pixels": 1}, "one token has 784"),
        ({"size": {"shortest_edge": 0, "longest_edge": 9999}}, "shortest_edge must be an integer of at least 1"),
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported here"),
        ({"patch_size": "14"}, "patch_size must be an integer"),
    ],
)
def test_limits_that_contradict_each_other_are_one_clear_line(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_patch_processing(JsonObject(fields, "preprocessor_config.json"))


def test_pictures_that_cannot_be_read_are_one_clear_line() -> None:
    ours = parse_patch_processing(JsonObject({}, "here"))
    with pytest.raises(InputError, match="more than 200 times as long"):
        ours.grid(14, 2801)
    hostile = parse_patch_processing(JsonObject({"min_pixels": 2**31, "max_pixels": 2**31}, "here"))
    with pytest.raises(InputError, match="would make more than 24000000"):
        hostile.grid(1000, 1000)
    whole = parse_patch_processing(JsonObject({"do_resize": False}, "here"))
    assert whole.grid(56, 84) == (2, 3)
    with pytest.raises(InputError, match="takes multiples of 28 alone"):
        whole.grid(56, 85)


def as_older(raw: dict[str, Any]) -> dict[str, Any]:
    """A config as the checkpoints were released: the language model's fields beside the tower's, and older names."""
    text, vision = raw.pop("text_config"), raw["vision_config"]
    rope = text.pop("rope_parameters")
    sections = {name: value for name, value in rope.items() if name.startswith("mrope")} | {"type": "mrope"}
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    vision.pop("rope_parameters", None)
    return text | raw | {"rope_theta": rope["rope_theta"], "rope_scaling": sections, "vision_token_id": 94}


SPELLINGS = {
    "as released": [(r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")],
    "transformers 5": [(r"^visual\.", "model.visual."), (r"^model\.(?!visual|lang)", "model.language_model.")],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_spelling_is_read(variant: str, spelling: str, tied: bool, tmp_path: Path) -> None:
    reference_model(variant, tied).save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    expected, config = ours.state_dict(), ours.config
    assert not config.unknown_fields + config.vision.unknown_fields + config.text.unknown_fields
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert ("lm_head.weight" in tensors) != tied
    for pattern, name in SPELLINGS[spelling]:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, path)
    nested = json.loads((tmp_path / "config.json").read_text())
    for raw in (nested, nested["text_config"] | nested, as_older(deepcopy(nested))):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        again = load_ours(tmp_path)
        assert again.config == config
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in expected.items())


# What config.json has on the Hub, less what says nothing about the computation.
PLACES = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655,
          "video_token_id": 151656}
QWEN2_7B = PLACES | {
    "vision_token_id": 151654, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
PATCHES = {"num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "qwen2-vl-7b": QWEN2_7B | {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "max_position_embeddings": 32768,
        "vision_config": PATCHES | {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "in_chans": 3, "hidden_size": 3584,
            "spatial_patch_size": 14,
        },
    },
    "qwen2.5-vl-7b": QWEN2_7B | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "vision_config": PATCHES | {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "in_chans": 3,
            "out_hidden_size": 3584, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "qwen3-vl-8b": PLACES | {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": False,
        "text_config": {
            "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 12288, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
            "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000, "vocab_size": 151936,
        },
        "vision_config": PATCHES | {
            "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "model_type": "qwen3_vl",
            "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_configs_on_the_hub_are_those_of_the_bench_shapes(name: str) -> None:
    """Which leave out what is the families' own: so the defaults are right, and no released field is unknown."""
    family = architecture(ON_THE_HUB[name], name)
    config = family.read_config(ON_THE_HUB[name])
    assert config == family.read_config(SHAPES[name])
    assert not config.unknown_fields + config.vision.unknown_fields + config.text.unknown_fields
    assert [config.text.rope.streams.count(stream) for stream in range(3)] == (
        [24, 20, 20] if name == "qwen3-vl-8b" else [16, 24, 24]
    )


def test_keys_that_nobody_knows_are_named(tmp_path: Path) -> None:
    reference_model("qwen3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.visual.odd": torch.ones(32)}, path)
    with pytest.raises(InputError, match=r"1 unexpected: model\.visual\.odd"):
        load_ours(tmp_path)
    key = next(key for key in tensors if key.endswith("deepstack_merger_list.1.norm.bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(InputError, match=r"1 missing: .*deepstack_merger_list\.1\.norm\.bias"):
        load_ours(tmp_path)
