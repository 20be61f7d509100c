"""Compare a rule of your own with the paper's: python examples/compare_rule.py TEXT_FILE [CHECKPOINT]

The rule here partitions channels by how strongly they fire alone, without the norms of down_proj. Quality goes through
the same decode steps as generation does. Numbers: perplexity, and KL divergence from the dense model in nats.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import popengine
from models.feed_forward import FeedForward
from models.pruning.evidence import Evidence
from models.pruning.pop import POP
from popengine.evaluation.scoring import cut_windows, read_per_token, read_text, score_text


class ActivationsAlone(POP):
    """POP, but a channel's importance over the prompt is the norm of its activations."""

    def scores(self, ffn: FeedForward, evidence: Evidence) -> Tensor:
        return evidence.scores(torch.ones_like(ffn.down_norms()))                   # [I]


engine = popengine.load(sys.argv[2] if len(sys.argv) > 2 else None, dtype="float32")
windows = cut_windows(read_text(Path(sys.argv[1]), engine.tokenizer), engine.tokenizer, 64, 32, 4)
pop = engine.resolve(popengine.PruningSettings.paper(prune_ratio=0.2))
own = replace(pop, rule=ActivationsAlone(pop.rule.ffn_ratio, pop.rule.width))
dense = engine.resolve(popengine.PruningSettings(prune_ratio=0))
for name, pruning in {"dense": dense, "pop": pop, "own": own}.items():
    found = score_text(engine, windows, pruning, step_by_step=False, bar=None)
    read, of_dense = read_per_token(engine, pruning)
    share = f"{read / of_dense:.1%} of the bytes"
    print(f"{name:6} perplexity {found.perplexity:8.2f}   KL {found.divergence:.4f}   {share}")
