"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with another tower, in which most blocks attend to a window of the picture.

Its blocks have RMSNorm and a gated network with biases. All but a few attend within windows of 112 pixels, so tokens
are ordered by window before the first block and reordered after the merger.

The legend is that of models/families/qwen2_vl.py.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.families.picture_model import Grid
from models.families.qwen2_vl import (
    QWEN2_FAMILY,
    Family,
    PatchEmbedding,
    PatchMerger,
    Qwen2VLForConditionalGeneration,
    QwenVisionConfig,
    VisionBlock,
    VisionTower,
    read_config,
    read_vision_fields,
)
from models.layers import RMSNorm, activation_function
from models.read_config import ConfigReader
from weights.errors import InputError


def read_qwen2_5_vision(fields: ConfigReader) -> QwenVisionConfig:
    """Read the tower's config. Raises InputError for a field of the wrong type and for a window below one token."""
    defaults = {"depth": 32, "hidden_size": 3584, "num_heads": 16, "patch_size": 14, "hidden_act": "silu"}
    values = read_vision_fields(fields, defaults)
    window, token = fields.integer("window_size", 112), values["patch_size"] * values["spatial_merge_size"]
    if window < token:
        raise InputError(f"{fields.where}: window_size ({window}) must be at least a token's {token} pixels")
    return QwenVisionConfig(
        **values,
        out_hidden_size=fields.integer("out_hidden_size", 3584),
        intermediate_size=fields.integer("intermediate_size", 3420),
        window_tokens=window // token,
        whole_blocks=frozenset(fields.integers("fullatt_block_indexes", (7, 15, 23, 31))),
        unknown_fields=fields.finish(),
    )


class GatedVisionMLP(nn.Module):
    """Gated feed-forward network of a vision block, with biases."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation_function(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class WindowedTower(VisionTower):
    """A tower in which most blocks attend within windows."""

    def build(self) -> None:
        config = self.config
        self.patch_embed = PatchEmbedding(config, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, RMSNorm, GatedVisionMLP(config)) for _ in range(config.depth))
        self.merger = PatchMerger(config, RMSNorm)

    def windows(self, grids: Sequence[Grid]) -> tuple[Tensor, list[int]]:
        """Return the tokens ordered by window, int64 [n], and the number of patches in each window."""
        side, per_token = self.config.window_tokens, self.config.spatial_merge_size**2
        first, order, sizes = 0, [], []
        for rows, columns in grids:
            index = torch.arange(rows * columns, device=self.frequencies.device)
            window = index // columns // side * -(-columns // side) + index % columns // side       # of each token
            order.append(first + window.argsort(stable=True))
            sizes += [
                min(side, rows - y) * min(side, columns - x) * per_token
                for y in range(0, rows, side) for x in range(0, columns, side)
            ]
            first += rows * columns
        return torch.cat(order), sizes

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compute the features of image tokens. patches [P, C] -> [n, H]"""
        order, windows = self.windows(grids)
        pictures, patches_per_token = self.patches(grids), self.config.spatial_merge_size**2

        def by_window(of_patches: Tensor) -> Tensor:
            return of_patches.unflatten(0, (-1, patches_per_token))[order].flatten(0, 1)

        cos, sin = (by_window(part[0])[None] for part in self.rotary(grids))
        x = by_window(self.patch_embed(patches))                                    # [P, W]
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, pictures if index in self.config.whole_blocks else windows)
        return self.merger(x)[order.argsort()]


read_qwen2_5_vl_config = partial(read_config, Family(**QWEN2_FAMILY, read_vision=read_qwen2_5_vision))


class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Windowed vision tower and language model."""

    tower_class = WindowedTower
