"""The Python API: batches, streams, sampling, ends of sequences, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import SIZES, complete_checkpoint, generated
from tokenizers import Tokenizer

from popengine.engine.engine import Engine
from popengine.engine.loading import load
from popengine.engine.memory_plan import state_within
from popengine.engine.results import lines
from popengine.engine.sampling import Sampling, next_tokens
from popengine.evaluation.scoring import Window, dense_log_probabilities
from popengine.studies.settings import DENSE, PruningSettings
from weights.errors import InputError

HALF = PruningSettings.paper(ffn_ratio=0.5, candidate_width=0.3)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return load(checkpoint)


def test_a_stream_says_what_generate_says(engine: Engine) -> None:
    (whole,) = engine.generate("What is this?", max_new_tokens=20, pruning=HALF)
    pieces = list(engine.stream("What is this?", max_new_tokens=20, pruning=HALF))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token_id for piece in pieces[:-1]] == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason
    assert pieces[-1].prompt_token_ids == whole.prompt_token_ids
    assert pieces[-1].statistics is not None
    assert all(piece.statistics is None for piece in pieces[:-1])


def test_a_dense_batch_gives_each_prompt_what_it_gets_alone(engine: Engine) -> None:
    prompts = ["a", "a much longer prompt than the other two", "bcd"]
    together = engine.generate(prompts, max_new_tokens=12, pruning=DENSE, raw=True)
    for prompt, one in zip(prompts, together, strict=True):
        assert one.token_ids == engine.generate(prompt, max_new_tokens=12, pruning=DENSE, raw=True)[0].token_ids


def test_a_batch_of_equal_prompts_is_pruned_like_one(engine: Engine) -> None:
    alone = engine.generate("the same words", max_new_tokens=12, pruning=HALF)[0]
    for one in engine.generate(["the same words"] * 3, max_new_tokens=12, pruning=HALF):
        assert one.token_ids == alone.token_ids


def test_prompts_go_through_the_chat_template_unless_raw(engine: Engine) -> None:
    text = engine.tokenizer.decode(engine.prompts.ids("Hi", system_prompt="Be kind."), skip_special_tokens=False)
    assert text == "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    assert engine.tokenizer.decode(engine.prompts.ids("Hi", raw=True), skip_special_tokens=False) == "Hi"
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = engine.tokenizer.decode(engine.prompts.ids(conversation), skip_special_tokens=False)
    assert text == "<|user|>Hi<|end|><|assistant|>Yes?<|end|><|assistant|>"


def test_every_end_of_sequence_ends_the_sequence(engine: Engine) -> None:
    # <eos> by config.json and tokenizer_config.json; <|end|> because the chat template ends a turn with it.
    named = {engine.tokenizer.token_id("<eos>"), engine.tokenizer.token_id("<|end|>")}
    assert engine.stop_ids == named
    (whole,) = engine.generate("Go on", max_new_tokens=40, pruning=DENSE, ignore_eos=True)
    end = whole.token_ids[5]
    engine.stop_ids = frozenset({end})
    try:
        (cut,) = engine.generate("Go on", max_new_tokens=40, pruning=DENSE)
    finally:
        engine.stop_ids = frozenset(named)  # type: ignore[arg-type]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert len(whole.token_ids) == 40
    assert whole.finish_reason == "length"


def test_a_sequence_that_has_ended_is_no_longer_live(engine: Engine) -> None:
    prompts = [engine.prompts.ids(text) for text in ("Go on", "Or not")]
    first, second = zip(*generated(engine, prompts, 12, HALF), strict=True)
    end = next(token for token in first if token not in second)
    run = engine.run(prompts, 12, HALF)
    run.stop_ids = frozenset({end})
    for step in run:
        assert run.state.live.flatten().tolist() == [step[0] not in (None, end), True]
        assert run.state.schedule.live == int(run.state.live.sum())
    assert run.finish_reasons == ["stop", "length"]


def test_sampling_is_reproducible_from_its_seed(engine: Engine) -> None:
    def ids(seed: int) -> list[int]:
        return engine.generate("Say", max_new_tokens=20, sampling=Sampling(1.0, seed=seed))[0].token_ids

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_top_k_and_top_p_leave_only_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, 1.0]]).log().repeat(2000, 1)             # 1.6, 49, 33, 16 %
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        return set(next_tokens(logits, Sampling(1.0, **settings), generator).tolist())  # type: ignore[arg-type]

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.5) == {1, 2}
    assert drawn(top_p=0.4) == {1}
    assert drawn(top_p=0.9, top_k=3) == {1, 2, 3}
    counts = next_tokens(logits, Sampling(1.0), generator).bincount(minlength=4) / 2000
    five_deviations = 5 * (0.25 / 2000) ** 0.5      # of a share among 2,000 draws, at most
    assert (counts - logits[0].softmax(0)).abs().max() <= five_deviations
    hot = next_tokens(logits, Sampling(5.0), generator).bincount(minlength=4) / 2000
    assert (hot - (logits[0] / 5).softmax(0)).abs().max() <= five_deviations


def test_no_temperature_and_no_top_p_is_too_small() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1e4]])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p in ((1e-320, 1.0), (1e-45, 1.0), (1.0, 1e-320), (1e-310, 1e-45)):
        assert next_tokens(logits, Sampling(temperature, top_p=top_p), generator).tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_said_and_leave_nothing_behind(checkpoint: Path, value: float) -> None:
    engine = load(checkpoint)
    before = engine.generate("a", max_new_tokens=6, pruning=HALF, raw=True)[0].token_ids
    (z,) = engine.prompts.ids("z", raw=True)
    with torch.no_grad():
        engine.model.model.embed_tokens.weight[z] = value
    for sampling in (Sampling(), Sampling(1.0, seed=0)):
        with pytest.raises(InputError, match="not finite for new token 1 of prompt 2: its weights"):
            engine.generate(["ab", "zz"], max_new_tokens=6, pruning=HALF, raw=True, sampling=sampling)
        assert engine.generate("a", max_new_tokens=6, pruning=HALF, raw=True)[0].token_ids == before
    with pytest.raises(InputError, match="not finite for scored token 1"):
        dense_log_probabilities(engine.model, Window([1, 2], [3, z, 5]))


def test_a_token_beyond_the_embedding_is_said_at_load_and_where_it_is_used(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<added>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="has 262 tokens and the model's embedding 261 rows"):
        engine = load(folder)
    assert engine.generate("Hi", max_new_tokens=2, pruning=DENSE)
    with pytest.raises(InputError, match="the token 261, and the model's embedding only 261 rows"):
        engine.generate("Hi <added>", max_new_tokens=2, pruning=DENSE)
    with pytest.raises(InputError, match="the token 261"):
        dense_log_probabilities(engine.model, Window([1, 2], [261]))


def test_interleaved_streams_do_not_disturb_each_other(engine: Engine) -> None:
    prompts = ["one thing", "or another"]
    wanted = [engine.generate(prompt, max_new_tokens=10, pruning=HALF)[0].token_ids for prompt in prompts]
    streams = [engine.stream(prompt, max_new_tokens=10, pruning=HALF) for prompt in prompts]
    pairs = list(zip(*streams, strict=False))
    for index in range(2):
        assert [pair[index].token_id for pair in pairs[:10]] == wanted[index]


def test_buffers_are_reused_from_prompt_to_prompt(engine: Engine) -> None:
    engine.generate("one", max_new_tokens=4, pruning=HALF)
    state = engine.idle_state
    engine.generate("two and a bit", max_new_tokens=4, pruning=HALF)
    assert engine.idle_state is state is not None


def test_statistics_add_up(engine: Engine) -> None:
    (one,) = engine.generate("Count", max_new_tokens=5, pruning=HALF, ignore_eos=True)
    statistics, regions = one.statistics, one.statistics.regions
    assert statistics.new_tokens == 5 == len(one.token_ids)
    assert statistics.prompt_tokens == len(one.prompt_token_ids)
    assert (regions.channels, regions.retained, regions.candidate, regions.pruned) == (80, 28, 24, 28)
    assert regions.picked == 12
    hidden, layers, vocabulary, head = 48, 3, 261, 12
    attention = 2 * hidden * head * (4 + 2)
    assert statistics.dense_weight_bytes_per_token == 4 * (vocabulary * hidden + layers * (attention + 3 * 80 * hidden))
    # Of gate and up retained and candidate channels are read, of down retained and picked ones.
    read = layers * (attention + (52 + 52 + 40) * hidden)
    assert statistics.weight_bytes_per_token == 4 * (vocabulary * hidden + read)
    assert statistics.partition_ms == pytest.approx(statistics.scores_ms + statistics.sort_ms + statistics.copy_ms)
    assert min(statistics.prefill_ms, statistics.partition_ms, statistics.decode_ms_per_token) > 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"prompts": ""}, "empty"),
        ({"prompts": "  \n"}, "empty"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": "bad \udce9 byte"}, "UTF-8"),
        ({"prompts": "x", "max_new_tokens": 0}, "at least 1"),
        ({"prompts": "x", "raw": True, "system_prompt": "y"}, "chat template"),
        ({"prompts": "x" * 250, "raw": True, "max_new_tokens": 10}, "250 tokens and 10 new .* 260.* 256"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(engine: Engine, call: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        engine.generate(**call)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((-1.0,), "temperature"), ((float("nan"),), "temperature"), ((1.0, -1), "top-k"), ((1.0, 0, 0.0), "top-p"),
        ((1.0, 0, 1.0, 10**30), "seed"), ((1.0, 0, 1.0, -1), "seed"),
    ],
)
def test_sampling_out_of_range_is_refused(settings: tuple, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Sampling(*settings)


def test_a_shorter_context_can_be_asked_for(tmp_path: Path) -> None:
    folder = complete_checkpoint(tmp_path)
    with pytest.raises(InputError, match="more than the context of 20"):
        load(folder, max_seq_len=20).generate("a prompt of some length", max_new_tokens=10)
    with pytest.raises(InputError, match="between 1 and the model's 256"):
        load(folder, max_seq_len=1000)


def test_positions_that_are_scaled_make_a_longer_context(tmp_path: Path) -> None:
    """As long a one as is asked for, and not longer: 64 positions of training, times 4."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    folder = complete_checkpoint(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    assert load(folder).max_seq_len == load(folder, max_seq_len=256).max_seq_len == 256
    assert len(load(folder).generate("a" * 200, raw=True, max_new_tokens=40, ignore_eos=True)[0].token_ids) == 40
    with pytest.raises(InputError, match="between 1 and the model's 256"):
        load(folder, max_seq_len=257)


def test_bytes_per_token_of_a_batch_count_the_masked_candidates(engine: Engine) -> None:
    """Alone a step gathers the columns of down_proj that are picked; a batch reads those of all candidates."""
    one, two = (engine.generate(["same"] * count, max_new_tokens=3, pruning=HALF)[0].statistics for count in (1, 2))
    layers, hidden, candidates = SIZES["num_hidden_layers"], SIZES["hidden_size"], one.regions.candidate
    unpicked = layers * hidden * (candidates - one.regions.picked)
    assert unpicked > 0
    assert two.weight_bytes_per_token - one.weight_bytes_per_token == 4 * unpicked


@pytest.mark.parametrize(("tokens", "untimed"), [(1, True), (2, False)])
def test_a_run_of_one_token_has_no_step_to_time(engine: Engine, tokens: int, untimed: bool) -> None:
    (found,) = engine.generate("same", max_new_tokens=tokens, pruning=HALF, ignore_eos=True)
    report = "\n".join(lines(found.statistics, found.finish_reason, 0.0))
    assert ("no step to time" in report, "ms/token" in report) == (untimed, not untimed) and "nan" not in report


# Three, not two: where there are as many threads as cores, they wait for each other at full load.
@pytest.mark.parametrize("threads", [1, 3])
def test_failures_of_every_kind_leave_the_next_tokens_as_they_were(
    engine: Engine, checkpoint: Path, tmp_path: Path, threads: int
) -> None:
    def tokens() -> list[list[int]]:
        alone = [engine.generate(one, max_new_tokens=8, pruning=DENSE)[0].token_ids for one in ("a", "bcd")]
        batch = [one.token_ids for one in engine.generate(["a", "bcd"], max_new_tokens=8, pruning=DENSE)]
        assert batch == alone
        return alone

    wanted, before = tokens(), torch.get_num_threads()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 1e9}')
    failures: list[Callable[[], object]] = [
        lambda: load(tmp_path), lambda: engine.generate("a" * 10**6), lambda: engine.generate("a", images=["no.png"]),
        lambda: engine.generate("a", max_new_tokens=10**9), lambda: engine.generate("a\udce9"),
        lambda: state_within(10**9, engine.model, 1, 10**12, engine.resolve(DENSE)),
        lambda: dense_log_probabilities(engine.model, Window([1], [10**6])),
    ]
    torch.set_num_threads(threads)
    try:
        for fail in failures:
            with pytest.raises(InputError):
                fail()
            assert tokens() == wanted
    finally:
        torch.set_num_threads(before)
