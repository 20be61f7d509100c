"""A dense model as a mixture of experts: all experts to each token are the dense model, and groups are equal."""

from pathlib import Path

import pytest
import torch
from builders import REPOSITORY, complete_checkpoint
from tolerance import distance

from models.experts import MixtureOfExperts
from popengine.engine.loading import load


@pytest.mark.parametrize("per_token", [4, 2])
def test_a_mixture_of_a_dense_models_channels(
    per_token: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from mixture_from_dense import FLAT, convert

    dense = complete_checkpoint(tmp_path / "dense")
    (tmp_path / "text").write_text("When the last ferry had gone, the keeper closed the gate and counted. " * 12)
    convert(dense, tmp_path / "text", 4, 4, per_token, tmp_path / "mixture")
    one, other = load(dense, device="cpu", dtype="float32"), load(tmp_path / "mixture", device="cpu", dtype="float32")
    mixtures = [layer.mlp for layer in other.model.model.layers]
    assert all(isinstance(mlp, MixtureOfExperts) and mlp.experts_per_token == per_token for mlp in mixtures)
    for layer, mlp in zip(one.model.model.layers, mixtures, strict=True):
        rows = torch.cat([expert.gate_proj.values() for expert in mlp.experts])
        assert sorted(rows[:, 0].tolist()) == sorted(layer.mlp.gate_proj.values()[:, 0].tolist())
    tokens = torch.tensor([one.prompts.ids("The keeper counted", raw=True)])
    with torch.inference_mode():
        wanted, found = one.model(tokens), other.model(tokens)
    # All experts weigh alike but for the router's logits, FLAT times a cosine: each of three layers adds such an error.
    assert distance(found, wanted) < 10 * FLAT if per_token == 4 else distance(found, wanted) > 10 * FLAT
