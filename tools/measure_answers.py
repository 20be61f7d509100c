"""Measure the quality of short answers: twenty short prompts, answered greedily under several settings.

    python tools/measure_answers.py [--ckpt DIR] [--dtype bfloat16] [-n 128]

Per setting: the share of distinct 4-grams among those of the answers' tokens (low for loops), relative to the dense
model's; the number of answers that loop (their last 32 tokens have fewer than 12 distinct 4-grams) where the dense
answer does not; and the perplexity of the answers under the dense model.
"""

import argparse
import math

import torch

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import DENSE, PruningSettings

PROMPTS = [
    "Why is the sky blue?",
    "Write a short poem about a river.",
    "What should I cook with eggs, rice and spinach?",
    "How do bees find their way home?",
    "Tell me a story about a lost umbrella.",
    "What is the capital of France, and what is it known for?",
    "Explain what a fraction is to a child.",
    "Give me three tips for sleeping better.",
    "How does a bicycle stay upright?",
    "Write an email to my landlord about a broken heater.",
    "What are the seasons, and why do they change?",
    "Describe a busy market in the morning.",
    "How can I learn to play the guitar?",
    "What is the difference between a lake and a sea?",
    "Suggest a name for a small bakery and say why.",
    "How do I remove a coffee stain from a shirt?",
    "What makes bread rise?",
    "Plan a weekend trip to the mountains for two people with little money.",
    "Why do leaves change their colour in autumn, and why do some trees stay green all winter?",
    "I have a job interview tomorrow at nine, I am nervous, and I do not know what to wear. Please help me.",
]
SETTINGS = {
    "dense": DENSE,
    "the paper, 0.2": PruningSettings.paper(),
    "recommended, 0.2": PruningSettings(),
    "pop, width 0.4 and a prior, 0.2": PruningSettings.paper(candidate_width=0.4, prior=32),
    "the same, a dense step in 8": PruningSettings.paper(candidate_width=0.4, prior=32, dense_every=8, redraw_every=32),
    "up and a prior, 0.2": PruningSettings.paper(rule="up", prior=32),
}


def grams(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + 4]) for place in range(len(ids) - 3)]


def loops(ids: list[int]) -> bool:
    return len(ids) >= 64 and len(set(grams(ids[-32:]))) < 12


@torch.inference_mode()
def loss_under_dense(engine: Engine, prompt: list[int], answer: list[int]) -> float:
    """Summed negative log-probability of the answer, nats."""
    logits = engine.model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :].float()
    said = torch.tensor(answer)[:, None]
    return -float(logits.log_softmax(dim=-1).gather(1, said).sum())


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ckpt")
    flags.add_argument("--dtype", default="auto")
    flags.add_argument("-n", "--max-new-tokens", type=int, default=128)
    given = flags.parse_args()
    engine = load(given.ckpt, dtype=given.dtype, progress=True)
    dense_loops: list[bool] = []
    dense_share = 0.0
    for name, settings in SETTINGS.items():
        distinct = total = tokens = 0
        loss, looping = 0.0, []
        for prompt in PROMPTS:
            (made,) = engine.generate(prompt, max_new_tokens=given.max_new_tokens, pruning=settings)
            found = grams(made.token_ids)
            distinct, total = distinct + len(set(found)), total + len(found)
            loss += loss_under_dense(engine, made.prompt_token_ids, made.token_ids)
            tokens += len(made.token_ids)
            looping.append(loops(made.token_ids))
        share = distinct / max(1, total)
        dense_loops, dense_share = (looping, share) if settings is DENSE else (dense_loops, dense_share)
        new_loops = sum(own and not dense for own, dense in zip(looping, dense_loops, strict=True))
        print(
            f"{name:36} distinct 4-grams {share:.3f} ({share / dense_share:.2f} of dense), {sum(looping)} loop, "
            f"{new_loops} where dense does not; perplexity under dense {math.exp(loss / tokens):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
