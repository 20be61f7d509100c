"""Online pruning of mixtures of experts: a partition per expert, the fallback for unseen ones, bad checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    MIXTRAL,
    QWEN2_MOE,
    SETTINGS,
    SIZES,
    greedy,
    left_padded,
    ours,
    prefilled,
    random_reference,
    regions,
    resolved,
    saved_pair,
)
from safetensors.torch import load_file, save_file
from slow_masked import in_model_order, masked_decode
from slow_mixture import SlowMixturePOP
from tolerance import SMOLLM2, assert_same
from torch import Tensor, nn
from transformers import LlamaConfig

from models.cost_model import all_copy_bytes, bytes_per_token, cache_bytes, copy_bytes
from models.llama import LlamaForCausalLM
from models.matrices.forms import ChosenColumns, ChosenRows
from models.matrices.plain import Matrix
from models.mixtral import MixtralConfig as OurConfig
from models.mixtral import MixtralForCausalLM, read_mixtral_config
from models.passes import prefill_pass
from models.pruning.evidence import channel_scores
from models.pruning.partition import partition_channels, partition_sizes
from models.slots import AttentionPattern
from models.state import DecodeState
from popengine.engine.loading import load
from popengine.engine.memory_plan import state_within
from popengine.engine.run import next_logits
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

FFN = SETTINGS["ffn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("mixtral"), MIXTRAL)[1].double()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp("qwen2_moe"), QWEN2_MOE)[1].double()


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["model", "shared"])
@torch.inference_mode()
def test_masked_and_active_decode_agree_for_every_expert(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    tokens, real = left_padded([44, 39], SIZES["vocab_size"])       # drawn, so that every expert gets some
    _, state = prefilled(model, tokens[:, :12], FFN, real[:, :12])
    masked = model.new_state(2, 64, resolved(model, DENSE))
    in_model_order(state, masked)
    for chosen in tokens[:, 12:].T:
        logits = model.decode(chosen, state)
        assert_same(masked_decode(model, chosen, state, masked), logits)
    assert all(all(picks > 0 for picks in layer.ffn.picks) for layer in state.layers)


@pytest.mark.parametrize("name", ["model", "shared"])
@torch.inference_mode()
def test_with_no_room_for_copies_the_full_weights_give_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """Every expert's step looks up what stays in its full weights: the same logits, over 32 steps."""
    model = request.getfixturevalue(name)
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    copied_logits, copied = prefilled(model, tokens, FFN, real)
    whole = model.new_state(2, 64, copied.pruning)
    for layer in whole.layers:
        layer.ffn.copy_limit = 0
    whole_logits = model.prefill(model.embed(tokens), whole, real)
    for _ in range(32):
        assert_same(whole_logits, copied_logits)
        chosen = copied_logits.argmax(-1)
        copied_logits, whole_logits = model.decode(chosen, copied), model.decode(chosen, whole)
    for layer, other in zip(whole.layers, copied.layers, strict=True):
        for index, (one, with_copy) in enumerate(zip(layer.ffn.active, other.ffn.active, strict=True)):
            assert isinstance(one.gate, ChosenRows) and isinstance(one.down, ChosenColumns)
            assert one.copied_bytes() == 0 < with_copy.copied_bytes()
            assert layer.ffn.multiplies_whole(index) and not other.ffn.multiplies_whole(index)


@pytest.mark.parametrize("prefill", ["pruned", "dense"])
@torch.inference_mode()
def test_one_expert_is_the_dense_llama_layer(prefill: Any, tmp_path: Path) -> None:
    """With a single expert the router has nothing to say, and POP must be Llama's to the last bit."""
    llama = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    alike = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_local_experts": 1, "num_experts_per_tok": 1}
    one = MixtralForCausalLM(read_mixtral_config(SIZES | alike))
    weights = {name.replace("mlp.", "mlp.experts.0."): value for name, value in llama.state_dict().items()}
    weights |= {f"model.layers.{i}.mlp.gate.weight": torch.randn(1, SIZES["hidden_size"]) for i in range(3)}
    one.load_state_dict(weights)
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    settings = PruningSettings.paper(prune_ratio=0.3, candidate_width=0.3, prefill=prefill)
    logits, state = prefilled(llama, tokens, settings, real)
    mixture_logits, mixture_state = prefilled(one, tokens, settings, real)
    for _ in range(16):
        assert torch.equal(mixture_logits, logits)
        chosen = logits.argmax(-1)
        logits, mixture_logits = llama.decode(chosen, state), one.decode(chosen, mixture_state)


@torch.inference_mode()
def test_an_experts_partition_comes_from_the_tokens_routed_to_it(model: LlamaForCausalLM) -> None:
    """Checked on the first layer against a loop over tokens; padding is neither scored nor counted."""
    tokens, real = left_padded([20, 9], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, FFN, real)
    layer, active = model.model.layers[0], state.layers[0].ffn
    x = model.embed(tokens)
    step = prefill_pass(model.model.rotary, map(AttentionPattern, model.config.windows), x, real)
    x = layer.post_attention_layernorm(x + layer.self_attn(layer.input_layernorm(x), step))
    seen: list[list[Tensor]] = [[] for _ in layer.mlp.experts]
    for sequence, slot in real.nonzero().tolist():
        token = x[sequence, slot]
        for expert in layer.mlp.gate(token).topk(2).indices.tolist():
            seen[expert].append(layer.mlp.experts[expert].activation(token))
    assert active.prompt_tokens == [len(hs) for hs in seen]
    assert sum(active.prompt_tokens) == 2 * 29
    for index, hs in enumerate(seen):
        scores = channel_scores(torch.stack(hs)[None], layer.mlp.experts[index].down_norms())
        expected = partition_channels(scores, partition_sizes(SIZES["intermediate_size"], 0.4, 0.3))
        assert torch.equal(active.active[index].partition.order, expected.order)


def one_token_state(model: LlamaForCausalLM, **changes: Any) -> tuple[Tensor, DecodeState]:
    """After a prompt of one token: two experts of five have seen something."""
    return prefilled(model, torch.tensor([[7]]), PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, **changes))


@torch.inference_mode()
def test_an_unseen_expert_is_cut_by_its_weights_when_it_is_first_needed(model: LlamaForCausalLM) -> None:
    _, state = one_token_state(model)
    active = state.layers[0].ffn
    unseen = [index for index, count in enumerate(active.prompt_tokens) if count == 0]
    assert len(unseen) == 3
    assert all(active.active[index] is None for index in unseen)
    for token in range(40):
        model.decode(torch.tensor([token]), state)
    for index in unseen:
        own = active.active[index]
        assert active.picks[index] > 0 and own is not None and own.copied_bytes() > 0
        expert = model.model.layers[0].mlp.experts[index]
        down, gate, up = expert.down_proj.weight, expert.gate_proj.weight, expert.up_proj.weight
        scores = down.norm(dim=0) * gate.norm(dim=1) * up.norm(dim=1)
        assert torch.equal(own.partition.order, partition_channels(scores, own.sizes).order)


@torch.inference_mode()
def test_unseen_experts_can_be_left_dense(model: LlamaForCausalLM) -> None:
    cut_logits, cut = one_token_state(model)
    left_logits, left = one_token_state(model, unseen_experts="dense")
    assert_same(cut_logits, left_logits)                     # the prompt itself saw no unseen expert
    active, mixture = left.layers[0].ffn, model.model.layers[0].mlp
    unseen = active.prompt_tokens.index(0)
    x = torch.randn(1, 1, SIZES["hidden_size"], dtype=model.dtype)
    expert = mixture.experts[unseen]
    _, step = model.begin(torch.tensor([0]), left)
    assert torch.equal(active.partitioned(unseen).decode(x, step), expert(x))
    assert active.multiplies_whole(unseen)
    other = cut.layers[0].ffn.partitioned(unseen).decode(x, step)
    assert (other - expert(x)).abs().max() > 1e-4


@pytest.mark.parametrize("rule", ["pop", "up"])
@torch.inference_mode()
def test_evidence_of_an_expert_that_was_left_dense_counts_once_later_rows_reach_it(
    rule: str, model: LlamaForCausalLM
) -> None:
    settings = replace(FFN, rule=rule, unseen_experts="dense", min_tokens=4, prefill="dense")
    tokens, _ = left_padded([24], SIZES["vocab_size"])
    wanted, whole = prefilled(model, tokens, settings)
    _, pieces = prefilled(model, tokens[:, :8], settings)
    left_dense = [active.sizes.prunes for layer in pieces.layers for active in layer.ffn.active if active is not None]
    assert False in left_dense
    torch.testing.assert_close(model.prefill(model.embed(tokens[:, 8:]), pieces, kept=8), wanted, atol=1e-5, rtol=1e-5)
    for one, other in zip(pieces.layers, whole.layers, strict=True):
        for active, at_once in zip(one.ffn.active, other.ffn.active, strict=True):
            if at_once is not None and at_once.sizes.prunes:
                assert active.evidence.tokens == at_once.evidence.tokens
                torch.testing.assert_close(active.evidence.squares, at_once.evidence.squares, atol=1e-5, rtol=1e-5)
                assert regions(active.partition) == regions(at_once.partition)


@torch.inference_mode()
def test_min_tokens_makes_little_evidence_count_as_none(model: LlamaForCausalLM) -> None:
    """With more asked for than any expert saw, every expert is cut as if it had seen nothing."""
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, min_tokens=100))
    for layer, own in zip(state.layers, model.model.layers, strict=True):
        assert sum(layer.ffn.prompt_tokens) == 24
        for index, expert in enumerate(own.mlp.experts):
            active = layer.ffn.partitioned(index)
            expected = partition_channels(expert.weight_scores(), active.sizes)
            assert torch.equal(active.partition.order, expected.order)


@torch.inference_mode()
def test_every_prompt_starts_anew_in_the_same_buffers(model: LlamaForCausalLM) -> None:
    first, _ = left_padded([12], SIZES["vocab_size"], seed=3)
    second, _ = left_padded([12], SIZES["vocab_size"], seed=4)
    _, state = prefilled(model, first, FFN)
    model.decode(torch.tensor([1]), state)
    held = state.partition_bytes()
    reused = model.prefill(model.embed(second), state)
    fresh, other = prefilled(model, second, FFN)
    for _ in range(8):
        assert torch.equal(reused, fresh)
        chosen = fresh.argmax(-1)
        reused, fresh = model.decode(chosen, state), model.decode(chosen, other)
    assert state.layers[0].ffn.picks == other.layers[0].ffn.picks
    assert state.partition_bytes() <= max(held, other.partition_bytes())


@torch.inference_mode()
def test_a_dense_step_is_no_prompt_of_an_expert(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, replace(FFN, dense_every=1))
    shown = [layer.ffn.prompt_tokens for layer in state.layers]
    next_logits(model, torch.tensor([4]), state)
    for layer, tokens_of_prompt in zip(state.layers, shown, strict=True):
        assert layer.ffn.prompt_tokens == tokens_of_prompt
        assert sum(layer.ffn.picks) == 2


@torch.inference_mode()
def test_an_expert_is_partitioned_by_what_it_saw_before_there_was_enough(model: LlamaForCausalLM) -> None:
    """Also where the rows that make it enough do not reach the expert."""
    tokens, _ = left_padded([13], SIZES["vocab_size"])
    _, state = prefilled(model, tokens[:, :12], replace(FFN, min_evidence=13))
    before = [list(layer.ffn.prompt_tokens) for layer in state.layers]
    model.prefill(model.embed(tokens[:, 12:]), state, kept=12)
    unreached = 0
    for layer, seen in zip(state.layers, before, strict=True):
        for active, then, now in zip(layer.ffn.active, seen, layer.ffn.prompt_tokens, strict=True):
            if active is not None and then == now:
                unreached += 1
                scores = active.evidence.scores(active.ffn.down_norms())
                assert regions(active.partition) == regions(partition_channels(scores, active.sizes))
    assert unreached > 0


@torch.inference_mode()
def test_picks_are_counted_and_no_other_expert_is_read(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, FFN)
    chosen: list[int] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.extend(out[0].topk(2).indices.tolist()))
        for layer in model.model.layers[:1]
    ]
    for token in range(10):
        model.decode(torch.tensor([token]), state)
    for handle in handles:
        handle.remove()
    assert state.layers[0].ffn.picks == [chosen.count(expert) for expert in range(5)]
    # Poison what no step may read: the full weights of all experts, and the copies of those not chosen next.
    active, mixture = state.layers[0].ffn, model.model.layers[0].mlp
    x = torch.randn(1, 1, SIZES["hidden_size"], dtype=model.dtype)
    routed = set(mixture.route(x[0]).experts[0].tolist())
    for index, copy in enumerate(active.active):
        if index not in routed and copy is not None:
            copy.gate.weight.fill_(torch.nan)
    _, step = model.begin(torch.tensor([0]), state)
    assert active.decode(x, step).isfinite().all()


@torch.inference_mode()
def test_a_sequence_that_has_ended_does_not_count_in_an_experts_pick(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12, 12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, FFN)
    active = state.layers[0].ffn
    _, step = model.begin(tokens[:, 0], state)
    x = torch.randn(32, 2, 1, SIZES["hidden_size"], dtype=model.dtype)
    alone = [active.decode(pair[:1], replace(step, live=torch.tensor([[True]]))) for pair in x]
    ended = [active.decode(pair, replace(step, live=torch.tensor([[True], [False]])))[:1] for pair in x]
    both = [active.decode(pair, step)[:1] for pair in x]
    assert_same(torch.stack(ended), torch.stack(alone))
    assert (torch.stack(both) - torch.stack(alone)).abs().max() > 1e-3


def test_weight_bytes_count_the_routed_experts_only(model: LlamaForCausalLM, shared: LlamaForCausalLM) -> None:
    attention, head = 48 * 48 * 2 + 48 * 24 * 2, 96 * 48
    dense, pruned = (resolved(model, settings) for settings in (DENSE, FFN))
    active = 80 - round(0.4 * 80) + 12
    assert bytes_per_token(model, dense) == 8 * (head + 3 * (attention + 2 * 3 * 80 * 48))
    assert bytes_per_token(model, pruned) == 8 * (head + 3 * (attention + 2 * 3 * active * 48))
    assert bytes_per_token(shared, dense) == 8 * (head + 3 * (attention + (2 * 40 + 56) * 3 * 48))


# Public configs of the paper's mixtures, and its effective FFN ratios in percent at 20 % and 40 % (POP, Table 8).
QWEN_15_MOE = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
    "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632,
}  # fmt: skip
QWEN_3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip


@pytest.mark.parametrize(("raw", "at_20", "at_40"), [(QWEN_15_MOE, 29.7, 59.4), (QWEN_3_30B, 30.0, 60.0)])
def test_the_prune_ratio_counts_routed_experts_as_the_paper_does(
    raw: dict[str, Any], at_20: float, at_40: float
) -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(read_mixtral_config(raw | {"num_hidden_layers": 2}))
    for ratio, wanted in ((0.2, at_20), (0.4, at_40)):
        pruning = resolved(model, PruningSettings.paper(ratio))
        assert 100 * pruning.ffn_ratio == pytest.approx(wanted, abs=0.0501)


@torch.inference_mode()
def test_copies_take_the_memory_that_was_stated_before_they_were_made(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([60], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, FFN)
    stated = sum(
        sum(copy is not None for copy in layer.ffn.active) * copy_bytes(own.mlp.experts[0], state.pruning)
        for layer, own in zip(state.layers, model.model.layers, strict=True)
    )
    assert 0 < stated <= state.partition_bytes() <= 1.01 * stated          # candidate norms are the difference
    mixture, (one, *_) = model.model.layers[0].mlp, filter(None, state.layers[0].ffn.active)
    assert copy_bytes(mixture, state.pruning) == 5 * 8 * 3 * 48 * one.sizes.active
    assert copy_bytes(mixture, resolved(model, DENSE)) == 0


@torch.inference_mode()
def test_scarce_memory_limits_the_copies_and_changes_no_token(
    model: LlamaForCausalLM, shared: LlamaForCausalLM
) -> None:
    for mixture in (model, shared):
        tokens, _ = left_padded([30], SIZES["vocab_size"])
        logits, state = prefilled(mixture, tokens, FFN)
        experts_per_layer = sum(copy_bytes(layer.mlp.experts[0], state.pruning) for layer in mixture.model.layers)
        enough_for_two = all_copy_bytes(mixture, state.pruning) - 3 * experts_per_layer
        free = enough_for_two + cache_bytes(mixture, 1, 64)
        scarce = state_within(free, mixture, 1, 64, state.pruning)
        assert {layer.ffn.copy_limit for layer in scarce.layers} == {2}
        assert {layer.ffn.copy_limit for layer in state_within(free - 1, mixture, 1, 64, state.pruning).layers} == {1}
        assert_same(mixture.prefill(mixture.embed(tokens), scarce), logits)
        for _ in range(16):
            chosen = logits.argmax(-1)
            logits = mixture.decode(chosen, state)
            assert_same(mixture.decode(chosen, scarce), logits)
        for layer in scarce.layers:
            most_seen = sorted(range(5), key=lambda expert: -layer.ffn.prompt_tokens[expert])[:2]
            copied = [one is not None and isinstance(one.gate, Matrix) for one in layer.ffn.active]
            assert [expert for expert in range(5) if copied[expert]] == sorted(most_seen)
        assert scarce.partition_bytes() <= 1.01 * enough_for_two


@torch.inference_mode()
def test_scarce_memory_stays_right_from_prompt_to_prompt(model: LlamaForCausalLM) -> None:
    """What was looked up in one expert's full weights must not come back as the buffers of another."""
    pruning = resolved(model, FFN)
    scarce = model.new_state(1, 64, pruning)
    for layer in scarce.layers:
        layer.ffn.copy_limit = 2
    for seed in range(4):
        tokens, _ = left_padded([30], SIZES["vocab_size"], seed=seed)
        wanted, state = prefilled(model, tokens[:, :14], pruning)
        assert_same(model.prefill(model.embed(tokens[:, :14]), scarce), wanted)
        for token in tokens[:, 14:].T:
            wanted = model.decode(token, state)
            assert_same(model.decode(token, scarce), wanted)
        for layer in scarce.layers:
            assert sum(one is not None and one.copied_bytes() > 0 for one in layer.ffn.active) <= 2


@torch.inference_mode()
def test_weight_bytes_count_experts_without_a_copy_whole(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([60], SIZES["vocab_size"])
    _, copied = prefilled(model, tokens, FFN)
    whole = model.new_state(1, 64, copied.pruning)
    for layer in whole.layers:
        layer.ffn.copy_limit = 0
    model.prefill(model.embed(tokens), whole)
    for layer, own in zip(whole.layers, model.model.layers, strict=True):
        for index in range(len(own.mlp.experts)):
            layer.ffn.partitioned(index)         # those that the prompt did not reach, too
    assert bytes_per_token(model, copied.pruning, 1, whole) == bytes_per_token(model, resolved(model, DENSE))
    assert bytes_per_token(model, copied.pruning, 1, copied) == bytes_per_token(model, copied.pruning)


def test_a_dense_network_whose_copies_do_not_fit_is_refused(tmp_path: Path) -> None:
    llama = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    pruning = resolved(llama, FFN)
    with pytest.raises(InputError, match=r"copies of weights another .* MB beside the model, and 0.0 MB is free"):
        state_within(1000, llama, 1, 64, pruning)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated(
    model: LlamaForCausalLM, tmp_path: Path, ratio: float
) -> None:
    for one in (model, saved_pair(tmp_path, LlamaConfig(**SIZES))[1]):
        pruning = resolved(one, PruningSettings.paper(ffn_ratio=ratio))
        with pytest.raises(InputError, match=r"the cache of 4 x 1000000000 tokens takes .* GB"):
            state_within(10**10, one, 4, 10**9, pruning)


@pytest.mark.parametrize("prune_ratio", [0.2, 0.4])
@pytest.mark.parametrize("prefill", ["pruned", "dense"])
def test_an_independent_slow_implementation_generates_the_same_tokens(
    prune_ratio: float, prefill: Any, tmp_path: Path
) -> None:
    reference, model = saved_pair(tmp_path, MIXTRAL)
    prompt = left_padded([24], SIZES["vocab_size"], seed=2)[0][0].tolist()
    slow = SlowMixturePOP(reference, prune_ratio, 0.3, prefill)
    settings = PruningSettings.paper(prune_ratio=prune_ratio, candidate_width=0.3, prefill=prefill)
    assert greedy(model, prompt, 48, settings) == slow.generate(prompt, 48)


@pytest.fixture(scope="module")
def smollm2_as_mixtral(default_checkpoint_path: Path) -> tuple[LlamaForCausalLM, MixtralForCausalLM, list[int]]:
    """SmolLM2, and a mixture of four experts that are all its own feed-forward network (shared, not copied)."""
    engine = load(default_checkpoint_path, dtype="float32")
    llama = engine.model
    with torch.device("meta"):
        mixture = MixtralForCausalLM(
            OurConfig(
                **vars(llama.config),
                num_experts=4,
                moe_intermediate_size=llama.config.intermediate_size,
                sparse_layers=(True,) * llama.config.num_hidden_layers,
            )
        )
    torch.manual_seed(0)
    for layer, own in zip(mixture.model.layers, llama.model.layers, strict=True):
        layer.input_layernorm, layer.self_attn = own.input_layernorm, own.self_attn
        layer.post_attention_layernorm = own.post_attention_layernorm
        layer.mlp.experts = nn.ModuleList([own.mlp] * 4)
        layer.mlp.gate.weight = nn.Parameter(torch.randn(4, llama.config.hidden_size))
    mixture.model.embed_tokens, mixture.model.norm = llama.model.embed_tokens, llama.model.norm
    mixture.model.rotary, mixture.lm_head = llama.model.rotary, llama.lm_head
    question = "Explain in three sentences why the sky looks blue at noon and red at sunset."
    return llama, mixture, engine.prompts.ids(question)


@torch.inference_mode()
def test_smollm2_with_its_network_for_every_expert_is_smollm2(
    smollm2_as_mixtral: tuple[LlamaForCausalLM, MixtralForCausalLM, list[int]],
) -> None:
    llama, mixture, prompt = smollm2_as_mixtral
    tokens = torch.tensor([prompt])
    assert_same(mixture(tokens), llama(tokens), SMOLLM2)
    assert greedy(mixture, prompt, 8, DENSE) == greedy(llama, prompt, 8, DENSE)


@torch.inference_mode()
def test_smollm2_as_a_mixture_generates_under_pruning(
    smollm2_as_mixtral: tuple[LlamaForCausalLM, MixtralForCausalLM, list[int]],
) -> None:
    """With a copy of one expert in every third layer: copies of all take more memory than the model."""
    _, mixture, prompt = smollm2_as_mixtral
    state = mixture.new_state(1, 64, resolved(mixture, PruningSettings.paper(prune_ratio=0.2)))
    for index, layer in enumerate(state.layers):
        layer.ffn.copy_limit = int(index % 3 == 0)
    logits = mixture.prefill(mixture.embed(torch.tensor([prompt])), state)
    active = state.layers[0].ffn
    assert sum(active.prompt_tokens) == 2 * len(prompt)
    orders = {tuple(one.partition.retained.tolist()) for one in active.active if one is not None}
    assert len(orders) > 1                                                  # equal experts, but not equal tokens
    new = [int(logits.argmax())]
    for _ in range(7):
        new.append(int(mixture.decode(torch.tensor(new[-1:]), state).argmax()))
    assert len(set(new)) > 4                                                # words, not one token over and over
    assert sum(active.picks) == 2 * 7


def damaged(folder: Path, change: Any) -> Path:
    """A saved mixture whose tensors were changed."""
    random_reference(MIXTRAL).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_tensor_is_named_with_its_layer_and_expert(tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(InputError, match=f"1 missing: {name}"):
        ours(damaged(tmp_path, lambda tensors: tensors.pop(name)))


def test_a_router_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.block_sparse_moe.gate.weight"
    with pytest.raises(InputError, match=rf"of another shape: {name} \[4, 48\].*\[5, 48\]"):
        ours(damaged(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 48)})))


def test_one_tensor_for_too_many_experts_is_named(tmp_path: Path) -> None:
    random_reference(MIXTRAL).save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = torch.zeros(6, 48, 80)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        ours(tmp_path)


def test_more_experts_per_token_than_experts_is_refused() -> None:
    with pytest.raises(InputError, match=r"num_experts_per_tok \(9\) must not exceed the number of experts \(8\)"):
        read_mixtral_config(SIZES | {"num_experts_per_tok": 9})


@pytest.mark.parametrize("changes", [{"unseen_experts": "random"}, {"min_tokens": 0}])
def test_settings_for_unseen_experts_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"unseen experts must be|min tokens must be"):
        PruningSettings.paper(**changes)
