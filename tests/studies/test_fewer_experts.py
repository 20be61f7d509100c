"""Mixtures with fewer experts: against Hugging Face's models whose experts were deleted or merged by hand."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LLAVA_TINY, MIXTRAL, MIXTRAL_TINY, QWEN2_MOE, SIZES, one_line_error, prefilled, saved_pair
from tolerance import assert_same
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from models.cost_model import bytes_per_token
from models.experts import MixtureOfExperts
from models.llama import LlamaForCausalLM
from models.pruning.pruning import Pruning
from popengine import compare, score
from popengine.engine.loading import load
from popengine.engine.run import next_logits
from popengine.evaluation.calibration import calibration_for
from popengine.studies.by_name import Request, pruning_for
from popengine.studies.calibration import calibrate, load_calibration, save_calibration
from popengine.studies.experts import spectral_groups
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

SETTINGS = PruningSettings.paper(ffn_ratio=0.4)                   # 2 of 5 experts
NAMES = "model.layers.{}.mlp"


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LlamaForCausalLM]:
    config = MIXTRAL if request.param == "mixtral" else QWEN2_MOE
    return saved_pair(tmp_path_factory.mktemp(request.param), config)


def windows() -> list[list[int]]:
    return [list(range(start, start + 40)) for start in (0, 30, 50)]


def logits_of(model: LlamaForCausalLM, pruning: Pruning, tokens: Tensor, prompt: int) -> Tensor:
    """Prefill, then steps: [1 + steps, V]"""
    with torch.inference_mode():
        first, state = prefilled(model, tokens[:, :prompt], pruning)
        return torch.cat([first, *(next_logits(model, token, state) for token in tokens[:, prompt:].T)])


def slow_weights(reference: Any) -> list[Tensor]:
    """What each expert's output counts over the windows, by layer, from Hugging Face's routers token by token."""
    found = [torch.zeros(5) for _ in reference.model.layers]
    given: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0][0]))
        for layer in reference.model.layers
    ]
    for ids in windows():
        given.clear()
        with torch.no_grad():
            reference(torch.tensor([ids]))
        for layer, (mlp, x) in enumerate(zip((one.mlp for one in reference.model.layers), given, strict=True)):
            for row in x:
                probabilities = (mlp.gate.weight.detach() @ row).softmax(dim=0)
                best = probabilities.argsort(descending=True)[:2].tolist()
                both = sum(float(probabilities[one]) for one in best)
                whole = both if reference.config.model_type == "mixtral" else 1
                for one in best:
                    found[layer][one] += float(probabilities[one]) / whole
    for hook in hooks:
        hook.remove()
    return found


def test_experts_that_count_least_are_as_if_deleted(pair: tuple[Any, LlamaForCausalLM]) -> None:
    reference, model = pair
    calibration = calibrate(model, windows(), "numbers")
    pruning = pruning_for("router-statistics", Request(model, SETTINGS, calibration))
    config = deepcopy(reference.config)
    config.num_local_experts = config.num_experts = 3
    small = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = reference.state_dict()
    for layer, weights in enumerate(slow_weights(reference)):
        assert_same(calibration.routers[NAMES.format(layer)].weights, weights)
        left = sorted(weights.topk(3).indices.tolist())
        for key in state:
            if key.startswith(NAMES.format(layer)) and (".experts." in key or key.endswith("mlp.gate.weight")):
                state[key] = state[key][left]
    small.load_state_dict(state)
    tokens = torch.randint(SIZES["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = small(tokens).logits[0, 19:]
    assert_same(logits_of(model, pruning, tokens, 20), wanted)
    assert pruning.ffn_ratio == 0.4
    mixture = model.model.layers[0].mlp
    gate, experts = pruning.rule.experts_of(mixture)
    assert gate.out_features == len(experts) == 3
    assert {id(one) for one in experts} < {id(one) for one in mixture.experts}      # not copies of them


def slow_merge(parts: list[tuple[Tensor, Tensor]], shares: list[float]) -> tuple[Tensor, Tensor]:
    """Experts gate_up [2 I, H] and down [H, I] to one, channel by channel in loops."""
    channels = [torch.cat([*gate_up.chunk(2), down.T], dim=1) for gate_up, down in parts]
    first = channels[shares.index(max(shares))]
    total = torch.zeros_like(first)
    for own, share in zip(channels, shares, strict=True):
        pairs = [
            (float(torch.cosine_similarity(first[one], own[other], dim=0)), one, other)
            for one in range(len(first)) for other in range(len(own))
        ]
        taken: dict[int, int] = {}
        for _, one, other in sorted(pairs, reverse=True):
            if one not in taken and other not in taken.values():
                taken[one] = other
        for one, other in taken.items():
            total[one] += share * own[other]
    hidden = parts[0][1].shape[0]
    gate, up, down = total.split(hidden, dim=1)
    return torch.cat([gate, up]), down.T


def test_experts_that_are_routed_alike_are_as_if_averaged(pair: tuple[Any, LlamaForCausalLM]) -> None:
    reference, model = pair
    calibration = calibrate(model, windows(), "numbers")
    pruning = pruning_for("uncurl", Request(model, SETTINGS, calibration))
    merged = deepcopy(reference)
    for layer in range(len(merged.model.layers)):
        experts = merged.model.layers[layer].mlp.experts
        router = calibration.routers[NAMES.format(layer)]
        groups = spectral_groups(router.likeness, 3)
        assert sorted(one for group in groups for one in group) == [0, 1, 2, 3, 4]
        networks = pruning.rule.experts_of(model.model.layers[layer].mlp)[1]
        assert len({id(one) for one in networks}) == len(groups) == 3
        for group in groups:
            parts = [(experts.gate_up_proj[one], experts.down_proj[one]) for one in group]
            shares = (router.weights[group] / router.weights[group].sum()).tolist()
            with torch.no_grad():
                gate_up, down = slow_merge(parts, shares)
                for one in group:
                    experts.gate_up_proj[one], experts.down_proj[one] = gate_up, down
    tokens = torch.randint(SIZES["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = merged(tokens).logits[0, 19:]
    assert_same(logits_of(model, pruning, tokens, 20), wanted)


def test_like_experts_are_one_group() -> None:
    likeness = torch.full((6, 6), -0.3)
    for group in ([0, 3], [1, 4, 5], [2]):
        for one in group:
            likeness[one, group] = 0.9
    likeness.fill_diagonal_(1)
    assert sorted(spectral_groups(likeness, 3)) == [[0, 3], [1, 4, 5], [2]]


@pytest.mark.parametrize("method", ["router-statistics", "uncurl"])
def test_a_step_reads_as_much_and_experts_are_counted(pair: tuple[Any, LlamaForCausalLM], method: str) -> None:
    _, model = pair
    pruning = pruning_for(method, Request(model, SETTINGS, calibrate(model, windows(), "numbers")))
    dense = pruning_for("dense", Request(model, DENSE))
    _, state = prefilled(model, torch.tensor([list(range(20))]), pruning)
    next_logits(model, torch.tensor([3]), state)
    assert bytes_per_token(model, pruning, 1, state) == bytes_per_token(model, dense)
    left = 3 if method == "router-statistics" else 5
    assert [len(layer.ffn.picks) for layer in state.layers] == [left] * 3
    assert all(sum(layer.ffn.picks) == 2 for layer in state.layers)


def test_a_saved_calibration_knows_the_routers(pair: tuple[Any, LlamaForCausalLM], tmp_path: Path) -> None:
    _, model = pair
    made = calibrate(model, windows(), "numbers")
    save_calibration(made, model, tmp_path / "saved.safetensors")
    read = load_calibration(tmp_path / "saved.safetensors", model)
    for name, router in made.routers.items():
        assert torch.equal(read.routers[name].weights, router.weights)
        assert torch.equal(read.routers[name].likeness, router.likeness)
    first = made.routers[NAMES.format(0)]
    for damaged in (replace(first, weights=-first.weights), replace(first, likeness=first.likeness[:4])):
        broken = made.routers | {NAMES.format(0): damaged}
        save_calibration(replace(made, routers=broken), model, tmp_path / "broken.safetensors")
        with pytest.raises(InputError, match=r"what it says of .* is damaged"):
            load_calibration(tmp_path / "broken.safetensors", model)
    save_calibration(replace(made, routers={}), model, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="was made for another model"):
        load_calibration(tmp_path / "none.safetensors", model)


@pytest.mark.parametrize(("ratio", "left"), [(0.05, 5), (0.65, 2), (0.9, 1)])
def test_a_ratio_that_leaves_too_few_or_all_is_refused(
    pair: tuple[Any, LlamaForCausalLM], ratio: float, left: int
) -> None:
    request = Request(pair[1], PruningSettings.paper(ffn_ratio=ratio), calibrate(pair[1], windows(), "numbers"))
    if left == 2:
        assert pruning_for("uncurl", request).ffn_ratio == 0.6
        return
    with pytest.raises(InputError, match=f"leaves {left} of 5 experts: .* no fewer than the 2"):
        pruning_for("router-statistics", request)


def test_a_model_without_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_pair(tmp_path, LlamaConfig(**SIZES))[1]
    for method in ("router-statistics", "uncurl"):
        with pytest.raises(InputError, match=f"method {method} removes experts, and this model has none"):
            pruning_for(method, Request(model, SETTINGS))
    (tmp_path / "text").write_text("sort 52713=12357; " * 40)
    words = ["--ckpt", MIXTRAL_TINY, "--text", tmp_path / "text", "--windows", 1, "--method", "uncurl"]
    error = partial(one_line_error, score.main, capsys, *words)
    assert "method uncurl is calibrated on a text: give --calibration-text" in error()
    assert "unknown tasks 'sums'; there are text, pictures" in error("--calibration-tasks", "sums")
    both = error("--calibration-tasks", "text", "--calibration-text", tmp_path / "text")
    assert "give one of --calibration-tasks, --calibration-text and --calibration" in both


@pytest.mark.parametrize(("folder", "tasks"), [(MIXTRAL_TINY, "text"), (LLAVA_TINY, "pictures")])
def test_a_calibration_is_made_of_what_was_trained_on(folder: Path, tasks: str, tmp_path: Path) -> None:
    engine = load(folder, device="cpu")
    saved = str(tmp_path / "saved.safetensors")
    words = ["--text", "x", "--calibration-tasks", tasks, "--save-calibration", saved]
    made = calibration_for(score.parser().parse_args(words), engine)
    assert made is not None
    assert f"training split of the tasks {tasks}" in made.made_from
    assert all(one.tokens > 100 for name, one in made.moments.items() if ".experts." not in name)
    again = load_calibration(tmp_path / "saved.safetensors", engine.model)
    assert again.routers.keys() == made.routers.keys()
    assert all(isinstance(engine.model.get_submodule(name), MixtureOfExperts) for name in made.routers)
    assert (tasks == "text") == bool(made.routers)


def table_rows(folder: Path) -> Iterator[list[str]]:
    for line in (folder / "table.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| method"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_compare_knows_experts_and_visual_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--questions", 1, "--no-plots", "--quiet", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        compare.main([str(word) for word in [
            "--ckpt", MIXTRAL_TINY, "--tasks", "text", "--calibration-tasks", "text", "--prune-ratio", 0.2, "--methods",
            "dense", "router-statistics", "uncurl", "--out", tmp_path / "experts", *common,
        ]])
    assert end.value.code == 0
    assert [row[0] for row in table_rows(tmp_path / "experts")] == ["dense", "router-statistics", "uncurl"]
    with pytest.raises(SystemExit) as end:
        compare.main([str(word) for word in [
            "--ckpt", LLAVA_TINY, "--tasks", "pictures", "--prune-ratio", 0.2, "--methods", "dense", "visual-tokens",
            "pop", "--visual-tokens", "all", "1/2", "--visual-tokens-by", "attention", "diversity",
            "--visual-tokens-layer", 1, 2, "--out", tmp_path / "tokens", *common,
        ]])
    assert end.value.code == 0
    head = (tmp_path / "tokens" / "table.md").read_text().splitlines()[0]
    assert "| visual tokens | chosen by | after layer |" in head
    rows = [row[0] for row in table_rows(tmp_path / "tokens")]
    assert rows == ["dense"] + ["visual-tokens"] * 3 + ["pop"] * 4
    assert "unknown tasks 'sums'; there are text, pictures" in one_line_error(
        compare.main, capsys, "--ckpt", MIXTRAL_TINY, "--tasks", "text", "--calibration-tasks", "sums", "--out",
        tmp_path / "none",
    )
