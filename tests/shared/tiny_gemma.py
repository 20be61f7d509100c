"""A tiny random Gemma-3 in transformers, with all that a checkpoint of one has, and pictures for it."""

from pathlib import Path
from typing import Any

import torch
from builders import SIZES
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24,
    "patch_size": 4, "model_type": "siglip_vision_model", "vision_use_head": False,
}  # fmt: skip
TEXT = SIZES | {"head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 3}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
BEGIN, IMAGE, END = 90, 91, 92
def picture_config(**text: Any) -> Gemma3Config:
    return Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT | text), vision_config=VISION, mm_tokens_per_image=9,
        image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END,
    )


# A picture has 9 tokens: a window of 5 hides its first from its last, one of 12 never cuts one.
PICTURE_VARIANTS = {
    "a window within a picture": picture_config(),
    "a wider one": picture_config(sliding_window=12, rope_parameters=LINEAR),
    "another scale": picture_config(num_key_value_heads=4, query_pre_attn_scalar=7),
}
SPECIAL = {
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
}  # fmt: skip
TURN_ENDS = ["<start_of_turn>", "<end_of_turn>"]
# As the family's does: no turn of a system's own, and the mark of a picture in the place of an image part.
TEMPLATE = (
    "{{ bos_token }}{% set told = namespace(text='') %}{% for turn in messages %}{% if turn.role == 'system' %}"
    "{% set told.text = (turn.content if turn.content is string else turn.content[0].text) + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n{{ told.text }}"
    "{% set told.text = '' %}{% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{{ '<start_of_image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}"
    "<end_of_turn>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def picture(width: int, height: int) -> Image.Image:
    """Colours that change over the picture, so that a wrong resize shows."""
    rows = torch.arange(height)[:, None, None] * 255 // height
    columns = torch.arange(width)[None, :, None] * 255 // width
    values = torch.cat([rows.expand(-1, width, 1), columns.expand(height, -1, 1), (rows * columns) % 256], dim=-1)
    return Image.frombytes("RGB", (width, height), values.to(torch.uint8).numpy().tobytes())


def reference_model(config: Gemma3Config) -> Gemma3ForConditionalGeneration:
    """Weights large enough that a wrong detail shows: norms, biases and all."""
    torch.manual_seed(0)
    config.text_config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def new_processor() -> Gemma3Processor:
    """transformers' own, with a tokenizer whose tokens of newlines depend on what is beside them, as Gemma's do."""
    newline = ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    pieces = [*sorted(ByteLevel.alphabet()), newline * 2, newline * 3]
    backend = Tokenizer(BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[(newline, newline), (newline * 2, newline)],
    ))  # fmt: skip
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*SPECIAL.values(), *TURN_ENDS]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: SPECIAL[name] for name in ("bos_token", "eos_token", "pad_token")},
        extra_special_tokens={name: SPECIAL[name] for name in ("boi_token", "eoi_token", "image_token")},
        padding_side="left",
    )
    images = Gemma3ImageProcessorPil(size={"height": 24, "width": 24})
    return Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=9)


def complete_gemma(folder: Path) -> Path:
    """A folder that the commands can run: a tiny random model with pictures, its processor and a chat template."""
    processor = new_processor()
    tokenizer = processor.tokenizer
    config = Gemma3Config(
        text_config={
            "vocab_size": tokenizer.convert_tokens_to_ids("<image_soft_token>") + 3, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3, "max_position_embeddings": 512,
            "query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        vision_config=VISION, mm_tokens_per_image=9, image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )  # fmt: skip
    reference_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
