"""Convert a dense Llama to a mixture of experts: equal groups of FFN channels become experts, with a router.

    python tools/mixture_from_dense.py --text FILE --experts 16 --per-token 12 --out DIR

After MoEfication (arXiv 2110.01786), without training: channels that are active on the same tokens of the text form an
expert, and the router is the linear map that best predicts each expert's share of the output. With all experts per
token the mixture equals the dense model. For Llama, SmolLM2 and Mistral without biases; --ckpt: .gguf or directory.

T tokens, H hidden size, I channels, E experts.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from popengine.benchmark.shapes import checkpoint_name
from popengine.engine.loading import load
from popengine.evaluation.scoring import cut_windows, read_text
from popengine.studies.activations import Activation, embedded, layer_by_layer
from weights.checkpoint import open_checkpoint
from weights.default_checkpoint import default_checkpoint
from weights.gguf_file import GGUFCheckpoint
from weights.output_file import make_folder, replacing, write_output

# Router logits this small give all chosen experts the same weight, and keep their order.
FLAT = 1e-3
ROUNDS = 5


def equal_groups(profiles: Tensor, count: int) -> Tensor:
    """Channels to `count` groups of one size by k-means, the nearest pairs first. profiles [I, T] -> int64 [I]"""
    unit = F.normalize(profiles, dim=1)
    centres, room = unit[:: len(unit) // count][:count], len(unit) // count
    for _ in range(ROUNDS):
        alike = unit @ F.normalize(centres, dim=1).T                                # [I, E]
        group, sizes = [-1] * len(unit), [0] * count
        for pair in alike.flatten().argsort(descending=True).tolist():
            channel, own = divmod(pair, count)
            if group[channel] < 0 and sizes[own] < room:
                group[channel] = own
                sizes[own] += 1
        groups = torch.tensor(group)
        centres = torch.stack([unit[groups == own].mean(dim=0) for own in range(count)])
    return groups


def router_for(x: Tensor, energy: Tensor) -> Tensor:
    """The map that foretells each expert's share, by ridge regression. x [T, H], energy [T, E] -> [E, H]"""
    shares = energy / energy.sum(dim=1, keepdim=True)
    gram = x.T @ x
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, x.T @ (shares - shares.mean())).T


@torch.inference_mode()
def convert(checkpoint: str | Path, text: Path, windows: int, experts: int, per_token: int, out: Path) -> None:
    engine = load(checkpoint, dtype="float32", device="cpu")
    seen = cut_windows(read_text(text, engine.tokenizer), engine.tokenizer, 64, 64, windows)
    layers = engine.model.model.layers
    given: list[list[Tensor]] = [[] for _ in layers]
    put_out: list[list[Tensor]] = [[] for _ in layers]
    for window in seen:
        activations: list[Activation] = []
        pairs = layer_by_layer(engine.model, embedded(engine.model, window.ids), activations.append)
        for index, (_, after) in enumerate(pairs):
            layer, h = layers[index], activations[-1].h                             # [T, I]
            given[index].append(layer.before_mlp(after[0] - layer.mlp.down_proj(h)))
            put_out[index].append(h.abs() * layer.mlp.down_norms())
    tensors = {name: tensor for name, tensor in engine.model.state_dict().items() if ".mlp." not in name}
    if engine.model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for index, layer in enumerate(layers):
        active, place = torch.cat(put_out[index]), f"model.layers.{index}.mlp"      # [T, I]
        groups = equal_groups(active.T.contiguous(), experts)
        energy = torch.stack([active[:, groups == own].square().sum(dim=1).sqrt() for own in range(experts)], dim=1)
        router = router_for(torch.cat(given[index]), energy)                        # [E, H]
        tensors[f"{place}.gate.weight"] = FLAT * router / router.norm()
        for own in range(experts):
            channels = (groups == own).nonzero().flatten()
            for name in ("gate", "up"):
                rows = getattr(layer.mlp, f"{name}_proj").values()[channels]
                tensors[f"{place}.experts.{own}.{name}_proj.weight"] = rows
            columns = layer.mlp.down_proj.values()[:, channels]
            tensors[f"{place}.experts.{own}.down_proj.weight"] = per_token * columns    # weights add up to 1
    make_folder(out, "model.safetensors")
    written = {checkpoint_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(out / "model.safetensors") as unfinished:
        save_file(written, unfinished)
    with open_checkpoint(checkpoint) as opened:
        config = dict(opened.config) | {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
            "num_experts_per_tok": per_token, "torch_dtype": "float32",
            "intermediate_size": engine.model.config.intermediate_size // experts,
        }
        write_output(out / "config.json", json.dumps(config, indent=1))
        if isinstance(opened, GGUFCheckpoint):
            write_output(out / "tokenizer.json", opened.tokenizer_json)
            special = {"bos_token": opened.bos_token, "eos_token": opened.eos_token}
            special |= {"chat_template": opened.chat_template}
            write_output(out / "tokenizer_config.json", json.dumps(special))
        else:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                write_output(out / name, (opened.path / name).read_bytes())


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--ckpt", help="(default: SmolLM2-135M-Instruct)")
    flags.add_argument("--text", type=Path, required=True, help="what channels are grouped by")
    flags.add_argument("--windows", type=int, default=32, help="of 128 tokens of it (default: 32)")
    flags.add_argument("--experts", type=int, default=16)
    flags.add_argument("--per-token", type=int, default=12)
    flags.add_argument("--out", type=Path, required=True)
    given = flags.parse_args()
    convert(given.ckpt or default_checkpoint(), given.text, given.windows, given.experts, given.per_token, given.out)
