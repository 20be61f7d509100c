"""Tiny random models of Qwen2-VL, 2.5 and 3 in transformers, and pictures for them."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, BEFORE, AFTER = 90, 91, 92, 93
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEFORE, "vision_end_token_id": AFTER
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
VISION = {"depth": 3, "num_heads": 2, "patch_size": 4}
WIDE = VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 40}
PROCESSOR = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 40
}  # fmt: skip


def qwen2(**text: Any) -> tuple:
    vision = VISION | {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    config = Qwen2VLConfig(text_config=TEXT | {"rope_parameters": SECTIONS} | text, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration, config


def qwen2_5(**text: Any) -> tuple:
    vision = WIDE | {"window_size": 19, "fullatt_block_indexes": [1]}       # windows of 2 x 2 tokens
    config = Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": SECTIONS} | text, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration, config


def qwen3(**text: Any) -> tuple:
    vision = WIDE | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}
    rope = SECTIONS | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = TEXT | {"rope_parameters": rope, "head_dim": 16} | text
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)


YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6,
    "mrope_section": [2, 3, 3],
}  # fmt: skip
VARIANTS = {
    "qwen2": qwen2(),
    "qwen2 window": qwen2(use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen2.5": qwen2_5(),
    "qwen2.5 yarn": qwen2_5(rope_parameters=YARN),
    "qwen3": qwen3(),
    "qwen3 biased": qwen3(attention_bias=True),
}
FAMILIES = ["qwen2", "qwen2.5", "qwen3"]


def reference_model(variant: str, tied: bool = False) -> Any:
    model_class, config = VARIANTS[variant]
    config = deepcopy(config)
    config.tie_word_embeddings = tied
    return randomised(model_class, config)


def randomised(model_class: Any, config: Any) -> Any:
    """Weights large enough that a wrong detail shows: norms, biases and all."""
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def picture(width: int, height: int) -> Image.Image:
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(width * height))
    return Image.fromarray(noise.to(torch.uint8).numpy())


CONTROLS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]
# What the released templates do: a system's turn where there is none, parts by type, pictures counted if that is asked.
TEMPLATE = """{% set seen = namespace(pictures=0) %}{% for message in messages %}
{%- if loop.first and message.role != 'system' %}<|im_start|>system
Be helpful.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' or 'image' in part %}{% set seen.pictures = seen.pictures + 1 %}
{%- if add_vision_id %}Picture {{ seen.pictures }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def complete_qwen(folder: Path, variant: str) -> Path:
    """A folder that the commands can run: a tiny random model, a byte-level tokenizer, template and processor."""
    vocabulary = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(CONTROLS)
    model_class, config = VARIANTS[variant]
    config = deepcopy(config)
    config.text_config.vocab_size = backend.get_vocab_size()
    config.text_config.max_position_embeddings = 512
    config.text_config.eos_token_id = backend.token_to_id("<|endoftext|>")
    for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
    ):
        setattr(config, f"{name}_token_id", backend.token_to_id(f"<|{token}|>"))
    randomised(model_class, config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = PROCESSOR | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
