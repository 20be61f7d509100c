"""The default checkpoint, SmolLM2-135M-Instruct, against Hugging Face: live, and from numbers that were kept.

The kept numbers (tools/write_goldens.py) hold for the .gguf file; the live comparison for whichever was fetched.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from builders import REPOSITORY, generated
from safetensors.torch import load_file
from slow_pop import SlowPOP
from slow_prefill import SlowPrefillOnly
from smollm2_text import CHAT_PROMPT, TEXT
from tiny_gguf import assert_configured_as_by_transformers, open_gguf, write_gguf
from tolerance import SMOLLM2, assert_same
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.studies.settings import DENSE, PruningSettings
from weights.checkpoint import open_checkpoint
from weights.default_checkpoint import FROM_PACKAGE

GOLDENS = REPOSITORY / "tests" / "goldens" / "smollm2.safetensors"
# So many tokens transformers computes anew, which is slow. The kept numbers, which its own model gave, go on further.
LIVE = 20
POP_RUNS = [(ratio, prefill) for ratio in (0.2, 0.4) for prefill in ("pruned", "dense")]


@pytest.fixture(scope="module")
def engine(default_checkpoint_path: Path) -> Engine:
    return load(default_checkpoint_path, dtype="float32")


@pytest.fixture(scope="module")
def default_model_of_transformers(default_checkpoint_path: Path, engine: Engine) -> Any:
    """Of the .gguf file with the engine's own tensors, which spares 15 s and 1 GB. What they hold, two tests show: that
    transformers reads the same from the file, and the kept logits."""
    if default_checkpoint_path.suffix != ".gguf":
        return AutoModelForCausalLM.from_pretrained(default_checkpoint_path, dtype=torch.float32).eval()
    with open_checkpoint(default_checkpoint_path) as checkpoint, torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**checkpoint.config)).eval()
    apart = model.load_state_dict(engine.model.state_dict(), strict=False, assign=True)
    assert not apart.unexpected_keys and {*apart.missing_keys} <= {"lm_head.weight"}
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)         # its frequencies are in no file
    return model


@pytest.fixture(scope="module")
def goldens(default_checkpoint_path: Path) -> dict[str, Any]:
    if default_checkpoint_path.name != FROM_PACKAGE:
        pytest.skip("the kept numbers are those of the .gguf file, and the Hub's own files were fetched")
    return load_file(GOLDENS)


@pytest.fixture(scope="module")
def answer(engine: Engine) -> Callable[[int, PruningSettings], list[int]]:
    """So many tokens after the prompt, run once for all tests that ask."""
    @cache
    def run(count: int, pruning: PruningSettings) -> list[int]:
        steps = generated(engine, [engine.prompts.ids(CHAT_PROMPT)], count, pruning, ignore_eos=False)
        return [token for (token,) in steps if token is not None]

    return run


def test_values_are_those_transformers_reads(default_gguf: Path, tmp_path: Path) -> None:
    """Of the embedding and of two layers, in a smaller file: with all of them transformers needs 15 s and 1 GB."""
    reader, layers = gguf.GGUFReader(default_gguf), {"blk.0.": "blk.0.", "blk.17.": "blk.1."}
    metadata = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    tensors = {}
    for tensor in reader.tensors:
        prefix = next((one for one in layers if tensor.name.startswith(one)), "")
        if prefix or not tensor.name.startswith("blk."):
            name = layers.get(prefix, "") + tensor.name.removeprefix(prefix)
            tensors[name] = tensor.data, tensor.tensor_type
    small = write_gguf(tmp_path / "two-layers.gguf", metadata | {"llama.block_count": 2}, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=small.name, dtype=torch.float32)
    whole = open_gguf(default_gguf)
    values = model.state_dict()
    assert len(values) == 2 * 9 + 3
    for name, found in values.items():
        own = name.replace(".layers.1.", ".layers.17.").replace("lm_head", "model.embed_tokens")
        assert torch.equal(whole.read(own).float(), found), name
    assert_configured_as_by_transformers(whole.config | {"num_hidden_layers": 2}, model)


def test_tokens_equal_those_kept(engine: Engine, goldens: dict[str, Any]) -> None:
    assert engine.prompts.ids(TEXT, raw=True)[:256] == goldens["tokens"].tolist()
    assert engine.prompts.ids(CHAT_PROMPT) == goldens["prompt"].tolist()


def test_logits_equal_those_kept(engine: Engine, goldens: dict[str, Any]) -> None:
    with torch.inference_mode():
        logits = engine.model(goldens["tokens"][None].long())[0]                    # [256, V]
    assert torch.equal(logits.argmax(-1).int(), goldens["argmax"])
    sampled = logits[:, goldens["sampled_ids"].long()]
    assert_same(sampled, goldens["sampled_logits"], SMOLLM2)


def test_greedy_tokens_equal_those_kept(answer: Any, goldens: dict[str, Any]) -> None:
    assert answer(64, DENSE) == goldens["greedy"].tolist()


@pytest.mark.parametrize(("ratio", "prefill"), POP_RUNS)
def test_pop_tokens_equal_those_kept(answer: Any, goldens: dict[str, Any], ratio: float, prefill: Any) -> None:
    settings = PruningSettings.paper(ratio, prefill=prefill)
    assert answer(48, settings) == goldens[f"pop_{ratio}_{prefill}"].tolist()


def test_logits_equal_transformers(engine: Engine, default_model_of_transformers: Any) -> None:
    tokens = torch.tensor([engine.prompts.ids(TEXT, raw=True)[:256]])
    assert tokens.shape[1] == 256
    with torch.inference_mode():
        wanted, logits = default_model_of_transformers(tokens).logits, engine.model(tokens)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert_same(logits, wanted, SMOLLM2)


def test_greedy_tokens_equal_transformers(engine: Engine, answer: Any, default_model_of_transformers: Any) -> None:
    prompt = engine.prompts.ids(CHAT_PROMPT)
    with torch.inference_mode():
        wanted = default_model_of_transformers.generate(torch.tensor([prompt]), max_new_tokens=LIVE, do_sample=False)
    assert answer(64, DENSE)[:LIVE] == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("ratio", "prefill"), POP_RUNS)
def test_pop_tokens_equal_transformers(
    engine: Engine, answer: Any, default_model_of_transformers: Any, ratio: float, prefill: Any
) -> None:
    prompt = engine.prompts.ids(CHAT_PROMPT)
    settings = PruningSettings.paper(ratio, prefill=prefill)
    slow = SlowPOP(default_model_of_transformers, engine.resolve(settings).ffn_ratio, 0.1, prefill)
    wanted = slow.generate(prompt, LIVE)
    slow.remove_hooks()
    assert answer(48, settings)[:LIVE] == wanted


@pytest.mark.parametrize(("share", "skipped", "boundary", "tokens"), [
    ("1/3", 10, 16, LIVE),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("1/3", 10, 1, LIVE), ("1/6", 5, 1, LIVE), ("1/3", 10, 16, 48),
    )),
])
def test_tokens_of_prompts_that_skip_layers_equal_the_slow_ones(
    engine: Engine, default_model_of_transformers: Any, share: str, skipped: int, boundary: int, tokens: int
) -> None:
    prompt = engine.prompts.ids(CHAT_PROMPT)
    settings = PruningSettings.paper(prune_ratio=0.0, prefill_skip=share, boundary_tokens=boundary)
    made = [token for (token,) in generated(engine, [prompt], tokens, settings)]
    assert made == SlowPrefillOnly(default_model_of_transformers, skipped, boundary).generate(prompt, tokens)
