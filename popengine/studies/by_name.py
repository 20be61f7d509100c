"""Pruning methods by name; each is one small function that decides how a ChannelPartition is made or used.

A method turns a Request into a Pruning. Methods that follow the prompt change a setting. Static methods rank every
network's channels in advance and replace the rule by a StaticRule. Everything after that (prefill, decode steps,
generation, scoring and byte counts) is the same code for all methods.

To add one, write a function that takes a Request and add it to METHODS. For example, ranking channels by the norm of
their down_proj column alone:

    def down_norm(request: Request) -> StudyPruning:
        return request.keep_highest({name: ffn.down_norms() for name, ffn in request.networks.items()})

I FFN channels, H hidden size.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from popengine.studies.cfsp import cfsp
from popengine.studies.experts import router_statistics, uncurl
from popengine.studies.finercut import finercut
from popengine.studies.input_shares import USUAL_INPUTS
from popengine.studies.input_sparsity import InputSparsity
from popengine.studies.probe_pruning import probe_pruning
from popengine.studies.request import Request as Request
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import INPUT_METHODS, RULE_NAMES
from popengine.studies.shortgpt import shortgpt
from popengine.studies.tyr import tyr
from weights.errors import InputError


def dense(request: Request) -> StudyPruning:
    """Prune nothing."""
    return request.pruning(prune_ratio=0.0, ffn_ratio=None, head_ratio=0.0, input_sparsity="")


def pop(request: Request) -> StudyPruning:
    """Partition from the prompt and pick candidates at every step."""
    return request.pruning()


def frozen(request: Request) -> StudyPruning:
    """Keep the prompt's mask at every step: POP of width 0, which is GRIFFIN (arXiv 2404.01365)."""
    return request.pruning(candidate_width=0.0, retained_share=None)


def by_rule(rule: str) -> Callable[[Request], StudyPruning]:
    """Return the method of a rule in popengine/studies/rules.py."""
    return lambda request: request.pruning(rule=rule)


def by_inputs(score: str) -> Callable[[Request], StudyPruning]:
    """Return the method that leaves out inputs by this score (TEAL's or WINA's), and prunes nothing else."""

    def method(request: Request) -> StudyPruning:
        pruning = request.pruning(
            prune_ratio=0.0, ffn_ratio=None, head_ratio=0.0, rule="pop", retained_share=None,
            input_sparsity=request.settings.input_sparsity or USUAL_INPUTS, input_score=score,
        )
        if pruning.settings.input_shares is None:
            raise InputError("this method leaves out inputs: give --input-sparsity a share above 0")
        return pruning

    return method


def random(request: Request) -> StudyPruning:
    """Keep channels drawn at random, the lower baseline of every method."""
    generator, ranks = torch.Generator().manual_seed(request.seed), request.model.config.ranks
    scores = {}
    for name, ffn in request.networks.items():
        drawn = torch.rand(ranks.count * ffn.channels, generator=generator)
        scores[name] = drawn[ranks.stretch(len(drawn))].to(ffn.device)              # [I]
    return request.keep_highest(scores)


def magnitude(request: Request) -> StudyPruning:
    """Score by the largest absolute weight in a channel's rows of gate and up, as width pruning of gated networks."""
    return request.keep_highest(
        {
            name: torch.maximum(*(rows.values().abs().amax(dim=1) for rows in (ffn.gate_proj, ffn.up_proj))).float()
            for name, ffn in request.networks.items()
        }
    )


def wanda_sp(request: Request) -> StudyPruning:
    """Score by Wanda's |weight| times activation norm (arXiv 2306.11695), summed over a channel's down_proj column.

    This is "Wanda-sp" in FLAP (arXiv 2312.11983). Networks that the calibration never reached are ranked by weights.
    """
    calibration = request.calibrated("wanda-sp")
    scores = {}
    for name, ffn in request.networks.items():
        moments = calibration.moments[name]
        scores[name] = ffn.down_proj.values().float().abs().sum(dim=0) * moments.mean_square.sqrt()   # [I]
        if moments.tokens == 0:
            scores[name] = ffn.weight_scores()
    return request.keep_highest(scores)


def flap(request: Request) -> StudyPruning:
    """Remove channels that fluctuate little and keep their mean as a bias of down_proj (FLAP, arXiv 2312.11983).

    Score: variance of the channel times the squared norm of its down_proj column, standardised within each network
    and compared over all networks, so that their shares differ. A network keeps at least one channel.
    """
    calibration, ranks = request.calibrated("flap"), request.model.config.ranks
    scores, standardised = {}, []
    for name, ffn in request.networks.items():
        moments = calibration.moments[name]
        scores[name] = moments.variance * ffn.down_norms().square()                 # [I]
        if moments.tokens < 2:
            scores[name] = ffn.weight_scores()
        raw = ranks.join(scores[name])                                              # [I], of all ranks
        standardised.append((raw - raw.mean()) / raw.std().clamp(min=1e-12))
    together = torch.cat(standardised)
    budget = sum(map(request.count_kept, scores.values()))
    order = together.sort(descending=True, stable=True).indices[:budget]
    owner = torch.repeat_interleave(torch.tensor(list(map(len, standardised)), device=order.device))
    counts = owner[order].bincount(minlength=len(scores)).tolist()
    kept = {name: max(1, count) for name, count in zip(scores, counts, strict=True)}
    return request.keep(scores, kept, {name: moments.mean for name, moments in calibration.moments.items()})


def prefill_only(request: Request) -> StudyPruning:
    """Skip the deepest layers with all but the last prompt tokens (arXiv 2602.03295); steps are dense."""
    pruning = dense(request)
    if not pruning.skipped:
        raise InputError("this method skips layers of the prompt: give --prefill-skip a share above 0")
    return pruning


def skip_first(request: Request) -> StudyPruning:
    """Skip the same number of first layers, a control (arXiv 2602.03295, Table 4)."""
    pruning = prefill_only(request)
    return replace(pruning, skipped=tuple(range(len(pruning.skipped))))


def skip_evenly(request: Request) -> StudyPruning:
    """Skip the same number of layers, evenly spaced up to the last one (every third for a share of 1/3), a control."""
    pruning, layers = prefill_only(request), len(request.model.model.layers)
    count = len(pruning.skipped)
    return replace(pruning, skipped=tuple((place + 1) * layers // count - 1 for place in range(count)))


def skip_no_boundary(request: Request) -> StudyPruning:
    """Run no prompt token through the skipped layers, so the first new token comes from kept layers, a control."""
    return replace(prefill_only(request), boundary=0)


def skip_no_keys(request: Request) -> StudyPruning:
    """Drop the prompt's keys and values in skipped layers, so that steps attend there to new tokens only, a control."""
    pruning = prefill_only(request)
    if pruning.thin_from is not None:
        raise InputError("method skip-no-keys keeps all tokens of pictures: leave out --visual-tokens")
    return replace(pruning, forgets=True)


def visual_tokens(request: Request) -> StudyPruning:
    """Drop picture tokens of the prompt (FastV, arXiv 2403.06764; DivPrune, arXiv 2503.02175); steps are dense."""
    pruning = dense(request)
    if pruning.thin_from is None:
        raise InputError("this method leaves out tokens of pictures: give --visual-tokens a share or a number")
    return pruning


METHODS: dict[str, Callable[[Request], StudyPruning]] = {
    "dense": dense,
    "pop": pop,
    "frozen": frozen,
    **{rule: by_rule(rule) for rule in RULE_NAMES if rule != "pop"},
    **{score: by_inputs(score) for score in INPUT_METHODS},
    "random": random,
    "magnitude": magnitude,
    "wanda-sp": wanda_sp,
    "flap": flap,
    "cfsp": cfsp,
    "tyr": tyr,
    "probe-pruning": probe_pruning,
    "shortgpt": shortgpt,
    "finercut": finercut,
    "prefill-only": prefill_only,
    "skip-first": skip_first,
    "skip-evenly": skip_evenly,
    "skip-no-boundary": skip_no_boundary,
    "skip-no-keys": skip_no_keys,
    "visual-tokens": visual_tokens,
    "router-statistics": router_statistics,
    "uncurl": uncurl,
}


def pruning_for(method: str, request: Request) -> StudyPruning:
    """Apply `method` to the request. Raises InputError for an unknown method, and for one that keeps all inputs."""
    check_method(method)
    pruning = METHODS[method](request)
    if pruning.settings.input_shares is not None and not isinstance(pruning.rule, InputSparsity):
        raise InputError(f"method {method} leaves out no inputs: give no --input-sparsity")
    return pruning


def check_method(method: str) -> None:
    """Raise InputError for an unknown method."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
