"""Train the small Mixtral of weights/mixtral-tiny/ on the synthetic text tasks, and report what it has learnt.

    python tools/train_mixtral.py                       # about half an hour on two CPU cores
    python tools/train_mixtral.py --evaluate            # only the held-out accuracy of the checkpoint that is there

The forward pass is the engine's own (models/mixtral.py). The same seed, steps and threads on the same machine give
the same checkpoint; another machine rounds differently and ends at the same accuracy, not at the same bits.

B batch, T tokens, M tokens in a row (B T), E experts, X experts per token, V vocabulary.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.experts import Routing
from models.mixtral import MIXTRAL_NAMES, MixtralForCausalLM
from models.passes import View, prefill_pass
from models.pruning.settings import DENSE, PruningSettings
from popengine.loading import load
from popengine.measure.text_tasks import BOS, EOS, PAD, TASKS, UNKNOWN, build_tokenizer, held_out_prompts, make_prompt

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_SHOTS = 5
DRAWN = [*TASKS, "add", "count"]  # the two that take longest to learn are drawn twice as often
MAX_ANSWER = 10  # tokens of the longest answer and its end

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 99,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


class TrainingText:
    """An endless stream of training batches: solved examples of one task per sequence, and which tokens are answers."""

    def __init__(self, seed: int, batch: int) -> None:
        self.rng, self.batch = random.Random(seed), batch
        self.ids = build_tokenizer().get_vocab()

    def sequence(self, shots: int) -> tuple[list[int], list[bool]]:
        """Token ids, and True for those the model is to predict: the answers and what ends them."""
        prompt = make_prompt(self.rng.choice(DRAWN), self.rng, shots, held_out=False)
        tokens, answers = [BOS], [False]
        for example in prompt.examples:
            asked = example is prompt.examples[-1]
            question, answer = example.question + ("?" if asked else "="), [*example.answer, EOS if asked else ";"]
            after = [] if asked else [" "]
            tokens += [*question, *answer, *after]
            answers += [False] * len(question) + [True] * len(answer) + [False] * len(after)
        return [self.ids[token] for token in tokens], answers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens int64 [B, T], padded on the right, and answers bool [B, T]."""
        while True:
            shots = self.rng.randint(1, MOST_SHOTS)     # the same for the whole batch, which keeps padding low
            sequences = [self.sequence(shots) for _ in range(self.batch)]
            longest = max(len(ids) for ids, _ in sequences)
            yield (
                torch.tensor([ids + [self.ids[PAD]] * (longest - len(ids)) for ids, _ in sequences]),
                torch.tensor([answers + [False] * (longest - len(answers)) for _, answers in sequences]),
            )


def forward(model: MixtralForCausalLM, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
    """The dense network, and what its routers decided. tokens int64 [B, T] -> logits [B, T, V]

    Sequences are padded on the right, where causal attention never looks from a real token: no mask is needed.
    """
    x = model.embed(tokens)                                                         # [B, T, H]
    step = prefill_pass(model.model.rotary, map(View, model.config.windows), x, None)
    routings = []
    for layer in model.model.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), step)
        normed = layer.post_attention_layernorm(x)
        routings.append(layer.mlp.route(normed.flatten(0, 1)))
        x = x + layer.mlp.run(normed, routings[-1])
    return model.head(x), routings


def balance_loss(routing: Routing, real: Tensor) -> Tensor:
    """E * sum_e share_e * probability_e (Switch Transformer, arXiv 2101.03961, Eq. 4): X when all experts are even.

    real bool [M], False where a token is padding
    """
    experts = routing.probabilities.shape[-1]
    chosen = F.one_hot(routing.experts, experts).sum(dim=1)                         # [M, E]
    share = chosen[real].float().mean(dim=0)                                        # [E]
    return experts * (share * routing.probabilities[real].mean(dim=0)).sum()


def initialise(model: MixtralForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)


def train(steps: int, batch: int, learning_rate: float, seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    model = MixtralForCausalLM.from_config(CONFIG)
    initialise(model)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million weights")
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    began = time.perf_counter()
    for step, (tokens, answers) in zip(range(steps), TrainingText(seed, batch), strict=False):
        warm_up, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * (0.02 + 0.98 * cosine)
        logits, routings = forward(model, tokens)                                   # [B, T, V]
        wanted = answers[:, 1:]
        task_loss = F.cross_entropy(logits[:, :-1][wanted], tokens[:, 1:][wanted])
        real = tokens.flatten() != CONFIG["pad_token_id"]
        balance = torch.stack([balance_loss(routing, real) for routing in routings]).mean()
        optimizer.zero_grad()
        (task_loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step:5}  loss {task_loss:.4f}  balance {balance:.3f}  {seconds:5.0f} s", flush=True)
    return model


def save(model: MixtralForCausalLM, directory: Path) -> None:
    """Write the checkpoint as Mixtral's are laid out: per-expert tensors, tokenizer.json, the configs."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.state_dict().items():
        for projection, short in MIXTRAL_NAMES.items():
            name = name.replace(f"{projection}_proj.weight", f"{short}.weight") if ".experts." in name else name
        tensors[name.replace(".mlp.", ".block_sparse_moe.")] = parameter.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **tokens}
    generation_config = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for file, content in (
        ("config.json", CONFIG),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n")
    build_tokenizer().save(str(directory / "tokenizer.json"))


def evaluate(directory: Path, count: int, pruning: PruningSettings = DENSE) -> dict[str, float]:
    """Share of held-out questions answered exactly by greedy generation, per task."""
    engine = load(directory)
    accuracy = {}
    for task in TASKS:
        prompts = list(held_out_prompts(task, count))
        right = 0
        for start in range(0, count, 50):
            part = prompts[start : start + 50]
            made = engine.generate([one.prompt for one in part], max_new_tokens=MAX_ANSWER, pruning=pruning)
            right += sum(one.text == prompt.answer for one, prompt in zip(made, part, strict=True))
        accuracy[task] = right / count
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "weights" / "mixtral-tiny")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=200, help="held-out questions per task")
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        model = train(arguments.steps, arguments.batch, arguments.learning_rate, arguments.seed)
        save(model, arguments.out)
    for task, share in evaluate(arguments.out, arguments.questions).items():
        print(f"{task:8} {share:6.1%}")


if __name__ == "__main__":
    main()
