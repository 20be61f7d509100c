"""The small trained Mixtral that ships with the project: what it computes, what it has learnt, what a user sees."""

import subprocess
import sys

import pytest
import torch
from builders import MIXTRAL_TINY, REPOSITORY, prefilled
from slow_mixture import SlowMixturePOP
from tolerance import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.evaluation.tasks import MAX_ANSWER_TOKENS
from popengine.evaluation.text_tasks import LEARNT, TASKS, held_out_prompts
from popengine.studies.settings import DENSE, PruningSettings


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(MIXTRAL_TINY, dtype="float32", device="cpu")


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in MIXTRAL_TINY.iterdir()) <= 16_000_000


@torch.inference_mode()
def test_transformers_loads_it_and_computes_the_same(engine: Engine) -> None:
    reference = AutoModelForCausalLM.from_pretrained(MIXTRAL_TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MIXTRAL_TINY)
    model = engine.model
    for task in TASKS:
        text = next(held_out_prompts(task, 1)).prompt
        ids = engine.prompts.ids(text)
        assert tokenizer(text).input_ids == ids
        tokens = torch.tensor([ids])
        wanted = reference(tokens).logits
        assert_same(model(tokens), wanted)
        last, state = prefilled(model, tokens[:, :40], DENSE, capacity=len(ids))
        for slot in range(40, len(ids)):
            assert_same(last, wanted[:, slot - 1])
            last = model.decode(tokens[:, slot], state)


@pytest.mark.parametrize("task", LEARNT)
def test_it_answers_questions_it_has_never_seen(task: str, engine: Engine) -> None:
    prompts = list(held_out_prompts(task, 40))
    made = engine.generate([one.prompt for one in prompts], max_new_tokens=MAX_ANSWER_TOKENS, pruning=DENSE)
    right = sum(one.text == prompt.answer for one, prompt in zip(made, prompts, strict=True))
    assert right >= 36


@pytest.mark.parametrize("prune_ratio", [0.2, 0.4])
def test_an_independent_slow_implementation_generates_the_same_tokens(prune_ratio: float, engine: Engine) -> None:
    reference = AutoModelForCausalLM.from_pretrained(MIXTRAL_TINY, dtype=torch.float32).eval()
    prompt = engine.prompts.ids(next(held_out_prompts("sort", 1)).prompt)
    slow = SlowMixturePOP(reference, prune_ratio, 0.1)
    settings = PruningSettings.paper(prune_ratio=prune_ratio)
    (made,) = engine.generate(
        next(held_out_prompts("sort", 1)).prompt, max_new_tokens=48, pruning=settings, ignore_eos=True
    )
    assert made.token_ids == slow.generate(prompt, 48)


def test_the_command_answers_a_prompt() -> None:
    prompt = "tally dbbd=d1b1b2d2; tally cabbacdafe?"
    done = subprocess.run(
        [sys.executable, "-m", "popengine.generate", "--ckpt", MIXTRAL_TINY, "--prompt", prompt, "--prune-ratio", "0"],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "c1a1b1b2a2c2d1a3f1e1\n")
    assert "experts   32 in 4 layers" in done.stderr


def test_rows_that_meet_at_an_expert_are_counted_as_they_are_read(engine: Engine) -> None:
    """A row by itself reads the chosen columns of down_proj; equal rows meet everywhere and are masked."""
    pruned, read = PruningSettings.paper(prune_ratio=0.3), []
    for batch in (1, 2, 8):
        made = engine.generate(["tally abc?"] * batch, raw=True, max_new_tokens=4, ignore_eos=True, pruning=pruned)
        read.append(made[0].statistics.weight_bytes_per_token)
    sizes = engine.resolve(pruned).rule.sizes(engine.model.model.layers[0].mlp.experts[0])
    losers = engine.model.config.num_hidden_layers * 2 * (sizes.candidate - sizes.pick) * 128 * 4
    assert read == [read[0], read[0] + losers, read[0] + losers]
