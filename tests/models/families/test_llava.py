"""LLaVA held to Hugging Face's, from tiny random models that the real loader reads, and the method with pictures in."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from builders import LLAVA_TINY, resolved
from safetensors.torch import load_file, save_file
from slow_masked import in_model_order, masked_decode
from slow_pop import SlowPOP
from tiny_llava import VARIANTS, load_ours, padded, pictures, prompt, reference_model
from tolerance import assert_same
from transformers import (
    LlavaForConditionalGeneration,
)

from models.families.llava import LlavaForConditionalGeneration as OurLlava
from models.families.llava import read_llava_config
from models.passes import prefill_pass
from models.pruning.evidence import channel_scores
from models.pruning.partition import partition_channels
from models.slots import AttentionPattern
from popengine.engine.run import next_logits
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    reference = reference_model(VARIANTS[request.param])
    directory = tmp_path_factory.mktemp("llava")
    reference.save_pretrained(directory)
    return reference, load_ours(directory)


def batches(model: OurLlava) -> dict[str, tuple[list[list[int]], int]]:
    return {
        "one picture": ([prompt(model, 3, 0, 6)], 1),
        "two pictures": ([prompt(model, 0, 4, 0, 5)], 2),
        "text only": ([prompt(model, 11)], 0),
        "a batch": ([prompt(model, 2, 0, 5), prompt(model, 9), prompt(model, 1, 0, 0, 3)], 3),
    }


@torch.no_grad()
def test_logits_equal_hugging_face_with_and_without_cache(pair: tuple) -> None:
    reference, ours = pair
    for prompts, count in batches(ours).values():
        tokens, real = padded(prompts)
        pixel_values = pictures(count) if count else None
        new = torch.tensor([[5, 1, 7], [1, 2, 3], [9, 9, 0]])[: len(tokens)]
        all_tokens = torch.cat([tokens, new], dim=1)
        all_real = torch.cat([real, torch.ones_like(new, dtype=torch.bool)], dim=1)
        expected = reference(all_tokens, pixel_values=pixel_values, attention_mask=all_real.long()).logits
        assert_same(ours(all_tokens, pixel_values, all_real)[all_real], expected[all_real])

        state = ours.language_model.new_state(len(tokens), all_tokens.shape[1], resolved(ours.language_model, DENSE))
        features = ours.encode_images(pixel_values) if count else None
        logits = ours.language_model.prefill(ours.embed(tokens, features), state, real)
        for step in range(new.shape[1]):
            assert_same(logits, expected[:, tokens.shape[1] - 1 + step])
            logits = next_logits(ours.language_model, new[:, step], state)


HUB_SPELLINGS = {
    "llava 1.5": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ],
    "transformers 5": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
    "transformers 4.52": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
    "no vision_model": [(r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.")],
}


@pytest.mark.parametrize("spelling", HUB_SPELLINGS)
@pytest.mark.parametrize("variant", ["grouped", "siglip full", "qwen2 tied", "mixtral"])
def test_every_spelling_of_the_keys_is_read(spelling: str, variant: str, tmp_path: Path) -> None:
    reference_model(VARIANTS[variant]).save_pretrained(tmp_path)
    expected = load_ours(tmp_path).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for pattern, name in HUB_SPELLINGS[spelling]:
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    save_file(tensors, path)
    found = load_ours(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_keys_that_play_no_part_are_let_be_and_others_are_named(tmp_path: Path) -> None:
    reference_model(VARIANTS["grouped"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert any("encoder.layers.2." in key for key in tensors)  # above the second to last state, never read
    assert any("post_layernorm" in key for key in tensors)
    load_ours(tmp_path)
    save_file(tensors | {"image_newline": torch.ones(32)}, path)
    with pytest.raises(InputError, match="1 unexpected: image_newline"):
        load_ours(tmp_path)
    key = next(key for key in tensors if key.endswith("multi_modal_projector.linear_1.bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(InputError, match=r"1 missing: .*multi_modal_projector\.linear_1\.bias"):
        load_ours(tmp_path)


def test_a_config_that_says_almost_nothing_takes_the_defaults() -> None:
    # What llava-1.5-7b-hf has on the Hub, less what says nothing about the computation.
    raw = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }  # fmt: skip
    with torch.device("meta"):
        full, bare = (OurLlava(read_llava_config(one)) for one in (raw, {"architectures": raw["architectures"]}))
    assert replace(full.config, text=bare.config.text) == bare.config
    assert not full.config.unknown_fields + full.config.vision.unknown_fields
    assert full.config.tokens_per_image == 576
    assert len(full.vision_tower.encoder.layers) == 23
    text = full.language_model.config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_layer": "last"}, "vision_feature_layer must be an integer or a list of integers"),
        ({"vision_feature_layer": 40}, "vision_feature_layer 40 is outside the vision tower's 24 layers"),
        ({"vision_feature_select_strategy": "cls"}, "'cls' is not one of default, full"),
        ({"text_config": {"model_type": "opt"}}, "text_config: model_type 'opt' is not one of llama, mistral"),
        ({"text_config": 3}, "text_config must be an object"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' is not one of clip_vision_model"),
        ({"image_token_index": "<image>"}, "image_token_index must be an integer"),
        ({"projector_hidden_act": "mish"}, "'mish' is not implemented"),
    ],
)
def test_a_config_that_cannot_be_is_one_clear_line(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        OurLlava(read_llava_config(fields))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaForConditionalGeneration, OurLlava]:
    reference = reference_model(VARIANTS["grouped"])
    directory = tmp_path_factory.mktemp("grouped")
    reference.save_pretrained(directory)
    return reference, load_ours(directory)


def test_features_that_do_not_fit_the_image_tokens_are_an_error(grouped: tuple) -> None:
    ours = grouped[1]
    features = ours.encode_images(pictures(2))
    with pytest.raises(InputError, match="9 image tokens, and the images have 18 feature vectors"):
        ours.embed(torch.tensor([prompt(ours, 3, 0, 2)]), features)
    with pytest.raises(InputError, match="9 image tokens, and the images have 0 feature vectors"):
        ours.embed(torch.tensor([prompt(ours, 3, 0, 2)]))


@torch.inference_mode()
def test_masked_and_active_decode_agree_with_pictures_in_the_prompt(grouped: tuple) -> None:
    model = deepcopy(grouped[1]).double()  # in float32 two candidates may come within rounding of each other
    tokens, real = padded([prompt(model, 2, 0, 6), prompt(model, 1, 0, 2, 0, 3)])
    x = model.embed(tokens, model.encode_images(pictures(3).double()))
    text = model.language_model
    for settings in (
        PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3),
        PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, prefill="dense"),
    ):
        pruned = text.new_state(2, 64, resolved(text, settings))
        logits = text.prefill(x, pruned, real)
        masked = text.new_state(2, 64, resolved(text, DENSE))
        in_model_order(pruned, masked)
        for _ in range(32):
            chosen = logits.argmax(-1)
            logits = next_logits(text, chosen, pruned)
            assert_same(masked_decode(text, chosen, pruned, masked), logits)


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_a_slow_implementation_with_hooks_gives_the_same_tokens(
    ratio: float, prefill: Literal["pruned", "dense"], tmp_path: Path
) -> None:
    reference = reference_model(VARIANTS["grouped"])
    reference.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    ids, pixel_values = prompt(ours, 2, 0, 3, 0, 8), pictures(2)
    settings = PruningSettings.paper(prune_ratio=ratio, candidate_width=0.3, prefill=prefill)
    pruning = resolved(ours.language_model, settings)
    with torch.inference_mode():
        state = ours.language_model.new_state(1, 128, pruning)
        x = ours.embed(torch.tensor([ids]), ours.encode_images(pixel_values))
        tokens = [int(ours.language_model.prefill(x, state).argmax())]
        while len(tokens) < 30:
            tokens.append(int(next_logits(ours.language_model, torch.tensor(tokens[-1:]), state).argmax()))
    slow = SlowPOP(reference, pruning.ffn_ratio, 0.3, prefill, layers=reference.model.language_model.layers)
    assert tokens == slow.generate(ids, 30, pixel_values=pixel_values)
    assert len(set(tokens)) > 5  # a sequence that repeats one token would prove little


def test_only_text_tokens_count_in_the_scores_when_asked(grouped: tuple) -> None:
    """Scores that leave out image tokens are those of channel_scores over the text tokens alone."""
    model = grouped[1]
    tokens = torch.tensor([prompt(model, 2, 0, 6)])
    is_text = ~model.is_image(tokens)
    with torch.inference_mode():
        x = model.embed(tokens, model.encode_images(pictures(1)))
        pruning = resolved(model.language_model, PruningSettings.paper(ffn_ratio=0.4))
        state = model.language_model.new_state(1, 64, pruning)
        orders = []
        for counted in (None, is_text):
            model.language_model.prefill(x, state, None, counted)
            orders.append(state.layers[0].ffn.partition.order.tolist())
        layer = model.language_model.model.layers[0]
        text = model.language_model
        step = prefill_pass(text.model.rotary, map(AttentionPattern, text.config.windows), x, None)
        after = x + layer.self_attn(layer.input_layernorm(x), step)
        h = layer.mlp.activation(layer.post_attention_layernorm(after))
        scores = channel_scores(h[is_text][None], layer.mlp.down_norms())
        expected = partition_channels(scores, state.layers[0].ffn.sizes)
    assert orders[1] == expected.order.tolist()
    assert orders[0] != orders[1]


def test_layers_of_the_tower_count_among_the_blocks() -> None:
    raw = json.loads((LLAVA_TINY / "config.json").read_text())
    layers = raw["text_config"]["num_hidden_layers"], raw["vision_config"]["num_hidden_layers"]
    assert read_llava_config(raw).blocks == sum(layers)


def test_loading_does_not_import_pytorchs_compiler() -> None:
    loading = f"import sys, popengine; popengine.load({str(LLAVA_TINY)!r})"
    program = f"{loading}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
