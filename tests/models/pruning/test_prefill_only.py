"""Prefill-Only pruning: what of a prompt that skips layers must be equal to what, whatever the weights are."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    LLAVA_TINY,
    MIXTRAL,
    MODELS,
    QWEN2_MOE,
    SETTINGS,
    SIZES,
    generated,
    greedy,
    left_padded,
    one_line_error,
    prefilled,
    resolved,
    saved_pair,
)
from PIL import Image
from slow_prefill import SlowPrefillOnly, two_passes, without_keys
from tolerance import assert_same
from torch import Tensor
from transformers import LlamaConfig

from models.llama import LlamaForCausalLM
from models.pruning.evidence import Evidence, channel_scores, head_scores
from models.pruning.experts import PartitionedExperts
from models.pruning.heads import PartitionedAttention
from models.pruning.partition import partition_channels
from models.pruning.resolve import LayerWeights, resolve
from models.pruning.settings import exact_share
from models.state import DecodeState
from popengine import generate, score
from popengine.engine.loading import load
from popengine.engine.results import measured, report
from popengine.engine.run import next_logits
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.known_text import evaluate
from popengine.studies.settings import DENSE, PruningSettings
from popengine.studies.skip_controls import ForgottenPrompt
from weights.errors import InputError

FAMILIES: dict[str, Any] = MODELS | {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE}
LAYERS = SIZES["num_hidden_layers"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return saved_pair(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])[1].double()


def skipping(share: float | str, boundary: int = 1, settings: PruningSettings = DENSE) -> PruningSettings:
    return replace(settings, prefill_skip=share, boundary_tokens=boundary)


def caches(state: DecodeState, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, heads in the model's order. [B, K, S, D] each"""
    own = state.layers[layer]
    order = getattr(own.attention, "cache_order", None)
    back = slice(None) if order is None else order.argsort()
    return own.cache.keys[:, back], own.cache.values[:, back]


@pytest.mark.parametrize("name", [None, *SETTINGS])
@torch.inference_mode()
def test_a_prompt_of_no_more_than_the_boundary_tokens_runs_in_full(model: LlamaForCausalLM, name: str | None) -> None:
    settings = DENSE if name is None else SETTINGS[name]
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    wanted, reference = prefilled(model, tokens, settings, real)
    for boundary in (12, 40):
        logits, state = prefilled(model, tokens, skipping("2/3", boundary, settings), real)
        assert torch.equal(logits, wanted)
        token = torch.tensor([5, 6])
        assert torch.equal(next_logits(model, token, state), next_logits(model, token, reference))
        wanted, reference = prefilled(model, tokens, settings, real)


@torch.inference_mode()
def test_the_first_token_of_one_more_than_the_boundary_skips(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([6], SIZES["vocab_size"])
    (_, state), (_, dense) = (prefilled(model, tokens, settings) for settings in (skipping("2/3", 5), DENSE))
    skipped, whole = caches(state, LAYERS - 1)[0], caches(dense, LAYERS - 1)[0]
    assert (skipped[:, :, 0] - whole[:, :, 0]).abs().max() > 1e-3


@torch.inference_mode()
def test_skipping_nothing_is_the_dense_model(model: LlamaForCausalLM) -> None:
    tokens, real = left_padded([12, 7], SIZES["vocab_size"])
    wanted, _ = prefilled(model, tokens, DENSE, real)
    for share in (0, 0.0, "0", "0/3"):
        assert torch.equal(prefilled(model, tokens, skipping(share), real)[0], wanted)


@pytest.mark.parametrize(("share", "boundary"), [("1/3", 1), ("1/3", 5), ("2/3", 1), (0.67, 3)])
@torch.inference_mode()
def test_one_pass_equals_two(model: LlamaForCausalLM, share: float | str, boundary: int) -> None:
    tokens, real = left_padded([12, 8], SIZES["vocab_size"])
    pruning = resolved(model, skipping(share, boundary))
    assert len(pruning.skipped) in (1, 2) and pruning.skipped[-1] == LAYERS - 1
    logits, state = prefilled(model, tokens, pruning, real)
    wanted, slow = two_passes(model, model.embed(tokens), resolved(model, DENSE), pruning.skipped, boundary, real)
    assert_same(logits, wanted)
    dense, _ = prefilled(model, tokens, DENSE, real)
    # The first skipped layer gets what the dense model's gets: skipping it alone changes nothing.
    assert ((logits - dense).abs().max() > 1e-3) == (len(pruning.skipped) > 1)
    for index in range(LAYERS):
        for one, other in zip(caches(state, index), caches(slow, index), strict=True):
            where = real[:, None, :, None]
            assert_same(one[:, :, :12] * where, other[:, :, :12] * where)
    for _ in range(4):
        chosen = logits.argmax(-1)
        logits, wanted = next_logits(model, chosen, state), next_logits(model, chosen, slow)
        assert_same(logits, wanted)


@pytest.mark.parametrize("boundary", [1, 5])
@torch.inference_mode()
def test_without_keys_skipped_layers_know_of_no_prompt(model: LlamaForCausalLM, boundary: int) -> None:
    """The paper's control, in a prompt, in steps and in a text at once; a prompt that skips nothing is as it was."""
    tokens = torch.randint(SIZES["vocab_size"], (1, 20))
    pruning = pruning_for("skip-no-keys", Request(model, skipping("2/3", boundary)))
    wanted = without_keys(model, tokens, LAYERS - 2, 12 - boundary)[0, boundary - 1 :]              # [9, V]
    logits, state = prefilled(model, tokens[:, :12], pruning)
    steps = [logits, *(next_logits(model, token, state) for token in tokens[0, 12:].split(1))]
    assert_same(torch.cat(steps), wanted)
    _, state = prefilled(model, tokens[:, :12], pruning)
    assert_same(evaluate(model, tokens[0, 12:], state), wanted[1:])
    seeing, _ = prefilled(model, tokens[:, :12], replace(pruning, forgets=False))
    assert (seeing - logits).abs().max() > 1e-3
    model.prefill(model.embed(tokens[:, :boundary]), state)
    _, dense = prefilled(model, tokens[:, :boundary], DENSE)
    assert torch.equal(next_logits(model, tokens[0, -1:], state), next_logits(model, tokens[0, -1:], dense))


def test_slots_that_are_forgotten_stay_so_until_they_are_filled_again() -> None:
    slot_map = ForgottenPrompt(1, 6, 0, torch.device("cpu"))
    slot_map.tokens[:3] = -1
    slot_map.grow(2)
    assert slot_map.tokens.tolist() == [-1, -1, -1, 3, 4, 5, 6, 7]
    slot_map.go_back(5, 2)
    assert slot_map.tokens.tolist() == [-1, -1, 2, 3, 4, 5, 6, 7]
    slot_map.start()
    assert slot_map.tokens.tolist() == list(range(8))


@torch.inference_mode()
def test_one_pass_equals_two_under_a_static_mask(model: LlamaForCausalLM) -> None:
    tokens, real = left_padded([12, 8], SIZES["vocab_size"])
    settings = PruningSettings.paper(ffn_ratio=0.4)
    whole = pruning_for("magnitude", Request(model, settings))
    pruning = pruning_for("magnitude", Request(model, skipping("2/3", 3, settings)))
    logits, state = prefilled(model, tokens, pruning, real)
    wanted, slow = two_passes(model, model.embed(tokens), whole, pruning.skipped, 3, real)
    assert_same(logits, wanted)
    chosen = torch.tensor([3, 4])
    assert_same(model.decode(chosen, state), model.decode(chosen, slow))


@torch.inference_mode()
def test_caches_up_to_the_first_skipped_layer_are_the_dense_models(model: LlamaForCausalLM) -> None:
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, skipping("2/3", 3))
    _, dense = prefilled(model, tokens, DENSE)
    for one, other in zip(caches(state, 0), caches(dense, 0), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(caches(state, 1), caches(dense, 1), strict=True):
        assert_same(one, other)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(caches(state, 2), caches(dense, 2), strict=True))


@pytest.mark.parametrize("boundary", [1, 5, 9])
@torch.inference_mode()
def test_each_prompt_of_a_batch_is_as_if_it_were_alone(model: LlamaForCausalLM, boundary: int) -> None:
    """A prompt of no more tokens than the boundary too, whose other boundary slots are padding."""
    lengths = [12, 7, 1]
    tokens, real = left_padded(lengths, SIZES["vocab_size"])
    settings = skipping("2/3", boundary)
    logits, state = prefilled(model, tokens, settings, real)
    following = next_logits(model, torch.tensor([3, 4, 5]), state)
    for index, length in enumerate(lengths):
        alone, own = prefilled(model, tokens[index : index + 1, -length:], settings)
        assert_same(logits[index : index + 1], alone)
        step = next_logits(model, torch.tensor([3 + index]), own)
        assert_same(following[index : index + 1], step)


@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_only_rows_that_run_are_evidence(
    model: LlamaForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And padding in the boundary is none. The partitions are those of scores over what the evidence was given."""
    tokens, real = left_padded([12, 2], SIZES["vocab_size"])
    state = model.new_state(2, 64, resolved(model, skipping("1/3", 4, SETTINGS[name])))
    seen: dict[Evidence, Tensor] = {}
    add = Evidence.add
    monkeypatch.setattr(Evidence, "add", lambda own, h, *rest: (seen.update({own: h}), add(own, h, *rest))[1])
    model.prefill(model.embed(tokens), state, real)
    for index, layer in enumerate(model.model.layers):
        counted = real if index < LAYERS - 1 else real[:, -4:]
        heads, ffn, active = state.layers[index].attention, layer.mlp, state.layers[index].ffn
        if isinstance(heads, PartitionedAttention):
            assert heads.evidence.tokens == int(counted.sum())
            a = seen[heads.evidence]
            assert a.shape[:2] == counted.shape
            scores = head_scores(channel_scores(a, layer.self_attn.output_norms(), counted), layer.self_attn.head_dim)
            wanted = partition_channels(scores.view(layer.self_attn.head_groups, -1), heads.sizes)
            assert torch.equal(heads.partition.order, wanted.order)
        if isinstance(active, PartitionedExperts):
            assert sum(active.prompt_tokens) == int(counted.sum()) * layer.mlp.experts_per_token
            assert sum(active.picks) == 0
        elif active.sizes.prunes:
            assert active.evidence.tokens == int(counted.sum())
            scores = channel_scores(seen[active.evidence], ffn.down_norms(), counted)
            assert torch.equal(active.partition.order, partition_channels(scores, active.sizes).order)


@torch.inference_mode()
def test_steps_run_dense_until_skipped_layers_have_seen_enough(model: LlamaForCausalLM) -> None:
    settings = skipping("1/3", 4, replace(SETTINGS["ffn"], min_evidence=7))
    tokens, _ = left_padded([12], SIZES["vocab_size"])
    _, state = prefilled(model, tokens, settings)
    for _ in range(5):
        next_logits(model, torch.tensor([4]), state)
    assert state.schedule.dense_steps == 3


@pytest.mark.parametrize("name", [None, "both", "ffn_dense_prefill"])
@torch.inference_mode()
def test_buffers_serve_the_next_prompt_as_if_they_were_new(model: LlamaForCausalLM, name: str | None) -> None:
    settings = skipping("2/3", 3, DENSE if name is None else SETTINGS[name])
    first, _ = left_padded([30], SIZES["vocab_size"], seed=3)
    tokens, _ = left_padded([9], SIZES["vocab_size"])
    _, state = prefilled(model, first, settings)
    next_logits(model, torch.tensor([1]), state)
    wanted, fresh = prefilled(model, tokens, settings)
    assert torch.equal(model.prefill(model.embed(tokens), state), wanted)
    assert torch.equal(next_logits(model, torch.tensor([4]), state), next_logits(model, torch.tensor([4]), fresh))


@torch.inference_mode()
def test_rows_that_skip_a_layer_go_where_a_prompt_before_has_put_its_heads(model: LlamaForCausalLM) -> None:
    """Where all channels finish the prompt, so that hidden states up to the first skipped layer are the dense ones."""
    tokens, _ = left_padded([24], SIZES["vocab_size"])
    states = []
    for settings in (DENSE, replace(SETTINGS["both"], prefill="dense")):
        _, state = prefilled(model, tokens[:, :14], skipping("2/3", 3, settings))
        model.prefill(model.embed(tokens[:, 14:]), state, kept=14)
        states.append(state)
    dense, pruned = states
    for layer in (0, 1):
        for one, other in zip(caches(pruned, layer), caches(dense, layer), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_image_tokens_are_prompt_tokens() -> None:
    engine = load(LLAVA_TINY, device="cpu", dtype="float32")
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    share = f"{engine.model.config.num_hidden_layers - 1}/{engine.model.config.num_hidden_layers}"
    pruning = engine.resolve(skipping(share))
    ids = engine.prompts.ids("What colour is it?", images=[picture])
    tokens = torch.tensor([ids])
    x = engine.pictures.embed(tokens, None, engine.pictures.given([picture])).x
    state = engine.model.new_state(1, 256, pruning)
    logits = engine.model.prefill(x, state)
    wanted, _ = two_passes(engine.model, x, engine.resolve(DENSE), pruning.skipped, 1, capacity=256)
    assert_same(logits, wanted)
    made = engine.generate("What colour is it?", images=[picture], pruning=skipping(share), max_new_tokens=4)[0]
    assert made.token_ids[0] == int(logits.argmax())
    assert made.statistics.image_tokens > 10


@pytest.mark.parametrize("family", ["grouped_query", "multi_head", "query_key_norm"])
@pytest.mark.parametrize(("share", "boundary"), [("1/3", 1), ("2/3", 4)])
def test_a_slow_implementation_gives_the_same_tokens(tmp_path: Path, family: str, share: str, boundary: int) -> None:
    reference, model = saved_pair(tmp_path, MODELS[family])
    prompt = left_padded([14], SIZES["vocab_size"])[0][0].tolist()
    tokens = greedy(model, prompt, 30, skipping(share, boundary))
    assert tokens == SlowPrefillOnly(reference, int(share[0]), boundary).generate(prompt, 30)
    assert len(set(tokens)) > 3


@pytest.mark.slow
def test_compiled_steps_go_on_from_a_prompt_that_skipped_layers(checkpoint: Path, short_calls: None) -> None:
    prompts = [list(range(30)), list(range(40, 50))]
    settings = skipping("1/3", 4, PruningSettings.paper(prune_ratio=0.4))
    plain, fast = load(checkpoint, device="cpu"), load(checkpoint, device="cpu", compile=True)
    for one in (skipping("2/3"), settings):
        assert generated(fast, prompts, 12, one) == generated(plain, prompts, 12, one)


def test_statistics_say_what_was_skipped(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load(checkpoint, device="cpu")
    for length, skipped in ((9, 2), (4, 0)):
        run = engine.run([list(range(length))], 3, skipping("2/3", 4), ignore_eos=True)
        list(run)
        found = report(measured(run))["pruning"]
        assert (found["prefill_skip"], found["skipped_layers"], found["boundary_tokens"]) == ("2/3", skipped, 4)
    with pytest.raises(SystemExit):
        generate.main(["--ckpt", str(checkpoint), "--prompt", "Hello there", "-n", "2", "--prefill-skip", "0.7"])
    assert "skipped   2 of 3 layers, by all prompt tokens but the last 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prefill-skip", "1"], "prefill skip must be at least 0 and below 1, not 1"),
        (["--prefill-skip", "-1/3"], "prefill skip must be at least 0 and below 1, not -1/3"),
        (["--prefill-skip", "3/3"], "below 1, not 1"),
        (["--prefill-skip", "a third"], "prefill skip must be a number or a fraction like 1/3, not a third"),
        (["--prefill-skip", "1/0"], "a number or a fraction like 1/3, not 1/0"),
        (["--prefill-skip", "nan"], "a number or a fraction like 1/3, not nan"),
        (["--prefill-skip", "0.3"], "skip 0.3 skips none of 3 layers: the smallest share that skips one is 1/3"),
        (["--boundary-tokens", "0"], "boundary tokens must be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    first, *rest = words
    words = [f"{first}={rest[0]}"]          # a value that begins with a dash is one word with its flag
    for main, more in ((generate.main, ["--prompt", "x"]), (score.main, ["--text", text, "--windows", 1])):
        assert said in partial(one_line_error, main)(capsys, "--ckpt", checkpoint, *more, *words)


@torch.inference_mode()
def test_controls_skip_other_layers(tmp_path: Path) -> None:
    model = saved_pair(tmp_path, LlamaConfig(**SIZES | {"num_hidden_layers": 9}))[1]
    request = Request(model, skipping("1/3", 2, SETTINGS["ffn"]))
    wanted = {"prefill-only": (6, 7, 8), "skip-first": (0, 1, 2), "skip-evenly": (2, 5, 8)}
    tokens, real = left_padded([12, 8], SIZES["vocab_size"])
    for method, skipped in wanted.items():
        pruning = pruning_for(method, request)
        assert (pruning.skipped, pruning.boundary, pruning.ratio) == (skipped, 2, 0)
        logits, _ = prefilled(model, tokens, pruning, real)
        slow, _ = two_passes(model, model.embed(tokens), resolved(model, DENSE), skipped, 2, real)
        assert_same(logits, slow)
    # Without a boundary the logits are those of a model that ends with the kept layers.
    for settings in (DENSE, SETTINGS["both"]):
        pruning = pruning_for("skip-no-boundary", Request(model, skipping("1/3", 2, settings)))
        logits, _ = prefilled(model, tokens, pruning, real)
        short = deepcopy(model)
        short.model.layers = short.model.layers[:6]  # type: ignore[assignment]
        assert_same(logits, short(tokens, real)[:, -1])
    assert pruning_for("frozen", request).skipped == pruning_for("magnitude", request).skipped == (6, 7, 8)
    with pytest.raises(InputError, match="give --prefill-skip"):
        pruning_for("skip-first", Request(model, DENSE))


def test_shares_are_exact() -> None:
    """Of decimals too: 0.7 of 10 layers are 7, though the float is a little less than that."""
    weights = LayerWeights(attention=4000, ffn=12000, head=500, head_groups=2, heads_per_group=2, layers=10)
    for share, count in ((0.7, 7), ("7/10", 7), ("1/3", 3), (0.33, 3), (0.9999, 9), (0.1, 1), ("2/3", 6)):
        assert resolve(skipping(share), weights).skipped == tuple(range(10 - count, 10))
    for share, written in ((1 / 3, "1/3"), (2 / 3, "2/3"), (0.3, "3/10"), (1 / 7, "1/7")):
        assert exact_share(share) == exact_share(written)
    with pytest.raises(InputError, match="smallest share that skips one is 1/10"):
        resolve(skipping(0.0999), weights)
    with pytest.raises(InputError, match="skips none of 1 layers"):
        resolve(skipping(0.5), replace(weights, layers=1))
