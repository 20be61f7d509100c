"""The vision towers held to Hugging Face's, from tiny random models."""

import pytest
import torch
from tolerance import assert_same
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from models.families.clip import VisionTower, read_vision_config
from weights.errors import InputError

pytestmark = pytest.mark.numeric

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 6,  # does not divide the image: the last pixels are left out
}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("read", [[-2], [-1], [0], [1, -1], [-4, 3]])
def test_clip_tower_equals_hugging_face(hidden_act: str, read: list[int]) -> None:
    torch.manual_seed(0)
    reference = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act=hidden_act)).eval()
    assert_tower_equals(reference, read)


@pytest.mark.parametrize("read", [[-2], [-1], [0, 2]])
def test_siglip_tower_equals_hugging_face(read: list[int]) -> None:
    torch.manual_seed(0)
    reference = SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval()
    assert_tower_equals(reference, read)


def assert_tower_equals(reference: torch.nn.Module, read: list[int]) -> None:
    for parameter in reference.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    tower = VisionTower(read_vision_config(reference.config.to_dict()), read)
    state = reference.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    pixel_values = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        states = reference(pixel_values, output_hidden_states=True).hidden_states
        expected = torch.cat([states[index] for index in read], dim=-1)
        assert_same(tower(pixel_values), expected)


def test_layers_that_are_never_read_are_not_built() -> None:
    config = read_vision_config(SIZES)
    assert len(VisionTower(config, [-2]).encoder.layers) == 2
    assert len(VisionTower(config, [0]).encoder.layers) == 0


def test_missing_fields_take_the_documented_defaults() -> None:
    for ours, reference in [
        (read_vision_config({}), CLIPVisionConfig()),
        (read_vision_config({"model_type": "siglip_vision_model"}), SiglipVisionConfig()),
    ]:
        assert not ours.unknown_fields
        for name in (*SIZES, "hidden_act", "layer_norm_eps", "num_channels"):
            assert getattr(ours, name) == getattr(reference, name), name


def test_a_tower_that_cannot_be_is_one_clear_line() -> None:
    for raw, message in [
        ({"model_type": "dinov2"}, "'dinov2' is not one of clip_vision_model, siglip_vision_model"),
        ({"hidden_size": 30}, r"hidden_size \(30\) must be a multiple of num_attention_heads \(12\)"),
        ({"patch_size": 0}, "patch_size must be an integer"),
        ({"patch_size": 999}, "must not be larger than image_size"),
        ({"num_channels": 1}, "num_channels must be 3"),
        ({"image_size": [224, 224]}, "image_size must be an integer"),
    ]:
        with pytest.raises(InputError, match=message):
            read_vision_config(raw)
    with pytest.raises(InputError, match="vision_feature_layer 4 is outside the vision tower's 3 layers"):
        VisionTower(read_vision_config(SIZES | {"num_attention_heads": 4}), [4])
