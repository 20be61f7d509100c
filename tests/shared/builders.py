"""What tests are built from: tiny random models beside Hugging Face's, their settings, runs of them, and commands."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from models.cost_model import layer_weights
from models.llama import LlamaForCausalLM
from models.matrices.forms import ColumnMatrix
from models.matrices.plain import replace_matrices
from models.pruning.heads import PartitionedAttention
from models.pruning.partition import ChannelPartition, partition_sizes, undecided
from models.pruning.pruning import Pruning
from models.state import DecodeState, LayerState
from popengine.engine.engine import Engine
from popengine.engine.loading import load_model
from popengine.engine.run import next_logits
from popengine.studies.resolve import resolve_study
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
# Small trained checkpoints that come with the project.
LLAVA_TINY = REPOSITORY / "weights" / "llava-tiny"
MIXTRAL_TINY = REPOSITORY / "weights" / "mixtral-tiny"

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# One of each kind of model that the method treats in its own way.
MODELS: dict[str, Any] = {
    "grouped_query": LlamaConfig(**SIZES | {"num_attention_heads": 8, "hidden_size": 64}),
    "multi_head": LlamaConfig(**SIZES | {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2_window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "query_key_norm": Qwen3Config(**SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=9
    ),
}
MIXTRAL = MixtralConfig(**SIZES | {"num_local_experts": 5})
QWEN2_MOE = Qwen2MoeConfig(
    **SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56
)
SETTINGS = {
    "ffn": PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3),
    "ffn_dense_prefill": PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, prefill="dense"),
    "heads": PruningSettings.paper(ffn_ratio=0.0, head_ratio=0.5, candidate_width=0.6),
    "both": PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6),
    "frozen": PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.0),
    "retained": PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.6, retained_share=0.2),
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
        return load_model(checkpoint, dtype, torch.device("cpu"))[0]


def saved_pair(folder: Path, config: Any, **save_options: Any) -> tuple[PreTrainedModel, LlamaForCausalLM]:
    """The same weights twice: in Hugging Face's model, and in ours by way of the files."""
    reference = random_reference(config)
    reference.save_pretrained(folder, **save_options)
    return reference, ours(folder)


def left_padded(lengths: list[int], vocabulary: int, seed: int = 1) -> tuple[Tensor, Tensor]:
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


def complete_checkpoint(folder: Path, config: Any = None, **changes: Any) -> Path:
    """A folder that the command can run: a tiny random model, a byte-level tokenizer and a chat template.

    config   of the model, whose vocabulary becomes the tokenizer's; None: a Llama of SIZES
    changes  fields of the config
    """
    vocabulary = {piece: index for index, piece in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<eos>"])
    sizes = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 256, "eos_token_id": 260} | changes
    config = LlamaConfig(**SIZES | sizes) if config is None else deepcopy(config)
    for name, value in sizes.items():
        setattr(config, name, value)
    random_reference(config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


# Sampling that neither ends nor repeats itself on the checkpoint below.
ENDLESS = ("--temperature", "1", "--top-k", "12", "--seed", "1")


def endless_checkpoint(folder: Path) -> Path:
    """A complete checkpoint whose tokens that end a turn are never among the likeliest: their logits are 0."""
    complete_checkpoint(folder, max_position_embeddings=100_000)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][-2:] = 0                              # <|end|> and <eos>
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def regions(partition: ChannelPartition) -> list[list[int]]:
    """The channels of each region, in ascending order: those that stay in theirs keep their places in `order`."""
    return [sorted(one.tolist()) for one in (partition.retained, partition.candidate, partition.pruned)]


def heads_partition(layer: LayerState) -> ChannelPartition:
    """The partition of a layer's query heads; where heads are not pruned all are retained."""
    heads, attention = layer.attention, layer.attention.attention
    if isinstance(heads, PartitionedAttention):
        return heads.partition
    sizes = partition_sizes(attention.heads // attention.head_groups, 0.0, 0.0)
    return undecided(sizes, (attention.head_groups,), attention.q_proj.weight.device)


def stored_by_columns(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the model in float32, with weights as eager steps on a CPU have them."""
    model = deepcopy(model).float()
    replace_matrices(model, ColumnMatrix.from_rows)
    return model


def resolved(model: LlamaForCausalLM, settings: PruningSettings | Pruning) -> Pruning:
    """Settings made concrete for a model; what is concrete already stays."""
    return settings if isinstance(settings, Pruning) else resolve_study(settings, layer_weights(model))


def prefilled(
    model: LlamaForCausalLM, tokens: Tensor, settings: PruningSettings | Pruning, real: Tensor | None = None,
    capacity: int = 64,
) -> tuple[Tensor, DecodeState]:
    """Prompts [B, T] run in buffers of their own: the logits after them, [B, V], and the state that steps go on from"""
    state = model.new_state(len(tokens), capacity, resolved(model, settings))
    return model.prefill(model.embed(tokens), state, real), state


@torch.inference_mode()
def greedy(
    model: LlamaForCausalLM, prompt: list[int], count: int, settings: PruningSettings | Pruning
) -> list[int]:
    """`count` new tokens of a prompt, whatever they are: the model alone, without the engine."""
    logits, state = prefilled(model, torch.tensor([prompt]), settings, capacity=len(prompt) + count)
    new = [int(logits.argmax())]
    while len(new) < count:
        new.append(int(next_logits(model, torch.tensor(new[-1:]), state).argmax()))
    return new


def generated(
    engine: Engine, prompts: list[list[int]], new_tokens: int, pruning: PruningSettings, ignore_eos: bool = True
) -> list[tuple[int | None, ...]]:
    """What a run of an engine yields, step by step: a token of each sequence, None where it had ended before."""
    return [tuple(step) for step in engine.run(prompts, new_tokens, pruning, ignore_eos=ignore_eos)]


@contextmanager
def interrupted(model: LlamaForCausalLM, layer: int, call: int) -> Iterator[None]:
    """Ctrl-C in the middle of a layer, between its attention and its network, at its `call`-th run."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    handle = model.model.layers[layer].post_attention_layernorm.register_forward_pre_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def another_value(name: str) -> Any:
    """A value that the setting of this name may have besides its default."""
    (one,) = (one for one in fields(PruningSettings) if one.name == name)
    if one.metadata["choices"]:
        return next(choice for choice in one.metadata["choices"] if choice != one.default)
    if one.metadata["type"] is str:
        return {"leave_out": "1.mlp", "input_sparsity": "0.5"}[name]
    if name == "groups":
        return 2                        # the channels of the small models are not a multiple of 3
    value = one.metadata["least"] + (2 if one.metadata["type"] is int else 0.5)
    return value if value != one.default else value / 2


def another_setting(name: str) -> dict[str, Any]:
    """The same as arguments of PruningSettings, with whatever else this setting asks for."""
    needed: dict[str, dict[str, Any]] = {
        "retained_share": {"candidate_width": 1.0}, "redraw_every": {"dense_every": 2},
        "boundary_tokens": {"prefill_skip": 0.5},
        "visual_tokens_by": {"visual_tokens": 0.5}, "visual_tokens_layer": {"visual_tokens": 0.5},
    }
    return {name: another_value(name)} | needed.get(name, {})


def exit_status(main: Callable[..., Any], *arguments: Any) -> int:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code  # type: ignore[return-value]


def one_line_error(main: Callable[..., Any], capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must say in one line what is wrong, and nothing else."""
    capsys.readouterr()                     # whatever was printed before
    assert exit_status(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err
