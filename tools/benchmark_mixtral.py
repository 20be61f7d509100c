"""Prefill and decode of a random mixture of experts, beside transformers' eager Mixtral on the same weights.

    python tools/benchmark_mixtral.py

Every round times all engines one after the other, so that noise of the machine meets all of them alike; reported are
medians over the rounds, and the median over the rounds of the ratio to transformers.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

from models.mixtral import MixtralForCausalLM as OurMixtral
from models.pruning.settings import DENSE, PruningSettings, resolve

REFERENCE = "transformers eager"


def transformers_model() -> Any:
    config = MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def same_weights(reference: Any) -> OurMixtral:
    """Our model over the very memory of transformers' model."""
    config = reference.config.to_dict()
    with torch.device("meta"):
        model = OurMixtral.from_config(config)
    places = model.locate(list(model.state_dict()), list(reference.state_dict()))
    theirs = reference.state_dict()
    weights = {}
    for name in model.state_dict():
        key, index = places.get(name, (name, ()))
        weights[name] = theirs[key][index]
    model.load_state_dict(weights, assign=True)
    return model.eval()


def milliseconds(call: Callable[[torch.Tensor], None], tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    call(tokens)
    return (time.perf_counter() - began) * 1000


class Ours:
    def __init__(self, model: OurMixtral, settings: PruningSettings, capacity: int) -> None:
        self.model = model
        self.state = model.new_state(1, capacity, resolve(settings, model.layer_weights()))

    def prefill(self, tokens: torch.Tensor) -> None:
        self.model.prefill(self.model.embed(tokens), self.state)

    def decode(self, token: torch.Tensor) -> None:
        self.model.decode(token, self.state)

    def bytes_per_token(self) -> int:
        return self.model.weight_bytes_per_token(self.state.pruning)


class Theirs:
    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, tokens: torch.Tensor) -> None:
        self.cache = self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, token: torch.Tensor) -> None:
        self.model(token[None], past_key_values=self.cache, use_cache=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)

    reference = transformers_model().to(dtype)
    model = same_weights(reference)
    capacity = arguments.prompt_tokens + arguments.new_tokens
    engines: dict[str, Ours | Theirs] = {
        REFERENCE: Theirs(reference),
        "dense": Ours(model, DENSE, capacity),
        "POP 0.2": Ours(model, PruningSettings(prune_ratio=0.2), capacity),
        "POP 0.4": Ours(model, PruningSettings(prune_ratio=0.4), capacity),
        "POP 0.4, dense prefill": Ours(model, PruningSettings(prune_ratio=0.4, prefill="dense"), capacity),
    }
    prefill: dict[str, list[float]] = {name: [] for name in engines}
    decode: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(-1, arguments.rounds):
        tokens = torch.randint(4096, (1, arguments.prompt_tokens))
        prompt = {name: milliseconds(engine.prefill, tokens) for name, engine in engines.items()}
        # Decode steps take turns, one of each engine at a time.
        steps: dict[str, list[float]] = {name: [] for name in engines}
        for token in torch.randint(4096, (arguments.new_tokens, 1)):
            for name, engine in engines.items():
                steps[name].append(milliseconds(engine.decode, token))
        if round_ >= 0:                                                         # round -1 warms up
            for name in engines:
                prefill[name].append(prompt[name])
                decode[name].append(statistics.median(steps[name]))

    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {arguments.threads} threads, {arguments.dtype}, prompt of "
        f"{arguments.prompt_tokens}, {arguments.new_tokens} steps, {arguments.rounds} rounds"
    )
    print(f"{'':24}{'prefill ms':>12}{'ratio':>8}{'decode ms':>12}{'ratio':>8}{'bytes/token':>14}")
    for name, engine in engines.items():
        read = f"{engine.bytes_per_token() / 1e6:10.1f} MB" if isinstance(engine, Ours) else ""
        print(
            f"{name:24}{statistics.median(prefill[name]):12.1f}{paired_ratio(prefill, name):8.2f}"
            f"{statistics.median(decode[name]):12.2f}{paired_ratio(decode, name):8.2f}{read:>14}"
        )


def paired_ratio(times: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of an engine's time to transformers' in the same round."""
    return statistics.median(own / other for own, other in zip(times[name], times[REFERENCE], strict=True))


if __name__ == "__main__":
    main()
