"""Small .gguf files written with the gguf package: a tiny Llama's weights, and tokenizers trained on a few lines."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from weights.checkpoint import GGUFCheckpoint, open_checkpoint
from weights.gguf_tokenizer import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXT = [
    "The river was low that summer, and the boats lay on the sand until the rain came back in September.",
    "She counted 12, 144 and 1728; then she wrote 3.14159 on the wall and didn't say why.",
    "def area(radius):\n    if radius < 0:\n\t\treturn None\n    return 3.14 * radius ** 2  # about\n",
    "Größe, naïve, señor, Überraschung, крыша, 東京の雨, 서울, हिन्दी, עברית, العربية.",
    "It's what we'd like, they've said; I'm sure he'll go. IT'S WHAT WE'D LIKE.",
    "https://example.org/a?b=c&d=[1,2]   tabs\t\tand  spaces   \r\n\r\n\n  end",
    "🙂🙃 👩‍👩‍👧 🇩🇪 ½ ² ٣٤ ✓ — “quoted” …",
    "",
    " leading space",
    "trailing space ",
    "\n\n\n1 000 000\n  42\n",
    "snake_case camelCase XMLHttpRequest HTTPServer2 x+=1; y!=z && w||v",
    "<|start|>user\nHello<|end|> after<think>maybe</think>",
]


class TinyLlama:
    """Weights under Hugging Face's names and order, and the metadata, of a Llama of two layers."""

    def __init__(self, head_dim: int = 32, tied: bool = True, bias: bool = False) -> None:
        self.hidden, self.intermediate, self.heads, self.kv_heads, self.head_dim = 64, 96, 4, 2, head_dim
        generator = torch.Generator().manual_seed(0)
        shapes = {"model.embed_tokens.weight": (260, 64), "model.norm.weight": (64,)}
        if not tied:
            shapes["lm_head.weight"] = (260, 64)
        rows = {"q": self.heads * head_dim, "k": self.kv_heads * head_dim, "v": self.kv_heads * head_dim}
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            for name, count in rows.items():
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (count, 64)
                if bias:
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (count,)
            shapes[f"{prefix}self_attn.o_proj.weight"] = (64, self.heads * head_dim)
            shapes |= {f"{prefix}mlp.{name}_proj.weight": (96, 64) for name in ("gate", "up")}
            shapes[f"{prefix}mlp.down_proj.weight"] = (64, 96)
            shapes |= {f"{prefix}{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def metadata(self) -> dict[str, Any]:
        return {
            "llama.context_length": 128,
            "llama.embedding_length": self.hidden,
            "llama.block_count": 2,
            "llama.feed_forward_length": self.intermediate,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.value_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 50000.0,
            "llama.rope.dimension_count": self.head_dim,
        }

    def gguf_tensors(self) -> dict[str, Tensor]:
        """The tensors under llama.cpp's names, query and key rows in llama.cpp's order."""
        layer_names = {
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        }  # fmt: skip
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        result = {}
        for name, tensor in self.tensors.items():
            stem, _, suffix = name.rpartition(".")
            if stem in top:
                result[f"{top[stem]}.{suffix}"] = tensor
                continue
            _, _, layer, rest = stem.split(".", 3)
            heads = {"self_attn.q_proj": self.heads, "self_attn.k_proj": self.kv_heads}.get(rest)
            if heads:  # rows [first half, second half] of each head become [first, second, first, second, ...]
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            result[f"blk.{layer}.{layer_names[rest]}.{suffix}"] = tensor
        return result


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Any],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    tensors_per_part: int = 0,
) -> Path:
    """Write a file, or with tensors_per_part several; matrices in `kind`, vectors in float32, as llama.cpp does.

    Of tensors, Tensor or, where the blocks are made already, a pair: uint8 [rows, bytes], and their type.
    """
    writer = gguf.GGUFWriter(
        path, architecture, split_max_tensors=tensors_per_part, small_first_shard=tensors_per_part > 0
    )
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor.dim() > 1 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_metadata(pre: str) -> dict[str, Any]:
    """A byte-level BPE trained on TEXT as `pre` splits it, with special tokens at both ends of the vocabulary."""
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    tokenizer = Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": PRE_TOKENIZERS[pre]}))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|start|>", "<|end|>"])
    tokenizer.train_from_iterator(TEXT[:-1] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) for merge in model["merges"]]
    types = [CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 2)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<think>"],
        "tokenizer.ggml.token_type": [*types, USER_DEFINED],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def sentencepiece_model(
    space_prefix: bool = True, symbols: tuple[str, ...] = ("<think>",)
) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece BPE with byte fallback, trained on TEXT, in which the symbols are tokens whatever is around."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXT * 3 for line in text.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=space_prefix,
        split_digits=True,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(
    model: sentencepiece.SentencePieceProcessor, symbols: tuple[str, ...] = ("<think>",)
) -> dict[str, Any]:
    """llama.cpp's converter writes the spaces of symbols as spaces, those of other pieces as ▁."""
    count = model.get_piece_size()
    pieces = [model.id_to_piece(number) for number in range(count)]
    types = []
    for number in range(count):
        if model.is_unknown(number):
            types.append(UNKNOWN)
        elif model.is_control(number):
            types.append(CONTROL)
        elif model.is_byte(number):
            types.append(BYTE)
        else:
            types.append(USER_DEFINED if pieces[number] in symbols else NORMAL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.replace("▁", " ") if piece in symbols else piece for piece in pieces],
        "tokenizer.ggml.scores": [float(np.float32(model.get_score(number))) for number in range(count)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def open_gguf(path: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


def assert_read_as_by_transformers(path: Path, reference: Any) -> None:
    checkpoint, state = open_gguf(path), reference.state_dict()
    assert set(checkpoint.entries) | {"lm_head.weight"} == set(state)
    for name in checkpoint.entries:
        assert torch.equal(checkpoint.read(name).float(), state[name]), name
    assert_configured_as_by_transformers(checkpoint.config, reference)


def assert_configured_as_by_transformers(own: dict[str, Any], reference: Any) -> None:
    config = reference.config.to_dict()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):  # fmt: skip
        assert own[key] == config[key], key
