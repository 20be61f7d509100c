"""Evidence after the prompt, a prior and the rule `up` the slow way: Hugging Face's modules, full weights and zeros.

Written from the method's description alone and sharing no code with the engine, as slow_pop.py, whose sizes and order
it takes. One sequence, greedy.

T rows, I FFN channels, H hidden size.
"""

from collections import defaultdict
from typing import Any

import torch
from slow_pop import slow_order, slow_sizes
from torch import Tensor


class SlowEvidence:
    """A Hugging Face Llama whose feed-forward networks are computed anew behind themselves, by forward hooks.

    settings  ffn_ratio, candidate_width, retained_share, rule ("pop" or "up"), min_evidence, dense_every, redraw_every;
              the prompt is finished on what stays
    prior     per layer the mean squares of h and of act(gate), float64 [2, I], which count as `prior_tokens`
    """

    def __init__(self, model: Any, settings: Any, prior: list[Tensor], prior_tokens: int) -> None:
        self.model, self.settings = model, settings
        self.squares = [one * prior_tokens for one in prior]
        self.weight = prior_tokens
        self.regions: dict[int, tuple[list[int], list[int], int]] = {}
        self.usual_gate: dict[int, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def sizes(self, channels: int) -> tuple[int, int, int]:
        """retained, candidate, pick."""
        active, pick, retained = slow_sizes(channels, self.settings.ffn_ratio, self.settings.candidate_width)
        if self.settings.rule == "up":
            retained = round((self.settings.retained_share or 0) * channels)
            return retained, channels - retained, active - retained
        return retained, 2 * pick, pick

    def network(self, index: int, mlp: Any) -> Any:
        norms = mlp.down_proj.weight.detach().double().norm(dim=0)                  # [I]

        def compute(_: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = arguments                                                        # [1, T, H]
            gate, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)                 # [1, T, I]
            h = gate * up
            if self.dense or self.is_prompt:
                for row, values in enumerate((h, gate)):
                    self.squares[index][row] += values[0].double().square().sum(dim=0)
            if self.draws:
                retained, candidate, pick = self.sizes(len(norms))
                order = slow_order((self.squares[index][0].sqrt() * norms).tolist())
                self.regions[index] = sorted(order[:retained]), sorted(order[retained : retained + candidate]), pick
                self.usual_gate[index] = (self.squares[index][1] / (self.weight + self.tokens)).sqrt()
            if self.dense:
                return output
            kept, candidates, pick = self.regions[index]
            if self.is_prompt:
                kept = kept + candidates
            else:
                scores = h[0, 0].double().abs() * norms
                if self.settings.rule == "up":
                    scores = up[0, 0].double().abs() * self.usual_gate[index] * norms
                best = slow_order(scores[candidates].tolist())[:pick]
                kept = kept + [candidates[place] for place in best]
            on = torch.zeros_like(h).index_fill(-1, torch.tensor(kept), 1)
            return mlp.down_proj(h * on)

        return compute

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        settings, networks = self.settings, [layer.mlp for layer in self.model.model.layers]
        handles = [mlp.register_forward_hook(self.network(index, mlp)) for index, mlp in enumerate(networks)]
        self.tokens, steps, drawn_at, cache = len(prompt), 0, 0, None
        self.is_prompt, self.draws = True, self.tokens >= settings.min_evidence
        self.dense = not self.draws
        new: list[int] = []
        while len(new) < count:
            given = torch.tensor([new[-1:] or prompt])
            out = self.model(given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new.append(int(out.logits[0, -1].argmax()))
            steps += 1
            too_few = self.tokens < settings.min_evidence
            its_turn = settings.dense_every is not None and steps % settings.dense_every == 0
            self.is_prompt, self.dense, self.draws = False, too_few or its_turn, False
            if self.dense:
                self.counts["dense"] += 1
                self.tokens += 1
                long_ago = settings.redraw_every is not None and steps - drawn_at >= settings.redraw_every
                self.draws = self.tokens >= settings.min_evidence and (too_few or long_ago)
            if self.draws:
                self.counts["drawn"] += 1
                drawn_at = steps
        for handle in handles:
            handle.remove()
        return new


@torch.inference_mode()
def mean_squares(model: Any, tokens: list[int]) -> list[Tensor]:
    """What `SlowEvidence` takes for a prior, of a text run through the dense model."""
    seen: list[Tensor] = []

    def look(mlp: Any, arguments: tuple[Tensor], _: Tensor) -> None:
        gate = mlp.act_fn(mlp.gate_proj(arguments[0]))
        h = gate * mlp.up_proj(arguments[0])                                        # [1, T, I]
        seen.append(torch.stack([values[0].double().square().mean(dim=0) for values in (h, gate)]))

    handles = [layer.mlp.register_forward_hook(look) for layer in model.model.layers]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return seen
