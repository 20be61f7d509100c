"""Qwen3-VL, dense (arXiv 2511.21631): Qwen3 as the language model, and a tower whose features enter at four places.

Patches have 16 pixels on a side, and learned positions beside the rotary ones: a square of positions, resampled to the
picture. Three further mergers take features from the middle of the tower (DeepStack), which are added to the image
tokens after the first layers of the language model. The frequencies of time, row and column alternate.

The legend is that of models/families/qwen2_vl.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.families.picture_model import Grid
from models.families.qwen2_vl import (
    EPS,
    Family,
    PatchEmbedding,
    Qwen2VLForConditionalGeneration,
    QwenVisionConfig,
    VisionBlock,
    VisionTower,
    read_config,
    read_vision_fields,
)
from models.layers import Embedding, activation_function
from models.passes import PictureRows
from models.read_config import ConfigReader
from weights.errors import InputError


def read_qwen3_vision(fields: ConfigReader) -> QwenVisionConfig:
    """Read the tower's config. Raises InputError for a field of the wrong type and for unfit positions or DeepStack."""
    defaults = {
        "depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"
    }  # fmt: skip
    values = read_vision_fields(fields, defaults)
    positions = fields.integer("num_position_embeddings", 2304)
    if math.isqrt(positions) ** 2 != positions:
        raise InputError(f"{fields.where}: num_position_embeddings must be a square, not {positions}")
    deepstack = fields.integers("deepstack_visual_indexes", (8, 16, 24))
    if sorted(set(deepstack)) != deepstack or not all(0 <= index < values["depth"] for index in deepstack):
        raise InputError(
            f"{fields.where}: deepstack_visual_indexes must name blocks of {values['depth']}, each once and in order"
        )
    return QwenVisionConfig(
        **values,
        out_hidden_size=fields.integer("out_hidden_size", 3584),
        intermediate_size=fields.integer("intermediate_size", 4304),
        position_side=math.isqrt(positions),
        deepstack=tuple(deepstack),
        unknown_fields=fields.finish(),
    )


class DeepMLP(nn.Module):
    """Feed-forward network of a vision block, with Qwen3-VL's names of weights."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation_function(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class DeepMerger(nn.Module):
    """PatchMerger with Qwen3-VL's names; normed_size: the norm is over one patch, or over all patches of a token."""

    def __init__(self, config: QwenVisionConfig, normed_size: int) -> None:
        super().__init__()
        self.normed_size, self.merged_size = normed_size, config.merged_size
        self.norm = nn.LayerNorm(normed_size, eps=EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Merge patches. x [P, W] -> [n, H]"""
        x = self.norm(x.view(-1, self.normed_size)).view(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class DeepTower(VisionTower):
    """A tower with learned positions that also returns features of middle blocks (DeepStack)."""

    def build(self) -> None:
        config = self.config
        self.patch_embed = PatchEmbedding(config, bias=True)
        self.pos_embed = Embedding(config.position_side**2, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, nn.LayerNorm, DeepMLP(config)) for _ in range(config.depth))
        self.merger = DeepMerger(config, config.hidden_size)
        mergers = (DeepMerger(config, config.merged_size) for _ in config.deepstack)
        self.deepstack_merger_list = nn.ModuleList(mergers)

    def learned_positions(self, grids: Sequence[Grid]) -> Tensor:
        """Resample the square of positions to the patches of each picture: float32 [P, W]"""
        side, merge = self.config.position_side, self.config.spatial_merge_size
        square = self.pos_embed.weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)      # [1, W, side, side]
        resampled = []
        for rows, columns in grids:
            size = (rows * merge, columns * merge)
            wide = F.interpolate(square, size, mode="bilinear", align_corners=True)[0]          # [W, Y, X]
            resampled.append(wide.unflatten(1, (rows, merge)).unflatten(3, (columns, merge)).permute(1, 3, 2, 4, 0))
        return torch.cat([one.flatten(0, 3) for one in resampled])

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compute the features of image tokens, then those of DeepStack. patches [P, C] -> [1 + mergers, n, H]"""
        x, (cos, sin), lengths = self.patch_embed(patches), self.rotary(grids), self.patches(grids)
        x = x + self.learned_positions(grids).to(x.dtype)                           # [P, W]
        taken, mergers = [], iter(self.deepstack_merger_list)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, lengths)
            if index in self.config.deepstack:
                taken.append(next(mergers)(x))
        return torch.stack([self.merger(x), *taken])


read_qwen3_vl_config = partial(read_config, Family(
    text={
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 128000, "rope_theta": 5e5,
    },
    sections=(24, 20, 20), interleaved=True, read_vision=read_qwen3_vision,
))  # fmt: skip


class Qwen3VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Vision tower with DeepStack and language model."""

    tower_class = DeepTower

    def place(
        self, tokens: Tensor, real: Tensor | None, features: Tensor | None, grids: Sequence[Grid], kept: int = 0
    ) -> tuple[Tensor, PictureRows | None]:
        x, pictures = super().place(tokens, real, None if features is None else features[0], grids, kept)
        if pictures is None or features is None:
            return x, pictures
        is_image = self.is_image(tokens[:, kept:]).unsqueeze(-1)                    # [B, T - kept, 1]
        added = [torch.zeros_like(x).masked_scatter(is_image, deeper.to(x.dtype)) for deeper in features[1:]]
        return x, replace(pictures, added=added)
