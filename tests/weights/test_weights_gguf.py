""".gguf files: values, config and tokenizer as transformers reads them from the same file, and hostile files."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import (
    TEXT,
    TinyLlama,
    assert_read_as_by_transformers,
    byte_level_metadata,
    open_gguf,
    sentencepiece_metadata,
    sentencepiece_model,
    write_gguf,
)
from tokenizers import Tokenizer, pre_tokenizers

from popengine.text.sandbox.process import Sandbox
from weights.checkpoint import checkpoint_dtype
from weights.errors import InputError
from weights.gguf_tokenizer import PRE_TOKENIZERS

TINY_TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def tiny_file(path: Path, more: dict[str, Any] | None = None, without: tuple[str, ...] = (), **options: Any) -> Path:
    """A whole little checkpoint, with metadata added or left out."""
    model = TinyLlama()
    metadata = {key: value for key, value in (model.metadata() | TINY_TOKENS).items() if key not in without}
    return write_gguf(path, metadata | (more or {}), model.gguf_tensors(), **options)


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_str(open_gguf(path).tokenizer_json)


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        _ = tokenizer_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Weights


@pytest.mark.parametrize("model", [TinyLlama(), TinyLlama(head_dim=48, tied=False, bias=True)], ids=["tied", "bias"])
def test_tensors_come_back_under_their_names_and_in_their_order(tmp_path: Path, model: TinyLlama) -> None:
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", model.metadata() | TINY_TOKENS, model.gguf_tensors()))
    assert set(checkpoint.entries) == set(model.tensors)
    for name, tensor in model.tensors.items():
        assert checkpoint.entries[name].shape == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)
        checkpoint.release(name)
        assert torch.equal(checkpoint.read(name), tensor)
    config = checkpoint.config
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in model.tensors)
    assert (config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]) == (model.head_dim, 4, 2)
    assert (config["vocab_size"], config["rope_theta"], config["max_position_embeddings"]) == (260, 50000.0, 128)
    # Biases of queries, keys and values without one of the output: Qwen2 has them.
    biased = "model.layers.0.self_attn.q_proj.bias" in model.tensors
    assert config["model_type"] == ("qwen2" if biased else "llama")


# The largest error as a share of the tensor's largest value: half a step of the quantisation, or the float's precision.
@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("Q8_0", torch.float32, 0.5 / 127),
        ("Q5_1", torch.float32, 1 / 31),
        ("Q4_1", torch.float32, 1 / 15),
        ("Q4_0", torch.float32, 1 / 8),
        ("F16", torch.float16, 2**-11),
        ("BF16", torch.bfloat16, 2**-8),
    ],
)
def test_quantised_tensors_are_close_to_what_was_quantised(
    tmp_path: Path, kind: str, dtype: torch.dtype, error: float
) -> None:
    checkpoint = open_gguf(tiny_file(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind]))
    assert checkpoint_dtype(checkpoint) == dtype
    for name, tensor in TinyLlama().tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == checkpoint.entries[name].dtype == (dtype if tensor.dim() > 1 else torch.float32)
        assert (read.float() - tensor).abs().max() <= 1.02 * error * tensor.abs().max()


# A block of bytes that may stand for anything is read as the gguf package reads it, whatever the tensor.
def kinds_that_are_dequantised() -> list[str]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind.name)
    assert len(kinds) >= 20
    return kinds


@pytest.mark.parametrize("kind_name", kinds_that_are_dequantised())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where bytes stand for numbers that are none
def test_every_kind_is_read_as_the_gguf_package_reads_it(tmp_path: Path, kind_name: str) -> None:
    """A matrix, one whose rows are reordered, and a tensor that holds two experts."""
    kind = gguf.GGMLQuantizationType[kind_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shapes = {"attn_q": (128, 256), "attn_output": (64, 512), "ffn_up_exps": (2, 96, 256)}
    source = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    metadata = TinyLlama().metadata() | {"llama.block_count": 1, "llama.expert_count": 2, "llama.expert_used_count": 1}
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_token_list(["a"])
    values = {}
    for name, shape in shapes.items():
        raw = source.integers(0, 256, (*shape[:-1], shape[-1] // block * block_bytes), np.uint8)
        writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.dequantize(raw, kind).copy()).view(shape)
    for name in ("blk.0.attn_norm.weight", "token_embd.weight", "blk.0.ffn_gate_inp.weight"):
        writer.add_tensor(name, np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_gguf(tmp_path / "m.gguf")
    expected = {
        "self_attn.o_proj": values["attn_output"],
        # Rows 2 j and 2 j + 1 of a head of 32 are its rows j and 16 + j.
        "self_attn.q_proj": values["attn_q"].view(4, 16, 2, 256).transpose(1, 2).reshape(128, 256),
        "mlp.experts.0.up_proj": values["ffn_up_exps"][0],
        "mlp.experts.1.up_proj": values["ffn_up_exps"][1],
    }
    for name, wanted in expected.items():
        read = checkpoint.read(f"model.layers.0.{name}.weight")
        assert torch.equal(read.float().nan_to_num(), wanted.nan_to_num())
        assert torch.equal(
            checkpoint.read(f"model.layers.0.{name}.weight", slice(5, 20)).float().nan_to_num(),
            wanted[5:20].nan_to_num(),
        )


def test_every_end_of_sequence_id_is_kept(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.chat_template": "x"}
    checkpoint = open_gguf(tiny_file(tmp_path / "m.gguf", more))
    assert checkpoint.generation_config == {"eos_token_id": [1, 3]}
    assert (checkpoint.bos_token, checkpoint.eos_token, checkpoint.chat_template) == ("<s>", "</s>", "x")


def test_special_tokens_that_end_a_turn_end_a_text(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": ["<end_of_turn>", "</s>", "a", "b", "ab", "<|im_end|>"]}
    types = {"tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1]}       # the last is no special token
    assert open_gguf(tiny_file(tmp_path / "m.gguf", tokens | types)).generation_config == {"eos_token_id": [1, 0]}


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q5_1"])
def test_values_are_those_transformers_reads(tmp_path: Path, kind: str) -> None:
    model = TinyLlama(tied=False)
    metadata = model.metadata() | TINY_TOKENS | {"llama.vocab_size": 260}
    tensors = model.gguf_tensors()
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors, gguf.GGMLQuantizationType[kind])
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert_read_as_by_transformers(path, load(path.parent, gguf_file=path.name, dtype=torch.float32))


# Tokenizers


def read_by_transformers(path: Path) -> Tokenizer:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


def assert_same_tokens(ours: Tokenizer, reference: Tokenizer) -> None:
    for text in TEXT:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", [pre for pre in PRE_TOKENIZERS if pre != "smollm"])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    path = tiny_file(tmp_path / "m.gguf", byte_level_metadata(pre))
    assert_same_tokens(tokenizer_of(path), read_by_transformers(path))


@pytest.mark.parametrize(
    ("name", "split", "as_first"),
    [
        ("llama3", "llama-bpe", True), ("llama-v3", "llama-bpe", True), ("pixtral", "llama-bpe", True),
        ("falcon3", "llama-bpe", True), ("dbrx", "llama-bpe", False), ("smaug-bpe", "llama-bpe", False),
        ("glm4", "llama-bpe", False), ("deepseek-r1-qwen", "qwen2", True), ("megrez", "qwen2", True),
        ("stablelm2", "qwen2", True), ("phi-2", "gpt-2", True), ("olmo", "gpt-2", True), ("jais", "gpt-2", True),
        ("starcoder", "smollm", True), ("command-r", "smollm", True), ("minerva-7b", "smollm", True),
    ],
)  # fmt: skip
def test_other_names_of_the_same_split(tmp_path: Path, name: str, split: str, as_first: bool) -> None:
    """as_first: what is not said in a file is as for the split's own name (whole words first, bos before a text)."""
    more = byte_level_metadata(split)
    first = json.loads(open_gguf(tiny_file(tmp_path / "m.gguf", more)).tokenizer_json)
    other = json.loads(open_gguf(tiny_file(tmp_path / "o.gguf", more | {"tokenizer.ggml.pre": name})).tokenizer_json)
    assert (first == other) == as_first
    assert first["pre_tokenizer"] == other["pre_tokenizer"]
    if not as_first:
        assert (other["model"]["ignore_merges"], other["post_processor"]) == (False, None)


def test_tokens_of_the_default_checkpoint_are_those_of_transformers_and_llama_cpp(default_gguf: Path) -> None:
    ours, reference = tokenizer_of(default_gguf), read_by_transformers(default_gguf)
    # transformers 5 does not know this file's pre-tokenizer and takes GPT-2's, which never joins the spaces before a
    # number. With the one SmolLM2's own tokenizer.json has, all agree.
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_same_tokens(ours, reference)
    assert ours.get_vocab_size() == 49_152
    # What llama.cpp makes of the same file.
    for text, ids in {
        "a  123\n\n45": [81, 256, 33, 34, 35, 1116, 36, 37],
        "½ x² ٣٤": [16738, 1792, 19133, 216, 164, 113, 164, 114],
        "<|im_start|>user\n1<|im_end|>\n": [1, 4093, 198, 33, 2, 198],
    }.items():
        assert ours.encode(text).ids == ids


def test_tokens_without_text_are_told_apart(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.tokens": [*TINY_TOKENS["tokenizer.ggml.tokens"], "", ""]}
    more["tokenizer.ggml.token_type"] = [*TINY_TOKENS["tokenizer.ggml.token_type"], 1, 3]
    ours = tokenizer_of(tiny_file(tmp_path / "m.gguf", more))
    assert ours.get_vocab_size() == 7
    assert ours.encode("ab", add_special_tokens=False).ids == [4]


def test_sentencepiece_tokens_are_those_of_sentencepiece_and_transformers(tmp_path: Path) -> None:
    model = sentencepiece_model()
    path = tiny_file(tmp_path / "m.gguf", sentencepiece_metadata(model), without=("tokenizer.ggml.merges",))
    ours, reference = tokenizer_of(path), read_by_transformers(path)
    for text in TEXT[:-1]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
        assert ours.decode(ids) == text
        if not text.startswith(" "):  # transformers gives a text that begins with a space no second one
            assert ids == reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).ids == [model.bos_id(), *ids]


def test_sentencepiece_merges_follow_the_scores_not_the_ids(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model())
    in_order = tokenizer_of(tiny_file(tmp_path / "m.gguf", metadata))
    for key in ("tokens", "scores", "token_type"):
        column = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = column[:4] + column[:3:-1]
    reversed_ids = tokenizer_of(tiny_file(tmp_path / "r.gguf", metadata))
    for text in TEXT:
        assert reversed_ids.encode(text).tokens == in_order.encode(text).tokens


def test_sentencepiece_without_a_space_before_the_text(tmp_path: Path) -> None:
    model = sentencepiece_model(space_prefix=False)
    more = sentencepiece_metadata(model) | {"tokenizer.ggml.add_space_prefix": False}
    ours = tokenizer_of(tiny_file(tmp_path / "m.gguf", more))
    for text in TEXT:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
        assert ours.decode(ids) == text


def test_sentencepiece_symbols_of_spaces_and_newlines(tmp_path: Path) -> None:
    """Gemma has them: runs of spaces and of newlines are tokens, and the longest one that fits is taken."""
    symbols = ("\n", "\n\n", "▁▁", "▁▁▁", "<b>")
    model = sentencepiece_model(space_prefix=False, symbols=symbols)
    more = sentencepiece_metadata(model, symbols) | {"tokenizer.ggml.add_space_prefix": False}
    ours = tokenizer_of(tiny_file(tmp_path / "m.gguf", more))
    for text in [*TEXT, "a  b", "a   b    c      d", "\n\n\nx\n", " <b>  x</b>", "   ", "\t  \n  \t"]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
        assert ours.decode(ids) == text


def test_a_sentencepiece_vocabulary_without_ids_has_llama_cpps_defaults(tmp_path: Path) -> None:
    named = sentencepiece_metadata(sentencepiece_model())
    ids = {key: named[key] for key in named if key.endswith("_token_id")}
    assert ids == {f"tokenizer.ggml.{name}_token_id": number for name, number in
                   (("bos", 1), ("eos", 2), ("unknown", 0))}
    with_ids = open_gguf(tiny_file(tmp_path / "m.gguf", named))
    keys = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    unnamed = {key: value for key, value in named.items() if key not in ids}
    without = open_gguf(tiny_file(tmp_path / "n.gguf", unnamed, without=keys))
    assert without.tokenizer_json == with_ids.tokenizer_json
    assert (without.bos_token, without.eos_token) == ("<s>", "</s>")
    assert without.generation_config == with_ids.generation_config == {"eos_token_id": [2]}
    # Other vocabularies have none.
    assert open_gguf(tiny_file(tmp_path / "b.gguf", without=keys)).bos_token is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, "ab"), ({"add_bos_token": True}, "<s>ab"), ({"add_bos_token": True, "add_eos_token": True}, "<s>ab</s>")],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path, flags: dict[str, bool], expected: str) -> None:
    path = tiny_file(tmp_path / "m.gguf", {f"tokenizer.ggml.{name}": value for name, value in flags.items()})
    assert "".join(tokenizer_of(path).encode("ab").tokens) == expected


# What is refused


def test_files_that_are_not_supported_say_why(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "architecture 'bert'; in .gguf files llama, qwen2," in message_of(tiny_file(path, architecture="bert"))
    assert "rope.dimension_count is 16" in message_of(tiny_file(path, {"llama.rope.dimension_count": 16}))
    assert "llama.logit_scale" in message_of(tiny_file(path, {"llama.logit_scale": 2.0}))
    assert "not one whole number" in message_of(tiny_file(path, {"llama.attention.head_count": [4, 2]}))
    assert "one of 3 parts" in message_of(tiny_file(path, {"split.count": 3}))
    assert "block_count is 2000000000" in message_of(tiny_file(path, {"llama.block_count": 2_000_000_000}))
    assert "has no llama.block_count" in message_of(tiny_file(path, without=("llama.block_count",)))
    assert "splits text as 'deepseek-llm'" in message_of(tiny_file(path, {"tokenizer.ggml.pre": "deepseek-llm"}))
    assert "kind 'bert'" in message_of(tiny_file(path, {"tokenizer.ggml.model": "bert"}))
    assert "is not in its vocabulary" in message_of(tiny_file(path, {"tokenizer.ggml.eos_token_id": 77}))
    repeated = {"tokenizer.ggml.tokens": ["a", "a", "b", "ab", "c"]}
    assert "twice in its vocabulary" in message_of(tiny_file(path, repeated))


@pytest.mark.parametrize(
    ("merge", "words"), [("a z", "Token `z` out"), ("b a", "Token `ba` out"), ("ab", "Merges"), ("a b c", "Merges")]
)
def test_merges_that_are_none_are_refused_by_the_process_of_the_tokenizer(
    tmp_path: Path, merge: str, words: str
) -> None:
    content = open_gguf(tiny_file(tmp_path / "m.gguf", {"tokenizer.ggml.merges": ["a b", merge]})).tokenizer_json
    with pytest.raises(InputError, match=rf"^m\.gguf: its tokenizer cannot be built \({words}[^\n]*$"):
        Sandbox("tokenizers", content, "m.gguf")


def test_an_unsupported_quantisation_is_named(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    place = data.rindex(name) + len(name) + 4 + 16  # after the number of dimensions and two of them
    for number, said in ((gguf.GGMLQuantizationType.Q8_1.value, "in Q8_1, which"), (4, "type 4"), (999, "type 999")):
        data[place : place + 4] = struct.pack("<I", number)
        path.write_bytes(data)
        assert f"{name.decode()} is" in message_of(path) and said in message_of(path)


def test_a_missing_gguf_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "needs the gguf package: pip install gguf" in message_of(path)


def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole) - 1, len(whole) // 60)]:
        path.write_bytes(whole[:length])
        assert "m.gguf" in message_of(path)


HUGE = 2**62


@pytest.mark.parametrize(
    "header",
    [
        b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
        b"GGUF" + struct.pack("<IQQ", 3, 900_000, 900_000),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, HUGE),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 10, HUGE),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, HUGE),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77),
        b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, HUGE, HUGE, 0, 0),
        b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 2**31),
        b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 0),
        b"not a gguf file at all, whatever its name says",
    ],
)
def test_hostile_headers_are_one_line_at_once(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(header + bytes(64))
    assert "m.gguf" in message_of(tmp_path / "m.gguf")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on a scale that became infinite
def test_any_changed_byte_is_an_input_error_or_loads(tmp_path: Path) -> None:
    path = tiny_file(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    whole = path.read_bytes()
    header_size = whole.rindex(b"weight") + 40  # a change to the tensors' own bytes changes nothing but values
    source = random.Random(0)
    refused = 0
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(source.choice([1, 1, 2, 8])):
            changed[source.randrange(header_size)] = source.choice([0, 1, 255, source.randrange(256)])
        path.write_bytes(changed)
        try:
            checkpoint = open_gguf(path)
            _ = checkpoint.tokenizer_json
            for name in checkpoint.entries:
                checkpoint.read(name)
        except InputError:
            refused += 1
    assert 300 < refused < 600
