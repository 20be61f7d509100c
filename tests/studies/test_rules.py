"""Rules beside the paper's, and evidence that goes on after the prompt: each held to a slow obvious version."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    LLAVA_TINY,
    MIXTRAL,
    MIXTRAL_TINY,
    SIZES,
    complete_checkpoint,
    heads_partition,
    left_padded,
    prefilled,
    regions,
    resolved,
    saved_pair,
    stored_by_columns,
)
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from slow_pop import slow_order
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.cost_model import bytes_per_token
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices import packed
from models.matrices.packed import Int4Matrix, Int8Matrix, draft_of
from models.passes import prefill_pass, repartition
from models.slots import AttentionPattern
from popengine.engine.loading import load
from popengine.engine.prior import read
from popengine.engine.run import next_logits
from popengine.studies import rules
from popengine.studies.evidence import Prior
from popengine.studies.known_text import evaluate
from popengine.studies.refresh import RegularRefresh
from popengine.studies.settings import DENSE, RULE_NAMES, PruningSettings
from weights.errors import InputError

pytestmark = pytest.mark.usefixtures("exact_drafts")
CHEAP = ("up", "gate", "cats", "all-channels", "draft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES))[1].double()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("mixtral"), MIXTRAL)[1].double()


def slow_step(ffn: FeedForward, x: Tensor, prompt: Tensor, rule: str, active: int, retained: int) -> Tensor:
    """One row through a network: every score by its formula, channels that lose set to zero. x [H], prompt [T, H]

    retained  channels, the best of the prompt, that run whatever their score
    """
    gate, up = ffn.act(x @ ffn.gate_proj.weight.T), x @ ffn.up_proj.weight.T        # [I]
    usual_gate = ffn.act(prompt @ ffn.gate_proj.weight.T).square().mean(dim=0).sqrt()
    usual_up = (prompt @ ffn.up_proj.weight.T).square().mean(dim=0).sqrt()
    norms = ffn.down_proj.weight.norm(dim=0)
    draft_gate, draft_up = (draft_of(matrix).values() for matrix in (ffn.gate_proj, ffn.up_proj))
    scores = {
        "up": up.abs() * usual_gate * norms,
        "gate": gate.abs() * usual_up * norms,
        "cats": gate.abs(),
        "all-channels": (gate * up).abs() * norms,
        "draft": (ffn.act(x.float() @ draft_gate.T) * (x.float() @ draft_up.T)).abs() * norms,
    }[rule]
    of_prompt = ffn.activation(prompt).norm(dim=0) * norms                          # [I]
    scores[slow_order(of_prompt.tolist())[:retained]] = torch.inf
    keep = torch.zeros_like(scores)
    keep[slow_order(scores.tolist())[:active]] = 1
    return (gate * up * keep) @ ffn.down_proj.weight.T


@pytest.mark.numeric
@pytest.mark.parametrize("share", [None, 0.2], ids=["", "retained"])
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("rule", CHEAP)
@torch.inference_mode()
def test_each_rule_is_its_formula(
    rule: str, by_columns: bool, share: float | None, model: LlamaForCausalLM
) -> None:
    """One row, by whichever path reads least; what its path leaves unread is poisoned in the test below."""
    model = stored_by_columns(model) if by_columns else model
    kind = model.lm_head.weight.dtype
    pruning = resolved(model, PruningSettings.paper(ffn_ratio=0.4, rule=rule, retained_share=share))
    state = model.new_state(1, 64, pruning)
    prompt = torch.randn(14, SIZES["hidden_size"], dtype=kind)
    ffn, active = model.model.layers[1].mlp, state.layers[1].ffn
    rows = prefill_pass(model.model.rotary, [AttentionPattern(None)], prompt[None], None)
    rows.partitions, rows.tokens = True, len(prompt)
    active.prefill(prompt[None], rows)
    _, step = model.begin(torch.tensor([5]), state)
    for x in torch.randn(6, SIZES["hidden_size"], dtype=kind):
        wanted = slow_step(ffn, x, prompt, rule, active.sizes.computed, round(80 * (share or 0)))
        assert_same(active.decode(x[None, None], step)[0, 0], wanted)


@pytest.mark.parametrize("more", [{"redraw_every": 6}, {"redraw_every": 3, "retained_share": 0.3}])
@pytest.mark.parametrize("rule", RULE_NAMES)
@torch.inference_mode()
def test_steps_and_a_known_text_agree_under_every_rule(
    rule: str, more: dict[str, Any], model: LlamaForCausalLM, mixture: LlamaForCausalLM
) -> None:
    """Steps read only what the rule chose; a text at once masks. With dense steps and redraws between."""
    for one in (model, mixture):
        settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, prior=1, rule=rule, dense_every=3, **more)
        tokens = torch.randint(SIZES["vocab_size"], (40,), generator=torch.Generator().manual_seed(5))
        _, state = prefilled(one, tokens[None, :12], settings)
        steps = torch.cat([next_logits(one, token[None], state) for token in tokens[12:]])
        assert state.schedule.redraws > 2
        _, again = prefilled(one, tokens[None, :12], settings)
        assert_same(evaluate(one, tokens[12:], again), steps)


@torch.inference_mode()
def test_rows_that_a_cheap_rule_does_not_choose_are_not_read(model: LlamaForCausalLM) -> None:
    model = deepcopy(model)
    pruning = resolved(model, PruningSettings.paper(ffn_ratio=0.4, rule="up"))
    _, state = prefilled(model, left_padded([14], SIZES["vocab_size"])[0], pruning)
    layer, active = model.model.layers[0].mlp, state.layers[0].ffn
    x = torch.randn(1, 1, SIZES["hidden_size"], dtype=torch.float64)
    _, step = model.begin(torch.tensor([5]), state)
    wanted = active.decode(x, step)
    look = (x @ layer.up_proj.weight.T)[0, 0].abs() * active.candidate_norms
    losing = look.argsort(descending=True)[active.sizes.computed :]
    layer.gate_proj.weight[losing] = torch.nan
    assert_same(active.decode(x, step), wanted)
    dense = bytes_per_token(model, resolved(model, DENSE)) - bytes_per_token(model, pruning)
    assert dense == 8 * len(model.model.layers) * SIZES["hidden_size"] * len(losing)


@pytest.mark.parametrize("wide", [False, True], ids=["eight bits", "four bits"])
@torch.inference_mode()
def test_a_draft_chooses_and_of_the_weights_only_what_it_chose_is_read(
    wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compact network of the channels whose drafts score best; in half precision, as it runs."""
    for module in (rules, packed):
        monkeypatch.setattr(module, "DRAFT_DTYPE", torch.bfloat16)
    sizes = SIZES | {"hidden_size": 64} if wide else SIZES
    model = saved_pair(tmp_path, LlamaConfig(**sizes))[1]
    pruning = resolved(model, PruningSettings.paper(ffn_ratio=0.4, rule="draft"))
    _, state = prefilled(model, left_padded([14], sizes["vocab_size"])[0], pruning)
    layer, active = model.model.layers[0].mlp, state.layers[0].ffn
    assert isinstance(active.drafts[0], Int4Matrix if wide else Int8Matrix)
    x = torch.randn(1, 1, sizes["hidden_size"])
    _, step = model.begin(torch.tensor([5]), state)
    gate, up = (draft(x.bfloat16()) for draft in active.drafts)
    scores = (layer.act(gate) * up).float()[0, 0].abs() * layer.down_norms()
    chosen = scores.argsort(descending=True)[: active.sizes.computed]
    losing = sorted(set(range(layer.channels)) - set(chosen.tolist()))
    h = layer.activation(x)[..., chosen]
    wanted = h @ layer.down_proj.weight[:, chosen].T
    for matrix in (layer.gate_proj, layer.up_proj):
        matrix.weight[losing] = torch.nan
    active.down.weight[:, losing] = torch.nan
    assert_same(active.decode(x, step), wanted)


@torch.inference_mode()
def test_a_retained_share_reads_no_more_of_what_is_chosen(model: LlamaForCausalLM) -> None:
    """Under a cheap rule the retained rows were read anyway; under pop a narrow width prunes the rest for good."""
    def read(**settings: Any) -> int:
        return bytes_per_token(model, resolved(model, PruningSettings.paper(ffn_ratio=0.4, **settings)))

    assert read(rule="up", retained_share=0.2) == read(rule="up")
    row = len(model.model.layers) * SIZES["hidden_size"] * 8
    assert read(retained_share=0.2, candidate_width=1) - read(retained_share=0.2, candidate_width=0.5) == 3 * 24 * row


@torch.inference_mode()
def test_glass_cuts_by_the_sum_of_two_ranks(model: LlamaForCausalLM, mixture: LlamaForCausalLM) -> None:
    settings = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, rule="glass", prior=32)
    generator = torch.Generator().manual_seed(2)
    for one in (model, mixture):
        unfused = resolved(one, settings)
        networks = [module for module in one.modules() if isinstance(module, FeedForward)]
        of = {(ffn, "h"): torch.rand(ffn.channels, generator=generator) for ffn in networks}
        tokens, _ = left_padded([3], SIZES["vocab_size"])       # too few to reach every expert
        drawn = {}
        for count in (1, 1000):
            pruning = unfused.with_prior(Prior(of, count))
            _, state = prefilled(one, tokens, pruning)
            drawn[count] = [held for layer in state.layers for held in getattr(layer.ffn, "active", [layer.ffn])]
        for ffn, held, again in zip(networks, drawn[1], drawn[1000], strict=True):
            if held is None:            # an expert is cut when it is first needed: by the prior alone
                held = again = pruning.rule.new_ffn(ffn)
                repartition(held)
            usual = slow_order((of[ffn, "h"].sqrt() * ffn.down_norms()).tolist())
            own = slow_order((held.evidence.squares.sqrt() * ffn.down_norms()).tolist())
            places = [usual.index(channel) + own.index(channel) * (held.evidence.tokens > 0) for channel in usual]
            by_place = [usual[place] for place in sorted(range(len(usual)), key=lambda at: (places[at], usual[at]))]
            assert held.partition.retained.tolist() == sorted(by_place[: held.sizes.retained])
            assert held.partition.pruned.tolist() == sorted(by_place[held.sizes.active :])
            assert torch.equal(held.partition.order, again.partition.order)


@torch.inference_mode()
def test_steps_add_to_the_evidence_what_one_long_prompt_would_have_shown(
    model: LlamaForCausalLM, mixture: LlamaForCausalLM
) -> None:
    """Dense prompt, dense steps: the same sums of squares as a prompt of all those tokens, and the same partition."""
    for one in (model, mixture):
        tokens = torch.randint(SIZES["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(7))
        gathered = PruningSettings.paper(
            ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6, prefill="dense", min_evidence=30
        )
        _, state = prefilled(one, tokens[:, :9], gathered)
        for token in tokens[0, 9:]:
            next_logits(one, token[None], state)
        assert (state.schedule.tokens, state.schedule.dense_steps) == (30, 21)
        _, whole = prefilled(one, tokens, PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.6,
                                                          prefill="dense"))
        for own, other in zip(state.layers, whole.layers, strict=True):
            assert torch.equal(heads_partition(own).order, heads_partition(other).order)
            for piece, all_at_once in zip(networks(own.ffn), networks(other.ffn), strict=True):
                assert piece.evidence.tokens == all_at_once.evidence.tokens
                assert_same(piece.evidence.squares, all_at_once.evidence.squares)
                assert regions(piece.partition) == regions(all_at_once.partition)
        token = torch.tensor([3])
        assert_same(next_logits(one, token, state), next_logits(one, token, whole))


def networks(active: Any) -> list[Any]:
    """The networks behind what one layer holds, that have seen anything."""
    return [one for one in getattr(active, "active", [active]) if one is not None and one.evidence.tokens]


@torch.inference_mode()
def test_sequences_that_have_ended_are_no_evidence(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12, 12], SIZES["vocab_size"])
    settings = PruningSettings.paper(ffn_ratio=0.4, min_evidence=1000)
    _, state = prefilled(model, tokens, settings)
    _, other = prefilled(model, tokens, settings)
    for one in (state, other):
        one.end(1)
    next_logits(model, torch.tensor([3, 4]), state)
    next_logits(model, torch.tensor([3, 60]), other)
    assert state.schedule.tokens == 25
    for one, two in zip(state.layers, other.layers, strict=True):
        assert_same(one.ffn.evidence.squares, two.ffn.evidence.squares)


@torch.inference_mode()
def test_every_live_sequence_of_a_dense_step_is_evidence(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12, 12, 12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, PruningSettings.paper(ffn_ratio=0.4, min_evidence=1000))
    next_logits(model, torch.tensor([3, 4, 5]), state)
    assert state.schedule.tokens == state.layers[0].ffn.evidence.tokens == 39


@pytest.mark.parametrize("rule", ["up", "gate"])
@torch.inference_mode()
def test_what_a_rule_watches_is_forgotten_with_the_prompt(rule: str, model: LlamaForCausalLM) -> None:
    settings = PruningSettings.paper(ffn_ratio=0.4, rule=rule)
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    _, used = prefilled(model, left_padded([30], SIZES["vocab_size"], seed=3)[0], settings)
    model.prefill(model.embed(tokens), used)
    _, fresh = prefilled(model, tokens, settings)
    token = torch.tensor([4])
    assert torch.equal(next_logits(model, token, used), next_logits(model, token, fresh))
    assert torch.equal(used.layers[0].ffn.candidate_norms, fresh.layers[0].ffn.candidate_norms)


def test_a_schedule_is_dense_until_there_is_enough_and_then_now_and_again() -> None:
    schedule = RegularRefresh(12, 1, dense_every=4, redraw_every=8)
    assert not schedule.prompt(10)
    steps = [schedule.next_step() for _ in range(16)]
    assert [dense for dense, _ in steps] == [True, True, *[step % 4 == 0 for step in range(3, 17)]]
    assert [step for step, (_, draws) in enumerate(steps, 1) if draws] == [2, 12]
    assert (schedule.redraws, schedule.tokens) == (1, 16)
    schedule = RegularRefresh(0, 1, dense_every=4, redraw_every=4)
    assert schedule.prompt(10)
    assert [step for step in range(1, 14) if schedule.next_step() == (True, True)] == [4, 8, 12]


@torch.inference_mode()
def test_a_prior_is_evidence_of_so_many_tokens(model: LlamaForCausalLM) -> None:
    """Its squares are added as if that many tokens had been seen, and each prompt begins from there again."""
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    settings = PruningSettings.paper(ffn_ratio=0.4)
    ffn = model.model.layers[0].mlp
    squares = torch.rand(SIZES["intermediate_size"])
    plain = resolved(model, settings)
    _, without = prefilled(model, tokens, plain)
    pruning = plain.with_prior(Prior({(ffn, "h"): squares}, 32))
    _, state = prefilled(model, tokens, pruning)
    model.prefill(model.embed(tokens), state)
    evidence, bare = state.layers[0].ffn.evidence, without.layers[0].ffn.evidence
    assert_same(evidence.squares, 32 * squares + bare.squares)
    assert evidence.tokens == 32 + 9


def test_a_prior_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = complete_checkpoint(tmp_path / "tiny")
    settings = PruningSettings.paper(ffn_ratio=0.4, prior=32)
    first = load(folder)
    tokens = first.generate("What is this?", max_new_tokens=8, pruning=settings)[0].token_ids
    (kept,) = (tmp_path / "cache" / "popengine" / "priors").iterdir()
    before = kept.stat().st_mtime_ns
    assert load(folder).generate("What is this?", max_new_tokens=8, pruning=settings)[0].token_ids == tokens
    assert kept.stat().st_mtime_ns == before
    with safe_open(kept, framework="pt") as file:
        about = file.metadata()
    infinite = {key: torch.full_like(one, 3e38) for key, one in load_file(kept).items()}
    for damaged in (b"damaged", save(infinite, about)):
        kept.write_bytes(damaged)
        assert load(folder).generate("What is this?", max_new_tokens=8, pruning=settings)[0].token_ids == tokens
        assert kept.read_bytes() != damaged


@pytest.mark.parametrize("folder", [MIXTRAL_TINY, LLAVA_TINY])
def test_an_edited_prior_is_made_again(folder: Path, tmp_path: Path) -> None:
    model, path = load(folder, device="cpu", dtype="float32").model, folder / "prior.safetensors"
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors, name = load_file(path), about["model"]
    assert len(read(path, name, model) or ()) == len(tensors)
    first = "model.layers.0.self_attn h"
    held, without = tensors[first], {key: one for key, one in tensors.items() if key != first}
    halves = torch.zeros(len(held), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    kinds = (torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64, torch.float64)
    for edited in (
        *(tensors | {first: held.to(kind)} for kind in kinds), without, {first: held}, {}, tensors | {first: halves},
        tensors | {"else h": held.clone()},
        tensors | {first: -1 - held}, tensors | {first: held / 0}, tensors | {first: held * 1e30},
        tensors | {first: held[1:].clone()}, tensors | {first: held[:1].clone()}, tensors | {first: held.sum()},
    ):
        save_file(edited, tmp_path / "prior.safetensors", about)
        assert read(tmp_path / "prior.safetensors", name, model) is None


@pytest.mark.parametrize("rule", ["pop", "up"])
def test_a_retained_share_of_the_dense_network_prunes_nothing(rule: str, model: LlamaForCausalLM) -> None:
    settings = PruningSettings.paper(ffn_ratio=0.0, candidate_width=1.0, retained_share=0.3, rule=rule)
    assert not resolved(model, settings).rule.sizes(model.model.layers[0].mlp).prunes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rule": "best"}, f"rule must be one of {', '.join(RULE_NAMES)}, not 'best'"),
        ({"dense_every": 0}, "dense every must be at least 1, not 0"),
        ({"prior": -1}, "prior must be between 0 and 1000000, not -1"),
        ({"prior": 10**400}, "prior must be between 0 and 1000000"),
        ({"redraw_every": 4}, "redraw every needs dense every"),
        ({"rule": "glass"}, "rule glass needs a prior of 1 or more"),
    ],
)
def test_settings_of_evidence_and_rules_are_checked(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        PruningSettings.paper(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"retained_share": 0.6, "candidate_width": 1}, "retained share 0.6 must stay below the 0.6 of the channels"),
        ({"retained_share": 0.7, "rule": "up"}, "retained share 0.7 must stay below"),
        ({"retained_share": 0.2}, "candidate width 0.1 is less than the 0.4 of the channels that are picked"),
    ],
)
def test_a_retained_share_that_does_not_fit_is_refused(
    settings: dict[str, Any], named: str, model: LlamaForCausalLM
) -> None:
    with pytest.raises(InputError, match=named):
        resolved(model, PruningSettings.paper(ffn_ratio=0.4, **settings))
