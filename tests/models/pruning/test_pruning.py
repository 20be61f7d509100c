"""The headline ratio and what it means for a model (POP, Table 8), and settings that make no sense."""

from typing import Any

import pytest

from models.pruning.resolve import LayerWeights, resolve
from popengine.studies.settings import PruningSettings
from weights.errors import InputError

# Public shapes: hidden size, FFN channels (of one expert), query heads, key/value heads, head size, experts per token.
# Attention and FFN sizes in millions of weights and the effective ratios in percent are the paper's (Table 8).
TABLE_8: dict[str, tuple[int, int, int, int, int, int, float, float, float, float]] = {
    "Llama-2-7B": (4096, 11008, 32, 32, 128, 1, 67.11, 135.27, 29.9, 59.8),
    "Llama-2-13B": (5120, 13824, 40, 40, 128, 1, 104.86, 212.34, 29.9, 59.8),
    "Llama-2-70B": (8192, 28672, 64, 8, 128, 1, 150.99, 704.64, 24.3, 48.6),
    "Llama-3.1-8B": (4096, 14336, 32, 8, 128, 1, 41.94, 176.16, 24.8, 49.5),
    "Llama-3.1-70B": (8192, 28672, 64, 8, 128, 1, 150.99, 704.64, 24.3, 48.6),
    "Qwen3-8B": (4096, 12288, 32, 8, 128, 1, 41.94, 150.99, 25.6, 51.1),
    "Qwen3-32B": (5120, 25600, 64, 8, 128, 1, 94.37, 393.22, 24.8, 49.6),
    "Qwen1.5-MoE-A2.7B": (2048, 1408, 16, 16, 128, 4, 16.78, 34.60, 29.7, 59.4),
    "Qwen2-57B-A14B": (3584, 2560, 28, 4, 128, 8, 29.36, 220.20, 22.7, 45.3),
    "Qwen3-30B-A3B": (2048, 768, 32, 4, 128, 8, 18.87, 37.75, 30.0, 60.0),
    "Qwen2-VL-7B": (3584, 18944, 28, 4, 128, 1, 29.36, 203.69, 22.9, 45.8),
    "Qwen2.5-VL-7B": (3584, 18944, 28, 4, 128, 1, 29.36, 203.69, 22.9, 45.8),
}


def layer(hidden: int, channels: int, heads: int, kv_heads: int, head_dim: int, experts: int = 1) -> LayerWeights:
    groups = kv_heads if kv_heads < heads else 1
    return LayerWeights(
        attention=2 * hidden * head_dim * (heads + kv_heads),
        ffn=3 * hidden * channels * experts,
        head=2 * hidden * head_dim,
        head_groups=groups,
        heads_per_group=heads // groups,
        layers=30,
    )


@pytest.mark.parametrize("name", TABLE_8)
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_effective_ratios_of_table_8(name: str, ratio: float) -> None:
    *shape, attention, ffn, at_20, at_40 = TABLE_8[name]
    weights = layer(*shape)  # type: ignore[arg-type]
    assert weights.attention / 1e6 == pytest.approx(attention, abs=0.006)
    assert weights.ffn / 1e6 == pytest.approx(ffn, abs=0.006)
    wanted = at_20 if ratio == 0.2 else at_40
    # 0.05 is the rounding of one printed decimal; a hair more, because the paper rounds 2 x the 20 % figure.
    assert 100 * resolve(PruningSettings.paper(ratio), weights).ffn_ratio == pytest.approx(wanted, abs=0.0501)


def test_heads_count_towards_the_headline_ratio() -> None:
    weights = layer(4096, 14336, 32, 8, 128)
    alone = resolve(PruningSettings.paper(0.2), weights)
    with_heads = resolve(PruningSettings.paper(0.2, head_ratio=0.25), weights)
    removed_heads = 8 * 2 * 4096 * 128
    assert with_heads.ratio == pytest.approx(alone.ratio) == pytest.approx(0.2)
    assert (alone.ffn_ratio - with_heads.ffn_ratio) * weights.ffn == pytest.approx(removed_heads)


def test_ffn_ratio_is_taken_as_it_is() -> None:
    weights = layer(4096, 14336, 32, 8, 128)
    pruning = resolve(PruningSettings.paper(ffn_ratio=0.5), weights)
    assert pruning.ffn_ratio == 0.5
    assert pruning.ratio == pytest.approx(0.5 * weights.ffn / (weights.ffn + weights.attention))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prune_ratio": 0.2, "ffn_ratio": 0.2}, "not both"),
        ({"prune_ratio": -0.1}, "prune ratio"),
        ({"prune_ratio": 1.0}, "prune ratio"),
        ({"prune_ratio": float("nan")}, "prune ratio"),
        ({"ffn_ratio": 1.5}, "ffn ratio"),
        ({"candidate_width": -0.1}, "candidate width"),
        ({"candidate_width": float("nan")}, "candidate width"),
        ({"head_ratio": 1.0}, "head ratio"),
        ({"prefill": "half"}, "prefill"),
    ],
)
def test_settings_out_of_range_are_one_line_errors(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PruningSettings.paper(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (PruningSettings.paper(0.9), "must stay below 0.808"),
        (PruningSettings.paper(0.02, head_ratio=0.5), "head ratio 0.5 alone"),
        (PruningSettings.paper(0.4, head_ratio=0.95), "leaves no query head"),
        (PruningSettings.paper(0.4, head_ratio=0.1), "turns off none of the 4 query heads"),
    ],
)
def test_ratios_that_the_model_cannot_give_are_refused(settings: PruningSettings, named: str) -> None:
    with pytest.raises(InputError, match=named):
        resolve(settings, layer(4096, 14336, 32, 8, 128))
