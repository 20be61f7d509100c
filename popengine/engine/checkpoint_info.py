"""Description of a checkpoint and its supported features, from the headers of its files; no tensor is read."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from models.cost_model import layer_weights
from models.experts import MixtureOfExperts
from models.families.picture_model import PictureModel
from models.llama import LlamaForCausalLM
from models.registry import architecture
from popengine.engine.dtypes import FORMS
from popengine.engine.loading import DTYPES, choose_dtype, open_text_side
from popengine.engine.packing import PACKED_ERRORS, Packer, choose_form
from popengine.text.chat import end_of_turn_token, render_chat
from popengine.text.tokenizer import TextTokenizer
from weights.checkpoint import Checkpoint, GGUFCheckpoint, open_checkpoint
from weights.default_checkpoint import default_checkpoint
from weights.errors import InputError
from weights.files import ANY_WEIGHTS
from weights.load import find_all

CPU = torch.device("cpu")
# Every form of weights in memory: its name, and the values of --weights and --dtype for it.
IN_MEMORY = [*((name, "plain", name) for name in DTYPES), *((form, form, "bfloat16") for form in FORMS[2:])]
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
         {"role": "assistant", "content": "Hi"}]


def describe(source: str | Path | None) -> dict[str, Any]:
    """Describe a checkpoint as JSON. `problem` is the reason why it cannot be loaded, or None.

    Raises InputError if it is no checkpoint at all.
    """
    with open_checkpoint(default_checkpoint() if source is None else source) as checkpoint:
        path = checkpoint.path
        files = checkpoint.files if isinstance(checkpoint, GGUFCheckpoint) else sorted(path.glob(ANY_WEIGHTS))
        stored = Counter[str]()
        for entry in checkpoint.entries.values():
            stored[entry.stored or str(entry.dtype).removeprefix("torch.")] += entry.elements
        found: dict[str, Any] = {
            "checkpoint": str(path),
            "architectures": checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")],
            "file_bytes": sum(file.stat().st_size for file in files), "stored": dict(stored.most_common()),
        }
        try:
            found |= of_model(checkpoint) | of_text(checkpoint) | {"problem": None}
        except InputError as error:
            found["problem"] = str(error)
    return found


def of_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the model: sizes, memory in every form, and unknown fields of its config."""
    with torch.device("meta"):
        model = architecture(checkpoint.config, str(checkpoint.path)).from_config(checkpoint.config)
    pictures = None
    language_model: LlamaForCausalLM
    if isinstance(model, PictureModel):
        language_model, unknown = model.language_model, model.config.unknown_fields
        pictures = model.sizes()
    else:
        language_model, unknown = model, ()
    config, layer, mlp = language_model.config, layer_weights(language_model), language_model.model.layers[0].mlp
    experts = None
    if isinstance(mlp, MixtureOfExperts):
        experts = {"experts": len(mlp.experts), "per_token": mlp.experts_per_token}
        mlp = mlp.experts[0]
    kind = choose_dtype("auto", checkpoint, CPU, packed=choose_form("auto", checkpoint, CPU, "auto") != "plain")
    auto_bytes, auto_weights = held(model, language_model, checkpoint, "auto", "auto")
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "channels": mlp.channels,
        "query_heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size, "experts": experts, "pictures": pictures,
        "context": config.context, "cache_bytes_per_token": cache * kind.itemsize,
        "memory_bytes": {name: held(model, language_model, checkpoint, *given)[0] for name, *given in IN_MEMORY},
        "auto_memory_bytes": auto_bytes, "auto_weights": auto_weights,
        "ffn_share_of_layer": layer.ffn / (layer.ffn + layer.attention), "heads_per_group": layer.heads_per_group,
        "can_compile": language_model.can_compile,
        "unknown_fields": list(config.unknown_fields + unknown),
    }


def held(
    model: Any, language_model: LlamaForCausalLM, checkpoint: Checkpoint, form: str, dtype: str
) -> tuple[int | None, str]:
    """Return the memory of the weights in this form, in bytes (None: impossible), and the form of the matrices."""
    form = choose_form(form, checkpoint, CPU, dtype)
    kind = choose_dtype(dtype, checkpoint, CPU, packed=form != "plain")
    wanted = find_all(model, checkpoint, kind, model.locate, model.ignored_keys)      # checks the keys
    if form == "plain":
        return sum(one.held_bytes for one in wanted), form
    pack = Packer(language_model, form, kind, CPU, checkpoint.entries)
    try:
        wanted = find_all(model, checkpoint, kind, model.locate, model.ignored_keys, pack)
    except InputError:
        return None, form
    return sum(one.held_bytes for one in wanted), pack.made


def of_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe tokenizer and chat template."""
    tokenizer, template = open_text_side(checkpoint)
    found: dict[str, Any] = {"tokens": tokenizer.vocabulary_size, "turns": None, "system_turn": None, "turn_end": None}
    if isinstance(template, InputError):
        raise template
    if template is None:
        return found
    system = None
    try:
        found["turns"], system = render(template, tokenizer, TURNS), True
    except InputError:                                              # some templates have no system turn
        found["turns"], system = render(template, tokenizer, TURNS[1:]), False
    end = end_of_turn_token(template, tokenizer)
    name = None if end is None else tokenizer.decode([end], skip_special_tokens=False)
    return found | {"system_turn": system, "turn_end": name}


def render(template: str, tokenizer: TextTokenizer, turns: list[dict[str, str]]) -> str:
    """Render turns without a generation prompt."""
    return render_chat(template, turns, tokenizer, add_generation_prompt=False)


def lines(found: dict[str, Any]) -> list[str]:
    """Format a description for people."""
    numbers = sum(found["stored"].values())
    stored = ", ".join(f"{name} ({count / numbers:.0%})" for name, count in found["stored"].items())
    names = found["architectures"]
    said = [
        f"checkpoint  {found['checkpoint']}",
        f"stored      {megabytes(found['file_bytes'])}: {stored}",
        f"kind        {', '.join(map(str, names)) if isinstance(names, list) else names}",
    ]
    if found["problem"] is not None:
        return [*said, f"supported   no: {found['problem']}"]
    experts, pictures, share = found["experts"], found["pictures"], found["ffn_share_of_layer"]
    memory = ", ".join(
        f"{name} {'impossible' if held is None else megabytes(held)}" for name, held in found["memory_bytes"].items()
    )
    said += [
        f"parameters  {found['parameters'] / 1e6:,.1f} million in {found['layers']} layers: hidden size "
        f"{found['hidden_size']}, {found['channels']} FFN channels, {found['query_heads']} query heads on "
        f"{found['key_value_heads']} key/value heads, {found['vocabulary']} tokens",
        f"memory      {memory}; without flags {megabytes(found['auto_memory_bytes'])}",
        *([] if found["auto_weights"] == "plain" else [f"packed      {found['auto_weights']} ({PACKED_ERRORS})"]),
        f"context     {found['context']} tokens, each {found['cache_bytes_per_token'] / 1e3:.0f} kB of keys and values",
        f"pruning     --prune-ratio below {share:.3f}: so much of a layer are FFN channels",
    ]
    if found["heads_per_group"] > 1:
        said.append(f"            --head-ratio above {0.5 / found['heads_per_group']:.2g}: heads in groups of "
                    f"{found['heads_per_group']}")
    if experts is not None:
        said.append(f"experts     {experts['experts']} a layer, {experts['per_token']} for each token")
    if pictures is not None:
        square, tokens = f"{pictures['pixels']} x {pictures['pixels']} pixels", pictures["tokens_per_image"]
        each = f"of any size, a token for each {square}" if tokens is None else f"{square}, {tokens} tokens each"
        said.append(f"pictures    {each}")
    if found["turns"] is None:
        said.append("turns       no chat template: --raw text alone, no conversation")
    else:
        ends = "" if found["turn_end"] is None else f"; {found['turn_end']} ends an answer"
        said.append(f"turns       {'system, ' if found['system_turn'] else ''}user, assistant{ends}")
        said += [f"            | {line}" for line in found["turns"].rstrip("\n").split("\n")]
    compiles = "" if found["can_compile"] else ", but not --compile"
    ignored = f"; fields of config.json that are ignored: {', '.join(found['unknown_fields'])}"
    said.append(f"supported   yes{compiles}{ignored if found['unknown_fields'] else ''}")
    return said


def megabytes(count: int) -> str:
    """Format a number of bytes in MB."""
    return f"{count / 1e6:,.0f} MB"
