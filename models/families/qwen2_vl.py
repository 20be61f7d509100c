"""Qwen2-VL (arXiv 2409.12191): pictures of any size, and positions by time, row and column.

A picture is cut into patches of 14 x 14 pixels (each twice: a video would have two frames there). They pass a vision
transformer whose rotary positions are rows and columns; four neighbours become one image token. The language model is
Qwen2's, in which each pair of coordinates is rotated by one of three positions (M-RoPE). In a text all three are
equal, a picture has its own rows and columns, and the tokens after it continue from the largest position.

Qwen2.5-VL and Qwen3-VL have files of their own for their differences; config, attention, placing and positions are
here.

B batch, T prompt tokens, H hidden size of the language model; W hidden size of the tower, P patches of all pictures,
C numbers of a patch, N heads, D head size, n image tokens of all pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import LlamaConfig, RopeConfig
from models.families.picture_model import Grid, PictureConfig, PictureModel
from models.key_names import INNER_TEXT_SPELLINGS
from models.layers import activation_function, at_least_float32, rotate
from models.llama import LlamaForCausalLM
from models.passes import PictureRows
from models.read_config import MOST_LAYERS, ConfigReader, read_llama_config, refuse_rope_outside, rope_section
from models.rope import rotary_frequencies
from weights.errors import InputError

COLOURS = 3
# Epsilon of every norm in the towers; configs do not have it.
EPS = 1e-6
# Fields of a vision_config that repeat others, or that only a video needs.
UNUSED_FIELDS = ("spatial_patch_size", "tokens_per_second")


@dataclass(frozen=True)
class QwenVisionConfig:
    """Configuration of a tower; (2.5) and (3) mark fields of Qwen2.5-VL and Qwen3-VL alone.

    hidden_size         W; out_hidden_size: of the language model
    spatial_merge_size  side, in patches, of the square that becomes one token
    window_tokens       side of a window in tokens (2.5); whole_blocks: blocks that attend to the whole picture
    position_side       rows and columns of the learned positions (3)
    deepstack           blocks after which features are taken for the first layers of the language model (3)
    """

    depth: int
    hidden_size: int
    out_hidden_size: int
    intermediate_size: int
    num_heads: int
    hidden_act: str
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    rope_theta: float
    window_tokens: int = 0
    whole_blocks: frozenset[int] = frozenset()
    position_side: int = 0
    deepstack: tuple[int, ...] = ()
    unknown_fields: tuple[str, ...] = ()

    @property
    def merged_size(self) -> int:
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of the dimensions that its tensors have."""
        patch = max(self.patch_size, self.temporal_patch_size)
        return 3 * self.hidden_size, self.merged_size, self.out_hidden_size, self.intermediate_size, patch

    @property
    def blocks(self) -> int:
        """Number of blocks with matrices of their own: those of the tower, and the DeepStack mergers."""
        return self.depth + len(self.deepstack)


@dataclass(frozen=True)
class QwenVLConfig(PictureConfig):
    """Configuration of tower and language model. image_token_index is config.json's image_token_id."""

    text: LlamaConfig
    vision: QwenVisionConfig
    image_token_index: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Defaults and rules for reading a family's config.json.

    text         defaults of text_config (transformers' documented ones); its model_type decides the kind of layers
    sections     default numbers of frequencies for time, row and column
    interleaved  True if frequencies of time, row and column alternate; False if they are consecutive
    read_vision  reads the tower's config
    """

    text: Mapping[str, Any]
    sections: tuple[int, int, int]
    interleaved: bool
    read_vision: Callable[[ConfigReader], QwenVisionConfig]


def read_vision_fields(fields: ConfigReader, defaults: Mapping[str, Any], width: str = "hidden_size") -> dict[str, Any]:
    """Read the fields that the towers of all families share. width: name of the field that is W"""
    fields.read.update(UNUSED_FIELDS)
    rope = fields.section("rope_parameters")
    rope.text("rope_type", "axial", ("axial",))
    for name in ("in_channels", "in_chans"):
        if (colours := fields.integer(name, COLOURS)) != COLOURS:
            raise InputError(f"{fields.where}: {name} must be 3 (pictures are read as RGB), not {colours}")
    values = {name: fields.integer(name, defaults[name]) for name in ("num_heads", "patch_size")}
    values |= {name: fields.integer(name, 2) for name in ("temporal_patch_size", "spatial_merge_size")}
    hidden_size = fields.integer(width, defaults[width])
    if hidden_size % (4 * values["num_heads"]):
        raise InputError(
            f"{fields.where}: {width} ({hidden_size}) must be a multiple of four times num_heads "
            f"({values['num_heads']}): a head turns by row and by column"
        )
    return values | {
        "hidden_size": hidden_size,
        "depth": fields.integer("depth", defaults["depth"], most=MOST_LAYERS),
        "hidden_act": fields.text("hidden_act", defaults["hidden_act"]),
        "rope_theta": rope.number("rope_theta", 10000.0),
    }


def read_qwen2_vision(fields: ConfigReader) -> QwenVisionConfig:
    """Read the tower's config. Raises InputError for a field of the wrong type."""
    defaults = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14, "hidden_act": "quick_gelu"}
    values = read_vision_fields(fields, defaults, width="embed_dim")
    return QwenVisionConfig(
        **values,
        out_hidden_size=fields.integer("hidden_size", 3584),
        intermediate_size=int(values["hidden_size"] * fields.number("mlp_ratio", 4)),
        unknown_fields=fields.finish(),
    )


def read_config(family: Family, raw: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """Read a QwenVLConfig from a parsed config.json; missing fields get the family's defaults.

    Raises InputError for a field of the wrong type, for numbers that contradict each other and for features that are
    not implemented.
    """
    fields = ConfigReader(raw, where)
    fields.read.add("vision_token_id")
    vision = family.read_vision(ConfigReader(fields.section("vision_config").raw, f"{where}: vision_config"))
    names = ("vision_start", 151652), ("vision_end", 151653), ("image", 151655), ("video", 151656)
    tokens = {f"{name}_token_id": fields.integer(f"{name}_token_id", default, 0) for name, default in names}
    tied = fields.boolean("tie_word_embeddings", False)
    # Older checkpoints have the language model's fields beside vision_config, some have them twice.
    nested = fields.section("text_config").raw
    beside = {name: value for name, value in raw.items() if name not in fields.read}
    text = read_text_config(family, nested or beside, f"{where}: text_config" if nested else where, tied)
    fields.read.update(nested or beside)
    refuse_rope_outside(fields, text.rope)
    if text.hidden_size != vision.out_hidden_size:
        raise InputError(
            f"{where}: the tower makes features of size {vision.out_hidden_size}, and the language model has "
            f"{text.hidden_size}"
        )
    if len(vision.deepstack) > text.num_hidden_layers:
        raise InputError(
            f"{where}: deepstack_visual_indexes has {len(vision.deepstack)} blocks for {text.num_hidden_layers} layers"
        )
    return QwenVLConfig(text, vision, tokens.pop("image_token_id"), **tokens, unknown_fields=fields.finish())


def read_text_config(family: Family, given: Mapping[str, Any], where: str, tied: bool) -> LlamaConfig:
    """Read the language model's config, Qwen2's or Qwen3's, with the position index of each frequency."""
    null_counts = ("num_key_value_heads", "sliding_window")
    said = {name: value for name, value in given.items() if value is not None or name in null_counts}
    raw = {**family.text, **said}
    raw["model_type"] = family.text["model_type"]
    text = ConfigReader(given, where)
    rope = rope_section(text, family.text["rope_theta"])
    sections = rope.integers("mrope_section", family.sections)
    if rope.boolean("mrope_interleaved", family.interleaved) != family.interleaved:
        raise InputError(f"{rope.where}: mrope_interleaved must be {str(family.interleaved).lower()} for this family")
    kind = rope.text("rope_type", rope.text("type", "default"))
    others = {field: rope.raw[field] for field in rope.raw if field not in rope.read}
    raw |= {"rope_parameters": others | {"rope_type": "default" if kind == "mrope" else kind}, "rope_scaling": None}
    if tied:
        raw["tie_word_embeddings"] = True
    config = read_llama_config(raw, where)
    streams = position_streams(sections, family.interleaved, config.head_dim // 2, rope.where)
    return replace(config, rope=replace(config.rope, streams=streams))


def position_streams(sections: Sequence[int], interleaved: bool, half: int, where: str) -> tuple[int, ...]:
    """Return the position index of each frequency: 0 time, 1 row, 2 column. Raises InputError for unfit sections."""
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != half:
        raise InputError(
            f"{where}: mrope_section must be three numbers that add up to {half}, half of the head size, not "
            f"{list(sections)[:8]}"
        )
    if not interleaved:
        return tuple(stream for stream, size in enumerate(sections) for _ in range(size))
    streams = [0] * half
    for stream in (1, 2):
        if 3 * (sections[stream] - 1) + stream >= half:
            raise InputError(f"{where}: mrope_section {list(sections)} does not fit every third of {half} frequencies")
        for index in range(stream, 3 * sections[stream], 3):
            streams[index] = stream
    return tuple(streams)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches, stored as a convolution."""

    def __init__(self, config: QwenVisionConfig, bias: bool) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(COLOURS, config.hidden_size, size, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches; a convolution over disjoint patches is one product. patches [P, C] -> [P, W]"""
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    """Attention of every patch to the patches of its segment: a picture, or a window of one."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """Attend within segments. x [P, W]; cos, sin float32 [1, P, D]; lengths of consecutive segments -> [P, W]"""
        q, k, v = self.qkv(x).view(1, len(x), 3, self.heads, -1).permute(2, 0, 3, 1, 4)         # [1, N, P, D] each
        q, k = (rotate(at_least_float32(part), cos, sin).to(x.dtype) for part in (q, k))
        segments = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), strict=True)
        a = torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=2)
        return self.proj(a[0].transpose(0, 1).flatten(1))


class VisionMLP(nn.Module):
    """Feed-forward network of a vision block: two linear layers with an activation between them."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = activation_function(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    """A vision block: attention and feed-forward network, each after its norm."""

    def __init__(self, config: QwenVisionConfig, norm: Callable[[int, float], nn.Module], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(config.hidden_size, EPS), norm(config.hidden_size, EPS)
        self.attn = VisionAttention(config)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Merger of neighbouring (here consecutive) patches into one feature vector of the language model's size."""

    def __init__(self, config: QwenVisionConfig, norm: Callable[[int, float], nn.Module]) -> None:
        super().__init__()
        self.merged_size = config.merged_size
        self.ln_q = norm(config.hidden_size, EPS)
        first, last = nn.Linear(self.merged_size, self.merged_size), nn.Linear(self.merged_size, config.out_hidden_size)
        self.mlp = nn.Sequential(first, nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Merge patches. x [P, W] -> [n, H]"""
        return self.mlp(self.ln_q(x).view(-1, self.merged_size))


class VisionTower(nn.Module):
    """Vision tower: from patches of pictures, in merge order, to the features of their image tokens."""

    frequencies: Tensor
    merger: nn.Module

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.build()
        with torch.device("cpu"):       # values, not a shape: see RotaryEmbedding
            per_axis = config.hidden_size // config.num_heads // 2
            frequencies = rotary_frequencies(RopeConfig(config.rope_theta), per_axis)           # [D/4]
            self.register_buffer("frequencies", frequencies, persistent=False)

    def build(self) -> None:
        """Create the modules of the tower."""
        config = self.config
        self.patch_embed = PatchEmbedding(config, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, nn.LayerNorm, VisionMLP(config)) for _ in range(config.depth))
        self.merger = PatchMerger(config, nn.LayerNorm)

    def places(self, grids: Sequence[Grid]) -> Tensor:
        """Return row and column of every patch, in merge order: int64 [P, 2]"""
        merge, places = self.config.spatial_merge_size, []
        for rows, columns in grids:
            index = torch.arange(rows * columns * merge**2, device=self.frequencies.device)
            index = index.view(rows, merge, columns, merge).transpose(1, 2).flatten()
            places.append(torch.stack([index // (columns * merge), index % (columns * merge)], dim=1))
        return torch.cat(places)

    def rotary(self, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Compute cos, sin float32 [1, P, D]; the first half of the frequencies uses the row, the other the column."""
        angles = (self.places(grids)[..., None] * self.frequencies).flatten(1).repeat(1, 2)[None]
        return angles.cos(), angles.sin()

    def patches(self, grids: Sequence[Grid]) -> list[int]:
        """Return the number of patches of each picture."""
        return [rows * columns * self.config.spatial_merge_size**2 for rows, columns in grids]

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compute the features of image tokens. patches [P, C] -> [n, H]"""
        x, (cos, sin), lengths = self.patch_embed(patches), self.rotary(grids), self.patches(grids)
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.merger(x)


# Defaults of Qwen2-VL and Qwen2.5-VL.
QWEN2_FAMILY: dict[str, Any] = {
    "text": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "max_window_layers": 80,
    },
    "sections": (16, 24, 24), "interleaved": False,
}  # fmt: skip


read_qwen2_vl_config = partial(read_config, Family(**QWEN2_FAMILY, read_vision=read_qwen2_vision))


class Qwen2VLForConditionalGeneration(PictureModel):
    """Vision tower and language model."""

    config: QwenVLConfig
    tower_class: type[VisionTower] = VisionTower
    spellings = (
        (r"(model\.)*visual\.", "visual."),
        *INNER_TEXT_SPELLINGS,
    )

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = self.tower_class(config.vision)
        self.language_model = LlamaForCausalLM(config.text)
        self.around_image = (config.vision_start_token_id,), (config.vision_end_token_id,)
        self.refused_tokens = ((config.video_token_id, "a video"),)

    def sizes(self) -> dict[str, int | None]:
        vision = self.config.vision
        return {"tokens_per_image": None, "pixels": vision.patch_size * vision.spatial_merge_size}

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compute the features of pictures. pixel_values: patches [P, C] -> [n, H]"""
        return self.visual(pixel_values, grids)

    def place(
        self, tokens: Tensor, real: Tensor | None, features: Tensor | None, grids: Sequence[Grid], kept: int = 0
    ) -> tuple[Tensor, PictureRows | None]:
        x = self.embed(tokens[:, kept:], features)
        if not grids:
            return x, None
        positions, rope_delta = self.positions(tokens, real, grids)
        return x, PictureRows(positions[..., kept:], rope_delta)

    def positions(self, tokens: Tensor, real: Tensor | None, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Compute positions by time, row and column, int64 [3, B, T], and the offset of later tokens, int64 [B, 1].

        tokens int64 [B, T]; real bool [B, T], None: no padding
        """
        found = torch.zeros(3, *tokens.shape, dtype=torch.int64)
        deltas, waiting = [], iter(grids)
        for index, is_image in enumerate(self.is_image(tokens).cpu()):              # bool [T]
            slot = padding = 0 if real is None else int((~real[index]).sum())
            position = 0
            while slot < len(is_image):
                after = is_image[slot:]
                text = int(after.int().argmax()) if after.any() else len(after)
                found[:, index, slot : slot + text] = torch.arange(position, position + text)
                slot, position = slot + text, position + text
                if slot < len(is_image):
                    rows, columns = next(waiting)
                    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T      # [2, rows columns]
                    found[:, index, slot : slot + rows * columns] = position + F.pad(places, (0, 0, 1, 0))
                    slot, position = slot + rows * columns, position + max(rows, columns)
            deltas.append([position - (len(is_image) - padding)])
        return found.to(tokens.device), torch.tensor(deltas, device=tokens.device)
