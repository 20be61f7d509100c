"""The virtual gate: the importance of each layer for prompt positions, and for positions that predict new tokens.

Prefill-Only pruning (arXiv 2602.03295, Eq. 5-13) rests on the difference. Each layer gets two gates of value 1 on its
additions to the hidden state, x + Attn(x) g and y + FFN(y) g: one for all prompt positions except the last, one for
the positions from there on, which predict the answer. The importance of a layer is the mean over samples of
(dLoss / dg)^2; the loss is summed over an answer that the model sampled itself.

T tokens, N prompt tokens, A answer tokens, L layers, H hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.llama import LlamaForCausalLM
from models.passes import PictureRows, prefill_pass
from models.slots import AttentionPattern
from popengine.engine.engine import Engine
from popengine.engine.sampling_settings import Sampling
from popengine.evaluation.tasks import Question
from popengine.images.images import ImageSource
from popengine.studies.settings import DENSE

PROMPT, OUTPUT = 0, 1


@dataclass(frozen=True)
class Sample:
    """A prompt with its images, and an answer that the model sampled."""

    prompt: list[int]
    answer: list[int]
    images: Sequence[ImageSource] = ()


@dataclass(frozen=True)
class GateStudy:
    """The result of a gate study. importance: [2, L], for prompt positions and for output positions"""

    importance: Tensor
    samples: int

    def rows(self) -> list[dict[str, Any]]:
        """Return per layer both importances, and each as a share of its sum over layers."""
        shares = self.importance / self.importance.sum(dim=1, keepdim=True)
        return [
            {
                "layer": layer, "prompt": float(self.importance[PROMPT, layer]),
                "output": float(self.importance[OUTPUT, layer]), "prompt_share": float(shares[PROMPT, layer]),
                "output_share": float(shares[OUTPUT, layer]),
            }
            for layer in range(self.importance.shape[1])
        ]


def answered(
    engine: Engine, prompts: Iterable[tuple[list[int], Sequence[ImageSource]]], tokens: int, seed: int
) -> list[Sample]:
    """Sample an answer to each prompt with the dense model, at temperature 1, of at most `tokens` tokens."""
    samples = []
    for index, (ids, images) in enumerate(prompts):
        run = engine.run([ids], tokens, DENSE, Sampling(temperature=1.0, seed=seed + index), images=images)
        samples.append(Sample(ids, [token for (token,) in run if token is not None], images))
    return samples


def of_questions(engine: Engine, questions: Sequence[Question]) -> list[tuple[list[int], Sequence[ImageSource]]]:
    """Tokenize questions, with their images."""
    return [(engine.prompts.ids(one.prompt, images=one.images), one.images) for one in questions]


def study(engine: Engine, samples: Sequence[Sample], show_progress: bool) -> GateStudy:
    """Run one forward and backward pass per sample and average the importances."""
    total = torch.zeros(2, engine.model.config.num_hidden_layers, device=engine.device)
    for sample in tqdm(samples, desc="gates", unit="sample", disable=not show_progress):
        tokens = torch.tensor([sample.prompt + sample.answer[:-1]], device=engine.device)       # [1, T]
        with torch.no_grad():
            rows = engine.pictures.embed(tokens, None, engine.pictures.given(sample.images))
        found = gradients(engine.model, rows.x, len(sample.prompt), sample.answer, rows.pictures)
        total += found.square()
    return GateStudy(total.cpu() / len(samples), len(samples))


def gradients(
    model: LlamaForCausalLM, x: Tensor, prompt_tokens: int, answer: Sequence[int], pictures: PictureRows | None = None
) -> Tensor:
    """Compute dLoss / dg of both gates of every layer (Eq. 8). x [1, N + A - 1, H], embedded -> float32 [2, L]"""
    with torch.enable_grad():
        gates = torch.ones(2, len(model.model.layers), device=x.device, requires_grad=True)
        after_prompt = torch.arange(x.shape[1], device=x.device) >= prompt_tokens - 1           # [T]
        loss = gated_loss(model, x, gates[after_prompt.long()], answer, pictures)               # gates [T, L]
        return torch.autograd.grad(loss, gates)[0]


def gated_loss(
    model: LlamaForCausalLM, x: Tensor, gates: Tensor, answer: Sequence[int], pictures: PictureRows | None = None
) -> Tensor:
    """Compute the summed negative log-probability of the answer in the gated model. x [1, T, H]; gates [T, L]"""
    given = pictures or PictureRows()
    rows = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, None, given)
    for index, (layer, gate) in enumerate(zip(model.model.layers, gates.unbind(dim=1), strict=True)):
        gate = gate[:, None].to(x.dtype)                                            # [T, 1]
        x = x + layer.after_attention(layer.self_attn(layer.before_attention(x), rows)) * gate
        x = x + layer.after_mlp(layer.mlp(layer.before_mlp(x))) * gate
        x = given.add_features(index, x)
    logits = model.head(x[:, -len(answer) :])[0]                                    # [A, V]
    said = torch.tensor(answer, device=x.device)                                    # [A]
    return F.cross_entropy(logits.float(), said, reduction="sum")


def markdown(found: GateStudy, about: dict[str, Any]) -> str:
    """Write the table of a gate study in Markdown."""
    lines = ["| layer | prompt | output | share of prompt | share of output |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['layer']} | {row['prompt']:.3g} | {row['output']:.3g} | {row['prompt_share']:.2%} | "
        f"{row['output_share']:.2%} |"
        for row in found.rows()
    ]
    facts = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items() if value is not None)
    return "\n".join([*lines, "", f"Mean of (dLoss / dg)^2 over {found.samples} samples. Measured with: {facts}.", ""])
