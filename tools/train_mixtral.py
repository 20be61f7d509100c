"""Train the small Mixtral of weights/mixtral-tiny/ on the synthetic text tasks, and report its accuracy.

    python tools/train_mixtral.py                       # about half an hour of one CPU core
    python tools/train_mixtral.py --evaluate            # only the held-out accuracy of the existing checkpoint

The forward pass is the engine's own (models/mixtral.py). Equal seed, steps and threads on the same machine give the
same checkpoint. Another machine rounds differently and reaches the same accuracy, not the same bits.

B batch, T tokens, M tokens in a row (B T), E experts, X experts per token, V vocabulary, n matrices of one shape.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.experts import Routing
from models.mixtral import MIXTRAL_NAMES, MixtralForCausalLM, read_mixtral_config
from models.passes import prefill_pass
from models.slots import AttentionPattern
from popengine.engine import prior
from popengine.engine.loading import load
from popengine.evaluation.text_tasks import TASKS, held_out_prompts, make_prompt
from popengine.studies.settings import DENSE, PruningSettings

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
REPOSITORY = Path(__file__).resolve().parents[1]
MAX_ANSWER = 64  # tokens, more than the longest answer and its end
DRAWN = [*TASKS, "shift"]  # what takes longest to learn is drawn twice as often
POOL = 600  # sequences that are sorted by length together

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
    "rope_theta": 1000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def build_tokenizer() -> tokenizers.Tokenizer:
    """Build a tokenizer with a token per printable ASCII character, `<s>` in front; other characters are `<unk>`."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN])}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


class TrainingText:
    """An endless stream of training batches, and which tokens are answers.

    A sequence is one question, or an example and a question, of one task, of a share of the sizes that are asked later:
    attention learns to look things up among few first. Sequences of about one length share a batch, which keeps padding
    low.
    """

    def __init__(self, seed: int, tokens: int) -> None:
        self.rng, self.tokens = random.Random(seed), tokens
        self.ids = build_tokenizer().get_vocab()
        self.batches: list[list[tuple[list[int], list[bool]]]] = []

    def sequence(self, least: float, most: float) -> tuple[list[int], list[bool]]:
        """Token ids, and True for those the model is to predict: the answers and what ends them."""
        task, shots, share = self.rng.choice(DRAWN), self.rng.randint(0, 1), self.rng.uniform(least, most)
        prompt = make_prompt(task, self.rng, shots, held_out=False, share=share)
        tokens, answers = [BOS], [False]
        for example in prompt.examples:
            asked = example is prompt.examples[-1]
            question = f"{prompt.task} {example.question}" + ("?" if asked else "=")
            answer, after = [*example.answer, EOS if asked else ";"], [] if asked else [" "]
            tokens += [*question, *answer, *after]
            answers += [False] * len(question) + [True] * len(answer) + [False] * len(after)
        return [self.ids[token] for token in tokens], answers

    def draw(self, least: float, most: float) -> None:
        """Sequences for some steps, cut into batches of so many tokens with their padding."""
        sequences = sorted((self.sequence(least, most) for _ in range(POOL)), key=lambda one: len(one[0]))
        batch: list[tuple[list[int], list[bool]]] = []
        for one in sequences:
            if len(one[0]) * (len(batch) + 1) > self.tokens:
                self.batches.append(batch)
                batch = []
            batch.append(one)
        self.rng.shuffle(self.batches)

    def batch(self, least: float, most: float) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, T], padded on the right, and answers bool [B, T]. least, most: share of the sizes"""
        if not self.batches:
            self.draw(least, most)
        sequences = self.batches.pop()
        longest = max(len(ids) for ids, _ in sequences)
        return (
            torch.tensor([ids + [self.ids[PAD]] * (longest - len(ids)) for ids, _ in sequences]),
            torch.tensor([answers + [False] * (longest - len(answers)) for _, answers in sequences]),
        )


def forward(model: MixtralForCausalLM, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
    """The dense network, and what its routers decided. tokens int64 [B, T] -> logits [B, T, V]

    Sequences are padded on the right, where causal attention never looks from a real token: no mask is needed.
    """
    x = model.embed(tokens)                                                         # [B, T, H]
    step = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, None)
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
            torch.nn.init.normal_(parameter, std=0.05)


class Muon:
    """Steps along the nearest orthogonal matrix to the momentum (K. Jordan, 2024), all matrices of a shape at once.

    It learns these tasks from about a third of the text that AdamW takes.
    """

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.of_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self.of_shape.setdefault(matrix.shape, []).append(matrix)
        self.moments = {shape: torch.zeros(len(of), *shape) for shape, of in self.of_shape.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, matrices in self.of_shape.items():
            # An expert that no token reached has no gradient.
            gradients = torch.stack([one.new_zeros(shape) if one.grad is None else one.grad for one in matrices])
            moment = self.moments[shape].mul_(self.momentum).add_(gradients)
            steps = orthogonal(gradients + self.momentum * moment) * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, step in zip(matrices, steps, strict=True):
                matrix.mul_(1 - rate * self.weight_decay).sub_(step, alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: its singular values become 0.7 to 1.2. [n, rows, columns] -> the same"""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrices else x.mT


def train(steps: int, tokens: int, learning_rate: float, seed: int) -> MixtralForCausalLM:
    """Small questions that grow, then a quarter as many steps on those of full size."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(read_mixtral_config(CONFIG))
    initialise(model)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million weights")
    train_on(model, TrainingText(seed, tokens), steps, learning_rate, growing=True)
    train_on(model, TrainingText(seed + 1, tokens), steps // 4, learning_rate / 2, growing=False)
    return model


def train_on(
    model: MixtralForCausalLM, text: TrainingText, steps: int, learning_rate: float, growing: bool
) -> None:
    # Embeddings, the head, routers and norms have no use for orthogonal steps.
    inner = {name: one for name, one in model.named_parameters() if name.endswith("_proj.weight")}
    others = [one for name, one in model.named_parameters() if name not in inner]
    muon, adam = Muon(list(inner.values())), torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0, fused=True)
    began = time.perf_counter()
    for step in range(steps):
        done = step / steps
        rate = learning_rate * min(1.0, (step + 1) / 50) * (1 - done)
        grown = min(1.0, 0.35 + 3 * done)
        ids, answers = text.batch(*(grown / 2, grown) if growing else (1, 1))       # [B, T]
        logits, routings = forward(model, ids)                                      # [B, T, V]
        wanted = answers[:, 1:]
        task_loss = F.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])
        real = ids.flatten() != CONFIG["pad_token_id"]
        balance = torch.stack([balance_loss(routing, real) for routing in routings]).mean()
        model.zero_grad()
        (task_loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = rate / 10
        adam.step()
        muon.step(rate)
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step:5}  loss {task_loss:.4f}  balance {balance:.3f}  {seconds:5.0f} s", flush=True)


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
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch, with its padding")
    parser.add_argument("--learning-rate", type=float, default=2e-2, help="of Muon; a tenth of it is AdamW's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, default=200, help="held-out questions per task")
    parser.add_argument("--evaluate", action="store_true", help="do not train")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        model = train(arguments.steps, arguments.tokens, arguments.learning_rate, arguments.seed)
        save(model, arguments.out)
        engine = load(arguments.out)
        prior.write(arguments.out / prior.FILE, engine.fingerprint, prior.make(engine, progress=True), engine.model)
        (arguments.out / prior.FILE).chmod(0o644)
    for task, share in evaluate(arguments.out, arguments.questions).items():
        print(f"{task:8} {share:6.1%}")


if __name__ == "__main__":
    main()
