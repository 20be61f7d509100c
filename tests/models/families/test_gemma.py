"""Gemma-3 held to Hugging Face's, from tiny random models that the real loader reads: text, and text with pictures."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders import SIZES, greedy, left_padded, ours, prefilled, resolved, saved_pair
from safetensors.torch import load_file, save_file
from slow_pop import SlowPOP
from slow_prefill import SlowPrefillOnly
from tiny_gemma import BEGIN, END, IMAGE, LINEAR, PICTURE_VARIANTS, TEXT, VISION, picture_config, reference_model
from tolerance import assert_same
from torch import Tensor
from transformers import Gemma3TextConfig

from models.cost_model import layer_weights
from models.families.gemma3 import (
    GLOBAL_THETA,
    LOCAL_THETA,
    Gemma3ForCausalLM,
    read_gemma3_config,
    read_gemma3_text_config,
)
from models.families.gemma3 import Gemma3ForConditionalGeneration as OurGemma
from models.pruning.pruning import Pruning
from models.pruning.resolve import resolve
from popengine.benchmark.shapes import SHAPES
from popengine.engine.loading import load_model
from popengine.engine.run import next_logits
from popengine.studies.recording import Watch, watched
from popengine.studies.settings import DENSE, PruningSettings
from weights.checkpoint import open_checkpoint
from weights.errors import InputError

VARIANTS: dict[str, Any] = {
    "every third sees all": Gemma3TextConfig(**TEXT),
    "layer types": Gemma3TextConfig(**TEXT, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "rope scaling": Gemma3TextConfig(**TEXT, rope_parameters=LINEAR),
    "own scale": Gemma3TextConfig(**TEXT | {"num_key_value_heads": 1}, query_pre_attn_scalar=5),
    "biases, untied": Gemma3TextConfig(**TEXT, attention_bias=True, tie_word_embeddings=False),
    "soft cap": Gemma3TextConfig(**TEXT, final_logit_softcapping=3.0),
    "window over all": Gemma3TextConfig(**TEXT | {"sliding_window": 64, "num_key_value_heads": 4}),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_equal_hugging_face_with_and_without_cache(name: str, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS[name])
    assert isinstance(model, Gemma3ForCausalLM)
    assert not model.config.unknown_fields
    tokens, real = left_padded([24, 17, 14], SIZES["vocab_size"])
    wanted = reference(tokens[:1]).logits
    assert wanted.std() > 0.1
    assert_same(model(tokens[:1]), wanted)
    positions, prompt = (real.cumsum(1) - 1).clamp(min=0), 12
    wanted = reference(tokens, attention_mask=real.long(), position_ids=positions).logits
    assert_same(model(tokens, real)[real], wanted[real])
    logits, state = prefilled(model, tokens[:, :prompt], DENSE, real[:, :prompt])
    for slot in range(prompt, tokens.shape[1]):
        assert_same(logits, wanted[:, slot - 1])
        logits = next_logits(model, tokens[:, slot], state)


@torch.inference_mode()
def test_half_precision_rounds_where_hugging_face_does(tmp_path: Path) -> None:
    """Norms are float32 to the end, and the embedding's scale is rounded first."""
    reference, _ = saved_pair(tmp_path, VARIANTS["every third sees all"])
    tokens, _ = left_padded([24], SIZES["vocab_size"])
    model, theirs = ours(tmp_path, torch.bfloat16), reference.bfloat16()
    assert torch.equal(model.embed(tokens), theirs.model.embed_tokens(tokens))
    x = model.embed(tokens)
    assert torch.equal(model.model.layers[0].input_layernorm(x), theirs.model.layers[0].input_layernorm(x))


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_pop_gives_the_tokens_of_a_slow_implementation(
    ratio: float, prefill: Literal["pruned", "dense"], tmp_path: Path
) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS["biases, untied"])
    pruning = resolved(model, PruningSettings.paper(prune_ratio=ratio, candidate_width=0.3, prefill=prefill))
    prompt, _ = left_padded([14], SIZES["vocab_size"])
    tokens = greedy(model, prompt[0].tolist(), 48, pruning)
    assert tokens == SlowPOP(reference, pruning.ffn_ratio, 0.3, prefill).generate(prompt[0].tolist(), 48)
    assert len(set(tokens)) > 5     # a sequence that repeats one token would prove little


@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("skipped", [1, 2])
def test_prefill_only_gives_the_tokens_of_a_slow_implementation(boundary: int, skipped: int, tmp_path: Path) -> None:
    reference, model = saved_pair(tmp_path, VARIANTS["biases, untied"])
    prompt = left_padded([14], SIZES["vocab_size"])[0][0].tolist()
    settings = PruningSettings.paper(prune_ratio=0, prefill_skip=f"{skipped}/3", boundary_tokens=boundary)
    tokens = greedy(model, prompt, 48, settings)
    assert tokens == SlowPrefillOnly(reference, skipped, boundary).generate(prompt, 48)
    assert len(set(tokens)) > 5


@pytest.mark.parametrize(("name", "at_20"), [("270m", 28.3), ("1b", 22.5), ("4b", 24.0), ("12b", 25.3), ("27b", 23.8)])
def test_ratios_of_the_released_shapes(name: str, at_20: float) -> None:
    """r from sizes alone, as the paper's Table 8: what attention has of a layer, feed-forward networks give besides."""
    shape = SHAPES[f"gemma-3-{name}"]
    with torch.device("meta"):
        weights = layer_weights(Gemma3ForCausalLM(read_gemma3_text_config(shape)))
    heads = 2 * (shape.get("num_attention_heads", 8) + shape.get("num_key_value_heads", 4)) * shape["head_dim"]
    assert weights.attention == shape["hidden_size"] * heads
    assert weights.ffn == 3 * shape["hidden_size"] * shape["intermediate_size"]
    for ratio, wanted in ((0.2, at_20), (0.4, 2 * at_20)):
        assert 100 * resolve(PruningSettings.paper(ratio), weights).ffn_ratio == pytest.approx(wanted, abs=0.11)


def test_a_config_that_says_almost_nothing_takes_the_defaults() -> None:
    """text_config of the 4 billion model, as it is released, and of one that says nothing at all."""
    released = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    for raw in ({}, released):
        config, full = read_gemma3_text_config(raw), Gemma3TextConfig(**raw)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                      "tie_word_embeddings", "query_pre_attn_scalar"):
            assert getattr(config, field) == getattr(full, field), field
        assert config.hidden_act == full.hidden_activation
        assert list(config.windows) == [
            full.sliding_window if kind == "sliding_attention" else None for kind in full.layer_types
        ]
        for rope, kind in ((config.rope, "full_attention"), (config.local_rope, "sliding_attention")):
            theirs = full.rope_parameters[kind]
            assert (rope.theta, rope.rope_type) == (theirs["rope_theta"], theirs["rope_type"])
            assert rope.factor == theirs.get("factor", 1.0)
        assert not config.unknown_fields
    assert (config.rope.theta, config.local_rope.theta) == (GLOBAL_THETA, LOCAL_THETA)


def test_both_spellings_of_rope_read_alike() -> None:
    new = json.loads(VARIANTS["rope scaling"].to_json_string(use_diff=False))
    old = {name: value for name, value in new.items() if name != "rope_parameters"} | {
        "rope_theta": 1e4, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert read_gemma3_text_config(new) == read_gemma3_text_config(old)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not one of gemma3_text"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_type is not a kind of layer"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "RoPE type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a positive number"),
        ({"rope_local_base_freq": "high"}, "rope_local_base_freq must be a positive number"),
        ({"sliding_window": 0}, "sliding_window must be an integer"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ({"hidden_activation": "mish"}, "'mish' is not implemented"),
        ({"head_dim": 15}, "head_dim must be even"),
    ],
)
def test_what_is_not_implemented_or_cannot_be_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named), torch.device("meta"):
        Gemma3ForCausalLM(read_gemma3_text_config(TEXT | change))


def load_pictured(folder: Path) -> OurGemma:
    with open_checkpoint(folder) as checkpoint:
        model, _ = load_model(checkpoint, torch.float32, torch.device("cpu"))
    assert isinstance(model, OurGemma)
    return model


@pytest.fixture(scope="module", params=PICTURE_VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    reference = reference_model(PICTURE_VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("gemma")
    reference.save_pretrained(folder)
    return reference, load_pictured(folder)


def prompt(*parts: int) -> list[int]:
    """Text tokens, as many as each number says (0: a picture)."""
    tokens: list[int] = []
    for part in parts:
        text = [(7 * len(tokens) + i) % 80 + 1 for i in range(part)]
        tokens += text if part else [BEGIN, *[IMAGE] * 9, END]
    return tokens


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(count))


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    real = torch.tensor([[False] * (longest - len(ids)) + [True] * len(ids) for ids in prompts])
    return torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]), real


BATCHES = {
    "one picture": ([prompt(3, 0, 6)], 1),
    "pictures at both ends": ([prompt(0, 4, 0)], 2),
    "side by side": ([[5, *[IMAGE] * 18, 7, 8]], 2),
    "text only": ([prompt(17)], 0),
    "a batch": ([prompt(2, 0, 5), prompt(9), prompt(1, 0, 0, 3)], 3),
}


@pytest.mark.parametrize("batch", BATCHES)
@torch.inference_mode()
def test_logits_with_pictures_equal_hugging_face(pair: tuple, batch: str) -> None:
    """Without a cache and with one: the picture's rows see each other, those after them see as text does."""
    reference, model = pair
    prompts, count = BATCHES[batch]
    tokens, real = padded(prompts)
    pixel_values = pictures(count) if count else None
    new = torch.tensor([[5, 1, 7], [1, 2, 3], [9, 9, 4]])[: len(tokens)]
    all_tokens = torch.cat([tokens, new], dim=1)
    all_real = torch.cat([real, torch.ones_like(new, dtype=torch.bool)], dim=1)
    wanted = reference(
        all_tokens, pixel_values=pixel_values, attention_mask=all_real.long(),
        position_ids=(all_real.cumsum(1) - 1).clamp(min=0), token_type_ids=(all_tokens == IMAGE).long(),
    ).logits
    assert_same(model(all_tokens, pixel_values, all_real)[all_real], wanted[all_real])
    state = model.language_model.new_state(len(tokens), all_tokens.shape[1], resolved(model.language_model, DENSE))
    features = None if pixel_values is None else model.encode_images(pixel_values)
    x, rows = model.place(tokens, real, features)
    logits = model.language_model.prefill(x, state, real, pictures=rows)
    for step in range(new.shape[1]):
        assert_same(logits, wanted[:, tokens.shape[1] - 1 + step])
        logits = next_logits(model.language_model, new[:, step], state)


@torch.inference_mode()
def test_the_soft_cap_of_logits_holds_with_pictures_where_transformers_forgets_it(tmp_path: Path) -> None:
    reference = reference_model(picture_config(final_logit_softcapping=3.0))
    reference.save_pretrained(tmp_path)
    tokens, pixel_values = torch.tensor([prompt(3, 0, 6)]), pictures(1)
    theirs = reference(tokens, pixel_values=pixel_values, token_type_ids=(tokens == IMAGE).long()).logits
    assert theirs.abs().max() > 3
    ours = load_pictured(tmp_path)(tokens, pixel_values)
    assert_same(ours, 3 * torch.tanh(theirs / 3))


@torch.inference_mode()
def test_a_picture_of_the_released_geometry_has_256_tokens(tmp_path: Path) -> None:
    """896 pixels in patches of 14, of which 4 x 4 make a token: means and their order are transformers'."""
    config = picture_config()
    config.vision_config.image_size, config.vision_config.patch_size = 896, 14
    config.vision_config.num_hidden_layers, config.mm_tokens_per_image = 1, 256
    reference = reference_model(config)
    reference.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 896, 896, generator=torch.Generator().manual_seed(0))
    wanted = reference.get_image_features(pixel_values).pooler_output
    assert wanted.shape == (1, 256, 48)
    assert_same(load_pictured(tmp_path).encode_images(pixel_values), wanted)


@torch.inference_mode()
def test_what_looks_both_ways_is_there(pair: tuple) -> None:
    """That the test above can fail: without blocks the logits are others."""
    model = pair[1]
    tokens = torch.tensor([prompt(3, 0, 6)])
    x, rows = model.place(tokens, None, model.encode_images(pictures(1)))
    causal, both_ways = (model.language_model.forward_embedded(x, None, given) for given in (None, rows))
    assert (causal - both_ways).abs().max() > 1e-2


@pytest.mark.parametrize("kept", [4, 15, 17])
@torch.inference_mode()
def test_a_prompt_in_two_pieces_gives_the_same(pair: tuple, kept: int) -> None:
    """More of a prompt with pictures behind what the cache holds, as a conversation's next turn."""
    model = pair[1]
    text, ids = model.language_model, prompt(3, 0, 2, 0, 6)
    features, settings = model.encode_images(pictures(2)), resolved(model.language_model, DENSE)
    whole, parts = (text.new_state(1, 64, settings) for _ in range(2))
    x, rows = model.place(torch.tensor([ids]), None, features)
    wanted = text.prefill(x, whole, pictures=rows)
    seen = ids[:kept].count(IMAGE) // 9
    x, rows = model.place(torch.tensor([ids[:kept]]), None, features[:seen] if seen else None)
    text.prefill(x, parts, pictures=rows)
    x, rows = model.place(torch.tensor([ids]), None, features[seen:], kept=kept)
    assert_same(text.prefill(x, parts, kept=kept, pictures=rows), wanted)


@torch.inference_mode()
def tokens_after(model: OurGemma, ids: list[int], pixel_values: Tensor, count: int, pruning: Pruning) -> list[int]:
    state = model.language_model.new_state(1, 128, pruning)
    x, rows = model.place(torch.tensor([ids]), None, model.encode_images(pixel_values))
    tokens = [int(model.language_model.prefill(x, state, pictures=rows).argmax())]
    while len(tokens) < count:
        tokens.append(int(next_logits(model.language_model, torch.tensor(tokens[-1:]), state).argmax()))
    return tokens


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_pop_with_pictures_gives_the_tokens_of_a_slow_implementation(
    ratio: float, prefill: Literal["pruned", "dense"], pair: tuple
) -> None:
    reference, model = pair
    ids, pixel_values = prompt(2, 0, 3, 0, 8), pictures(2)
    settings = PruningSettings.paper(prune_ratio=ratio, candidate_width=0.3, prefill=prefill)
    pruning = resolved(model.language_model, settings)
    tokens = tokens_after(model, ids, pixel_values, 48, pruning)
    slow = SlowPOP(reference, pruning.ffn_ratio, 0.3, prefill, layers=reference.model.language_model.layers)
    types = (torch.tensor([ids]) == IMAGE).long()
    try:
        assert tokens == slow.generate(ids, 48, pixel_values=pixel_values, token_type_ids=types)
    finally:
        slow.remove_hooks()


@pytest.mark.parametrize("boundary", [1, 4])
def test_prefill_only_with_pictures_gives_the_tokens_of_a_slow_implementation(boundary: int, pair: tuple) -> None:
    reference, model = pair
    ids, pixel_values = prompt(2, 0, 3, 0, 8), pictures(2)
    settings = PruningSettings.paper(prune_ratio=0, prefill_skip="1/3", boundary_tokens=boundary)
    tokens = tokens_after(model, ids, pixel_values, 48, resolved(model.language_model, settings))
    types = (torch.tensor([ids[:-boundary]]) == IMAGE).long()
    slow = SlowPrefillOnly(reference, 1, boundary, body=reference.model.language_model)
    assert tokens == slow.generate(ids, 48, pixel_values=pixel_values, token_type_ids=types)


@torch.inference_mode()
def test_a_boundary_within_a_picture_sees_all_of_it(pair: tuple) -> None:
    """In a layer that the prompt skips the boundary's rows look at the cache, and there at those after them too."""
    model = pair[1]
    text, ids = model.language_model, prompt(3, 0)[:-1]
    x, rows = model.place(torch.tensor([ids]), None, model.encode_images(pictures(1)))
    seen: dict[Any, Tensor] = {}

    class Heads(Watch):
        def heads(self, attention: Any, a: Tensor) -> None:
            seen[attention] = a

    last = text.model.layers[-1].self_attn
    text.prefill(x, watched(text.new_state(1, 64, resolved(text, DENSE)), Heads()), pictures=rows)
    wanted = seen[last]                                                             # [1, T, N D]
    skipping = PruningSettings.paper(prune_ratio=0, prefill_skip="1/3", boundary_tokens=5)
    text.prefill(x, watched(text.new_state(1, 64, resolved(text, skipping)), Heads()), pictures=rows)
    assert_same(seen[last], wanted[:, -5:])


HUB_SPELLINGS = {
    "released": [
        (r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ],
    "transformers 5": [
        (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
    "transformers 4.52": [
        (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
}  # fmt: skip


@pytest.mark.parametrize("spelling", HUB_SPELLINGS)
def test_every_spelling_of_the_keys_is_read_and_no_other(spelling: str, tmp_path: Path) -> None:
    reference_model(PICTURE_VARIANTS["a wider one"]).save_pretrained(tmp_path)
    expected = load_pictured(tmp_path).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for pattern, name in HUB_SPELLINGS[spelling]:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, path)
    found = load_pictured(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    save_file(tensors | {"multi_modal_projector.linear_1.bias": torch.ones(4)}, path)
    with pytest.raises(InputError, match=r"1 unexpected: multi_modal_projector\.linear_1\.bias"):
        load_pictured(tmp_path)


def test_the_released_config_of_a_model_with_pictures() -> None:
    """Of the 4 billion model, less what says nothing about the computation."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip
    config = read_gemma3_config(raw)
    assert not config.unknown_fields + config.text.unknown_fields + config.vision.unknown_fields
    assert (config.tokens_per_image, config.pooled, config.text.vocab_size) == (256, 4, 262_208)
    assert config.text.tie_word_embeddings
    bare = read_gemma3_config({name: raw[name] for name in ("text_config", "vision_config")})
    assert bare == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model' is not one of siglip"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type 'llama' is not one of gemma3_text"),
        ({"mm_tokens_per_image": 8}, r"mm_tokens_per_image \(8\) must be a square"),
        ({"mm_tokens_per_image": 16}, "divides the 6 patches"),
        ({"vision_config": VISION | {"image_size": 3}}, "patch_size .* must not be larger than image_size"),
        ({"image_token_index": "<image>"}, "image_token_index must be an integer"),
        ({"text_config": {"attn_logit_softcapping": 30.0}}, "text_config: attn_logit_softcapping = 30.0"),
    ],
)
def test_a_config_with_pictures_that_cannot_be_is_one_clear_line(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_gemma3_config({"vision_config": VISION, "mm_tokens_per_image": 9} | fields)
