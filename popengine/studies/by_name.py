"""Pruning methods by name: each is one small function that says how a ChannelPartition is made or used.

A method turns what the user asked for into a Pruning. Those that follow the prompt change a setting; static ones rank
every network's channels in advance and put a StaticRule in the place of the prompt's. Everything after that, prefill,
decode steps, generation, scoring and byte counts, is the same code for all of them.

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
from popengine.studies.probe_pruning import probe_pruning
from popengine.studies.request import Request as Request
from popengine.studies.resolve import StudyPruning
from popengine.studies.settings import RULE_NAMES
from popengine.studies.shortgpt import shortgpt
from popengine.studies.tyr import tyr
from weights.errors import InputError


def dense(request: Request) -> StudyPruning:
    """Nothing is pruned."""
    return request.pruning(prune_ratio=0.0, ffn_ratio=None, head_ratio=0.0)


def pop(request: Request) -> StudyPruning:
    """Partition from the prompt, candidates picked anew at every step."""
    return request.pruning()


def frozen(request: Request) -> StudyPruning:
    """The prompt's mask at every step: POP of width 0, which is GRIFFIN (arXiv 2404.01365)."""
    return request.pruning(candidate_width=0.0, retained_share=None)


def by_rule(rule: str) -> Callable[[Request], StudyPruning]:
    """A rule of popengine/studies/rules.py as a method."""
    return lambda request: request.pruning(rule=rule)


def random(request: Request) -> StudyPruning:
    """Channels drawn at random: what any method has to beat."""
    generator, ranks = torch.Generator().manual_seed(request.seed), request.model.config.ranks
    scores = {}
    for name, ffn in request.networks.items():
        drawn = torch.rand(ranks.count * ffn.channels, generator=generator)
        scores[name] = drawn[ranks.stretch(len(drawn))].to(ffn.device)              # [I]
    return request.keep_highest(scores)


def magnitude(request: Request) -> StudyPruning:
    """The largest absolute weight of a channel's rows of gate and up, as width pruning of gated networks does."""
    return request.keep_highest(
        {
            name: torch.maximum(*(rows.values().abs().amax(dim=1) for rows in (ffn.gate_proj, ffn.up_proj))).float()
            for name, ffn in request.networks.items()
        }
    )


def wanda_sp(request: Request) -> StudyPruning:
    """Wanda's |weight| times activation norm (arXiv 2306.11695), summed over a channel's column of down_proj.

    As "Wanda-sp" in FLAP (arXiv 2312.11983). Networks that the calibration never reached are ranked by weights alone.
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
    """FLAP (arXiv 2312.11983): channels that fluctuate little go, and their mean stays as a bias of down_proj.

    Score: variance of the channel times the squared norm of its down_proj column, standardised inside each network
    and compared over all of them, so that networks give up unequal shares. A network keeps one channel at least.
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
    """Prompts skip the deepest layers, all but their last tokens (arXiv 2602.03295); steps are the dense model's."""
    pruning = dense(request)
    if not pruning.skipped:
        raise InputError("this method skips layers of the prompt: give --prefill-skip a share above 0")
    return pruning


def skip_first(request: Request) -> StudyPruning:
    """A control (its Table 4): as many of the first layers."""
    pruning = prefill_only(request)
    return replace(pruning, skipped=tuple(range(len(pruning.skipped))))


def skip_evenly(request: Request) -> StudyPruning:
    """A control: as many layers spread over the depth, every third one for a share of 1/3, the last among them."""
    pruning, layers = prefill_only(request), len(request.model.model.layers)
    count = len(pruning.skipped)
    return replace(pruning, skipped=tuple((place + 1) * layers // count - 1 for place in range(count)))


def skip_no_boundary(request: Request) -> StudyPruning:
    """A control: no prompt token runs through the skipped layers, and the first new token comes from the kept ones."""
    return replace(prefill_only(request), boundary=0)


def skip_no_keys(request: Request) -> StudyPruning:
    """A control: skipped layers keep nothing of the prompt, so that steps see there what came after it alone."""
    pruning = prefill_only(request)
    if pruning.thin_from is not None:
        raise InputError("method skip-no-keys keeps all tokens of pictures: leave out --visual-tokens")
    return replace(pruning, forgets=True)


def visual_tokens(request: Request) -> StudyPruning:
    """Prompts leave out tokens of their pictures (FastV, arXiv 2403.06764; DivPrune, arXiv 2503.02175); steps are the
    dense model's."""
    pruning = dense(request)
    if pruning.thin_from is None:
        raise InputError("this method leaves out tokens of pictures: give --visual-tokens a share or a number")
    return pruning


METHODS: dict[str, Callable[[Request], StudyPruning]] = {
    "dense": dense,
    "pop": pop,
    "frozen": frozen,
    **{rule: by_rule(rule) for rule in RULE_NAMES if rule != "pop"},
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
    """What `method` makes of the request. Raises InputError for an unknown method."""
    check_method(method)
    return METHODS[method](request)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
