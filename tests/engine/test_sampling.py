"""How tokens are chosen and answers end: distributions held to transformers' own, stop strings, log-probabilities."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exit_status, one_line_error
from tolerance import tolerated
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import popengine
from popengine.chat import main as chat_main
from popengine.engine.engine import Engine
from popengine.engine.loading import choose_dtype, load
from popengine.engine.run import seen_tokens
from popengine.engine.sampling import Sampling, kept_probabilities, next_tokens, penalised
from popengine.generate import main
from popengine.text.stops import StoppedText
from weights.checkpoint import open_checkpoint
from weights.errors import InputError


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint, dtype="float32", device="cpu")


@pytest.mark.parametrize("named", [
    {"min_p": 0.2}, {"min_p": 1.0}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
    {"temperature": 0.4, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
], ids=str)
def test_distributions_are_those_of_transformers(named: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0} | named)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    prompts = [torch.randint(50, (12,), generator=generator).tolist() for _ in range(4)]
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    wanted = steps(torch.tensor(prompts), logits.clone()).softmax(dim=-1)
    changed = penalised(logits.float(), sampling.repetition_penalty, seen_tokens(prompts, logits))
    found = kept_probabilities(changed, sampling)
    found = found / found.sum(dim=-1, keepdim=True)
    assert torch.equal(found > 0, wanted > 0)
    assert (found - wanted).abs().max() < tolerated(1)


def test_a_penalty_changes_greedy_answers_too(engine: Engine) -> None:
    logits, seen = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[True, False, True]])
    assert next_tokens(logits, Sampling(), None).tolist() == [0]
    assert next_tokens(logits, Sampling(repetition_penalty=1.2), None, seen).tolist() == [1]
    (plain,), (changed,) = (
        engine.generate("Hello", max_new_tokens=24, ignore_eos=True, pruning=0, repetition_penalty=penalty)
        for penalty in (1.0, 50.0)
    )
    assert len(set(changed.token_ids)) == 24 > len(set(plain.token_ids))     # a random model repeats itself
    assert not set(changed.token_ids) & set(changed.prompt_token_ids)


def test_log_probabilities_are_the_model_s_own(engine: Engine) -> None:
    many = engine.generate(["Hello", "And you there?"], max_new_tokens=6, ignore_eos=True, pruning=0, logprobs=True,
                           temperature=2.0, seed=3)
    for one in many:
        assert one.logprobs is not None and len(one.logprobs) == 6
        ids = torch.tensor([one.prompt_token_ids + one.token_ids])
        with torch.inference_mode():
            log_p = engine.model(ids).log_softmax(dim=-1)[0] if callable(engine.model) else None
        assert log_p is not None
        said = ids[0, len(one.prompt_token_ids) :]
        wanted = log_p[len(one.prompt_token_ids) - 1 : -1].gather(1, said[:, None])[:, 0]
        assert one.logprobs == pytest.approx(wanted.tolist(), abs=tolerated(10))


def pieces_of(engine: Engine, **named: Any) -> list[Any]:
    return [*engine.stream("Hello", max_new_tokens=30, ignore_eos=True, pruning=0, **named)]


def test_a_stop_string_that_spans_tokens_is_never_shown_in_part(engine: Engine) -> None:
    texts = [piece.text for piece in pieces_of(engine)]
    whole = "".join(texts)
    place = next(i for i in range(6, len(whole) - 4) if whole.index(whole[i : i + 3]) == i)
    stop = whole[place : place + 3]
    found = pieces_of(engine, stop=["never there", stop])
    assert "".join(piece.text for piece in found) == whole[:place]
    shown = ""
    for piece in found:
        shown += piece.text
        assert whole[:place].startswith(shown)
    assert found[-1].finish_reason == "stop" and len(found) < 31
    (one,) = engine.generate("Hello", max_new_tokens=30, ignore_eos=True, pruning=0, stop=stop)
    assert (one.text, one.finish_reason) == (whole[:place], "stop")
    assert one.token_ids == [piece.token_id for piece in found[:-1]]
    two = engine.generate(["Hello", "Hello"], max_new_tokens=30, ignore_eos=True, pruning=0, stop=stop)
    assert [each.text for each in two] == [whole[:place]] * 2
    (other,) = engine.generate("Hello", max_new_tokens=30, ignore_eos=True, pruning=0, stop="never there")
    assert other.text == whole and other.finish_reason == "length"


def test_what_could_begin_a_stop_string_comes_when_it_does_not(engine: Engine) -> None:
    text = StoppedText(engine.tokenizer, ["END", "NDX"])
    assert [text.add(part) for part in ("aE", "N", "Db")] == ["a", "", ""]
    assert text.found and text.given == "a" and text.finish() == ""
    text = StoppedText(engine.tokenizer, ["END", "NDX"])
    assert [text.add(part) for part in ("aE", "N", "e", "EN")] == ["a", "", "ENe", ""]
    assert not text.found and text.finish() == "EN" and text.whole() == "aENeEN"


def test_the_command_has_stop_strings_and_log_probabilities(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--ckpt", checkpoint, "--prompt", "Hello", "-n", 20, "--ignore-eos", "--prune-ratio", 0)
    assert exit_status(main, *flags, "--json", "--logprobs") == 0
    plain = json.loads(capsys.readouterr().out)
    assert len(plain["logprobs"]) == len(plain["token_ids"]) == 20 and max(plain["logprobs"]) <= 0
    stop = plain["text"][5:8]
    assert exit_status(main, *flags, "--json", "--stop", "never there", "--stop", stop, "--min-p", 0.1) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["text"] == plain["text"][: plain["text"].index(stop)] and stopped["finish_reason"] == "stop"
    assert "logprobs" not in stopped
    for words, said in ((("--min-p", 2), "min-p must be between"), (("--stop", ""), "stop must be strings"),
                        (("--repetition-penalty", 0), "repetition penalty"), (("--logprobs",), "give --json too")):
        assert said in one_line_error(main, capsys, *flags, *words)


def test_a_conversation_stops_and_remembers_what_was_shown(engine: Engine) -> None:
    first = engine.chat(pruning=0, max_new_tokens=20).say("Hello")
    stop = first.text[4:7]
    conversation = engine.chat(pruning=0, max_new_tokens=20, stop=stop)
    assert conversation.say("Hello").text == first.text[: first.text.index(stop)]
    assert conversation.messages[-1]["content"] == first.text[: first.text.index(stop)]


def test_chat_has_the_flags_too(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "stop must be strings" in one_line_error(chat_main, capsys, "--ckpt", checkpoint, "--stop", "")


def test_dtypes_by_short_names_and_as_pytorch_has_them(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, wanted in (("bf16", torch.bfloat16), ("half", torch.float16), ("fp32", torch.float32),
                         (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        assert load(checkpoint, dtype=word, device="cpu").dtype == wanted
    with pytest.raises(InputError, match="dtype must be auto"):
        load(checkpoint, dtype=torch.int8)
    with open_checkpoint(checkpoint) as opened, pytest.raises(InputError, match="dtype must be auto"):
        choose_dtype("int8", opened, torch.device("cpu"), packed=False)
    assert exit_status(main, "--ckpt", checkpoint, "--prompt", "x", "-n", 2, "--dtype", "bf16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"


def test_a_number_is_a_prune_ratio_and_other_things_are_named(engine: Engine) -> None:
    by_number, by_settings = (
        engine.generate("Hello", max_new_tokens=4, pruning=pruning)[0]
        for pruning in (0.4, popengine.PruningSettings(prune_ratio=0.4))
    )
    assert by_number.statistics.pruning.settings == by_settings.statistics.pruning.settings
    assert by_number.token_ids == by_settings.token_ids
    for wrong in ("0.4", True, {"prune_ratio": 0.4}):
        with pytest.raises(InputError, match="pruning must be a prune ratio"):
            engine.generate("Hello", pruning=wrong)     # type: ignore[arg-type]
    with pytest.raises(InputError, match="no argument 'temprature'"):
        engine.stream("Hello", temprature=0.5)
    with pytest.raises(InputError, match="temperature must be"):
        engine.chat(temperature=-1)


def test_an_engine_says_what_it_is(engine: Engine, checkpoint: Path) -> None:
    words = repr(engine)
    for said in (checkpoint.name, "LlamaForCausalLM", "M parameters", "plain weights", "float32", "cpu"):
        assert said in words
    assert engine.parameters == sum(one.numel() for one in engine.model.parameters())


def test_public_names_are_few() -> None:
    assert set(popengine.__all__) == {"__version__", *popengine.PUBLIC}


def test_threads_are_bounded(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    flags = ("--ckpt", checkpoint, "--prompt", "x", "-n", 2, "--quiet")
    try:
        assert exit_status(main, *flags, "--threads", 1) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    capsys.readouterr()
    assert "threads must be at least 1" in one_line_error(main, capsys, *flags, "--threads", 0)
