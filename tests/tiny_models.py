"""Tiny random Hugging Face models, saved by save_pretrained and read back by our own loader."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from models.llama import LlamaForCausalLM
from popengine.engine import load_model
from weights.checkpoint import open_checkpoint

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def random_reference(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model with weights large enough that a wrong detail shows: norms, biases and all."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    with open_checkpoint(folder) as checkpoint:
        return load_model(checkpoint, dtype, torch.device("cpu"))


def saved_pair(folder: Path, config: Any, **save_options: Any) -> tuple[PreTrainedModel, LlamaForCausalLM]:
    """The same weights twice: in Hugging Face's model, and in ours by way of the files."""
    reference = random_reference(config)
    reference.save_pretrained(folder, **save_options)
    return reference, ours(folder)


def left_padded(lengths: list[int], vocabulary: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens int64 [B, T] and real bool [B, T], padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(vocabulary, (len(lengths), longest), generator=generator)
    real = torch.arange(longest) >= (longest - torch.tensor(lengths))[:, None]
    return tokens, real


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def complete_checkpoint(folder: Path, **changes: Any) -> Path:
    """A folder that the command can run: a tiny random Llama, a byte-level tokenizer and a chat template."""
    vocabulary = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<eos>"])
    sizes = SIZES | {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 256, "eos_token_id": 260}
    random_reference(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
