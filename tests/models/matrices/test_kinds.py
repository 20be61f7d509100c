"""Matrices of different kinds in one layer: a model of any mixture is the plain model on the values they stand for."""

from copy import deepcopy
from itertools import permutations, product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders import SETTINGS, SIZES, prefilled, random_reference
from tiny_gguf import write_gguf
from tolerance import assert_same
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig

from models.experts import MixtureOfExperts
from models.feed_forward import FeedForward
from models.llama import LlamaForCausalLM
from models.matrices.forms import ColumnMatrix, MixedMatrix, stack
from models.matrices.packed import GroupedInt8Matrix, Int4Matrix, Int8Matrix, StoredEmbedding
from models.matrices.plain import Matrix
from models.registry import architecture
from popengine.engine.loading import load_model
from popengine.studies.settings import DENSE, PruningSettings
from weights.checkpoint import open_checkpoint
from weights.gguf_blocks import BLOCKS, FOUR_BIT_TYPES, READERS
from weights.groups import group

KINDS = ("plain", "columns", "int8", "int4", "int4 in wide groups", "int8 in groups")
SIZES_OF_32 = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_hidden_layers": 2}
PROMPT = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
FROZEN = PruningSettings.paper(ffn_ratio=0.4, head_ratio=0.5, candidate_width=0.0, prefill="dense")


def converted(matrix: Matrix, kind: str) -> Matrix:
    """The same matrix as another kind, with activations in float32."""
    if kind == "columns":
        return ColumnMatrix.of(matrix.weight.t().contiguous().t(), matrix.bias)
    if kind == "int8":
        return Int8Matrix.nearest(matrix.weight, torch.float32, matrix.bias)
    if kind == "int8 in groups":
        given = group(matrix.weight, 32)
        made: Matrix = GroupedInt8Matrix.of_stretches(*matrix.weight.shape, torch.empty(0), [given])
        made.bias = matrix.bias
        return made
    if kind.startswith("int4"):
        return Int4Matrix.of_groups(group(matrix.weight, 64 if "wide" in kind else 32), torch.float32, matrix.bias)
    return Matrix.of(matrix.weight.clone(), matrix.bias)


@pytest.fixture(scope="module")
def llama() -> Any:
    return ours_of(LlamaConfig(**SIZES_OF_32, attention_bias=True, mlp_bias=True))


def ours_of(config: Any) -> Any:
    model = architecture(config.to_dict(), "config.json").from_config(config.to_dict())
    reference = random_reference(config).state_dict()
    for name, parameter in model.named_parameters():
        if name in reference:                                                       # not an expert's
            parameter.data.copy_(reference[name])
        else:
            nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def mixed(model: Any, kind_of: Any) -> tuple[Any, Any]:
    """A copy with matrices of the kinds that kind_of(module, projection) names, and the plain model of its values."""
    packed, plain = deepcopy(model), deepcopy(model)
    for name, module in model.named_modules():
        for projection, child in module.named_children():
            if projection.endswith("_proj"):
                matrix = converted(child, kind_of(module, projection))
                setattr(packed.get_submodule(name), projection, matrix)
                getattr(plain.get_submodule(name), projection).weight.copy_(matrix.values())
    return packed, plain


@torch.inference_mode()
def logits(model: Any, settings: PruningSettings) -> Tensor:
    """After a prompt and after each of two steps: [3, V]"""
    first, state = prefilled(model, PROMPT, settings)
    return torch.cat([first, *(model.decode(torch.tensor([token]), state) for token in (5, 9))])


def assert_alike(packed: Any, plain: Any, settings: PruningSettings, exact: bool, what: Any) -> None:
    """exact: False where columns of four bits are copied as eight bits"""
    ours, wanted = logits(packed, settings), logits(plain, settings)
    assert (ours - wanted).norm() / wanted.norm() < (1e-4 if exact else 0.05), (what, settings)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_a_projection_of_another_kind_than_the_others(llama: LlamaForCausalLM, projection: str) -> None:
    for own, others in permutations(KINDS, 2):
        pair = mixed(llama, lambda _, name, own=own, others=others: own if name == projection else others)
        columns = own if projection in ("o_proj", "down_proj") else others
        copied_as_eight = any(kind.startswith("int4") or kind.endswith("groups") for kind in (columns, others))
        assert_alike(*pair, DENSE, True, (own, others))
        if copied_as_eight:
            assert_alike(*pair, FROZEN, False, (own, others))
        else:
            assert_alike(*pair, SETTINGS["both"], True, (own, others))


def test_queries_keys_and_values_of_any_three_kinds(llama: LlamaForCausalLM) -> None:
    # Any two kinds in any places, and each kind in each place beside two others.
    triples = [kinds for kinds in product(KINDS, repeat=3) if len(set(kinds)) < 3]
    triples += [(KINDS[place - 2], KINDS[place - 1], KINDS[place]) for place in range(len(KINDS))]
    for kinds in triples:
        of = dict(zip(("q_proj", "k_proj", "v_proj"), kinds, strict=True))
        pair = mixed(llama, lambda _, name, of=of: of.get(name, "int8"))
        assert_alike(*pair, SETTINGS["both"], True, kinds)


def test_experts_of_different_kinds_on_one_prompt_after_another() -> None:
    """The copies of a prompt's experts serve the next prompt's, which may be of another kind."""
    model = ours_of(MixtralConfig(**SIZES_OF_32, num_local_experts=5))
    order = {module: index for index, module in enumerate(model.modules()) if isinstance(module, FeedForward)}
    assert any(isinstance(module, MixtureOfExperts) for module in model.modules())
    packed, plain = mixed(
        model, lambda module, name: "int8" if module not in order or name == "down_proj"
        else KINDS[(order[module] + len(name)) % len(KINDS)]
    )
    prompts = torch.randint(0, 96, (4, 1, 6), generator=torch.Generator().manual_seed(2))
    found = []
    for one in (packed, plain):
        with torch.inference_mode():
            _, state = prefilled(one, prompts[0], SETTINGS["ffn"])
            answers = []
            for prompt in prompts:
                answers += [one.prefill(one.embed(prompt), state), one.decode(torch.tensor([7]), state)]
            found.append(torch.cat(answers))
    assert_same(found[0], found[1])


def test_neighbours_of_one_kind_become_one_product() -> None:
    def made(kind: str, out: int = 64) -> Matrix:
        return converted(Matrix.of(torch.randn(out, 64), torch.randn(out)), kind)

    for kind in KINDS:
        assert type(stack([made(kind) for _ in range(3)])) is type(made(kind))
        other = "int8" if kind == "plain" else "plain"
        parts = [made(kind), made(kind, 128), made(other)]
        whole, x = stack(parts), torch.randn(2, 3, 64)
        assert isinstance(whole, MixedMatrix) and [part.out_features for part in whole.parts] == [192, 64]
        assert_same(whole(x), torch.cat([part(x) for part in parts], dim=-1))
        assert torch.equal(whole.values(), torch.cat([part.values() for part in parts]))
    bare = Matrix.of(torch.randn(64, 64), None)
    assert isinstance(stack([bare, made("plain")]), MixedMatrix)


def test_a_copy_of_a_mixture_holds_the_rows_of_its_first_part_only() -> None:
    parts = [Matrix.of(torch.randn(6, 64), None), Int8Matrix.nearest(torch.randn(4, 64), torch.float32)]
    whole, rows = stack(parts), torch.tensor([1, 4, 6, 7, 8, 9])
    copy = whole.empty_rows(len(rows))
    copy.copy_rows(whole, rows)
    assert torch.equal(copy.values(), whole.values()[rows])
    assert copy.held_bytes() == 2 * 64 * 4 and whole.held_bytes() == sum(part.held_bytes() for part in parts)


def readable_kinds() -> list[gguf.GGMLQuantizationType]:
    """All that the gguf package dequantises."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
            found.append(kind)
        except NotImplementedError:
            pass
    return found


def every_kind(path: Path, four_bits: int, embedding: str | None = None) -> list[str]:
    """A Llama with a layer for each kind: its v_proj, gate_proj and down_proj are of that kind, the others of the next.
    Then so many layers of Q4_0. The embedding is of the first kind, if no other is named.

    Random blocks, as the gguf package cannot quantise to all kinds. Returns the kinds by layer.
    """
    random = np.random.default_rng(0)

    def blocks(out: int, kind: gguf.GGMLQuantizationType) -> Any:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (out, 256 // block * size), dtype=np.uint8)
        # Bytes below 0x38: no half-precision scale in them, wherever it lies, is above 0.5.
        return raw % 0x38, kind

    kinds = [kind for kind in readable_kinds() if kind.name not in ("F32", "F16", "BF16")]
    kinds += [gguf.GGMLQuantizationType.Q4_0] * four_bits
    of_embedding = kinds[0] if embedding is None else gguf.GGMLQuantizationType[embedding]
    tensors: dict[str, Any] = {"token_embd.weight": blocks(260, of_embedding), "output_norm.weight": torch.ones(256)}
    tensors["output.weight"] = blocks(260, kinds[1])
    for layer, (own, other) in enumerate(zip(kinds, kinds[1:] + kinds[:1], strict=True)):
        rows = {"attn_q": 256, "attn_k": 64, "attn_v": 64, "attn_output": 256} | dict.fromkeys(
            ("ffn_gate", "ffn_up", "ffn_down"), 256
        )
        for name, out in rows.items():
            kind = own if name in ("attn_v", "ffn_gate", "ffn_down") else other
            tensors[f"blk.{layer}.{name}.weight"] = blocks(out, kind)
        tensors |= {f"blk.{layer}.{name}.weight": torch.ones(256) for name in ("attn_norm", "ffn_norm")}
    metadata = {
        "llama.context_length": 64, "llama.embedding_length": 256, "llama.block_count": len(kinds),
        "llama.feed_forward_length": 256, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": ["a b"],
    }
    write_gguf(path, metadata, tensors)
    return [kind.name for kind in kinds]


@pytest.mark.parametrize("four_bits", [0, 30])
@torch.inference_mode()
def test_every_kind_of_gguf_files_becomes_what_the_docs_say(tmp_path: Path, four_bits: int) -> None:
    """Four bits number by number, all others as eight bits: in a file that has mostly these in their groups, else with
    a scale for each row. An embedding of its own to the last bit."""
    kinds = every_kind(tmp_path / "m.gguf", four_bits)
    assert set(READERS) < set(kinds)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        model, _ = load_model(checkpoint, torch.bfloat16, torch.device("cpu"), "auto")
        assert isinstance(model, LlamaForCausalLM)
        for layer, (own, other) in enumerate(zip(kinds, kinds[1:] + kinds[:1], strict=True)):
            for name in ("self_attn.v_proj", "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                kind = other if name in ("self_attn.q_proj", "mlp.up_proj") else own
                matrix = model.model.layers[layer].get_submodule(name)
                key = f"model.layers.{layer}.{name}.weight"
                in_groups = kind in READERS and kind not in FOUR_BIT_TYPES and not four_bits
                wanted = GroupedInt8Matrix if in_groups else Int4Matrix if kind in FOUR_BIT_TYPES else Int8Matrix
                assert type(matrix) is wanted, kind
                if in_groups:
                    groups, stored = checkpoint.read_groups(key), checkpoint.read(key)
                    # Scale, middle and value are rounded to 8 bits each; a middle is half a step, or what is asked for.
                    of_size = [part.repeat_interleave(groups.size, dim=1) for part in (groups.scale, groups.minimum)]
                    bound = (stored.abs() + of_size[1].abs()) / 2**7 + 0.06 * of_size[0].abs()
                    assert ((matrix.values() - stored).abs() <= bound + 1e-28).all(), kind
                elif isinstance(matrix, Int4Matrix):
                    groups = checkpoint.read_groups(key)
                    assert torch.equal(matrix.numbers()[:, : matrix.out_features].t(), groups.numbers)
                    scales = torch.stack([groups.scale, groups.minimum + 8 * groups.scale], dim=-1)     # [out, G, 2]
                    assert torch.equal(matrix.groups[:, : matrix.out_features].transpose(0, 1), scales.bfloat16())
                else:
                    assert isinstance(matrix, Int8Matrix)
                    stored = checkpoint.read(key)
                    assert torch.equal(matrix.scale, (stored.abs().amax(dim=1) / 127).bfloat16()), kind
                    step = matrix.scale.float().clamp(min=1e-30).unsqueeze(1)
                    assert torch.equal(matrix.numbers().float(), (stored / step).round().clamp(-127, 127)), kind
        tokens = torch.tensor([[3, 0, 259, 3]])
        wanted = checkpoint.read("model.embed_tokens.weight").bfloat16()[tokens]
        if kinds[0] in READERS:
            assert isinstance(model.model.embed_tokens, StoredEmbedding)
        assert torch.equal(model.embed(tokens), wanted)
        assert torch.isfinite(logits(model, DENSE)).all() and torch.isfinite(logits(model, FROZEN)).all()


@pytest.mark.parametrize("form", ["int8", "int4"])
@torch.inference_mode()
def test_an_embedding_stays_as_stored_in_every_packed_form(tmp_path: Path, form: str) -> None:
    every_kind(tmp_path / "m.gguf", 0, embedding="Q4_K")
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        model, _ = load_model(checkpoint, torch.bfloat16, torch.device("cpu"), form)
        assert isinstance(model, LlamaForCausalLM) and isinstance(model.model.embed_tokens, StoredEmbedding)
        tokens = torch.tensor([[3, 0, 259, 3]])
        assert torch.equal(model.embed(tokens), checkpoint.read("model.embed_tokens.weight").bfloat16()[tokens])


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_compiled_step_can_look_up_stored_rows(kind: str) -> None:
    """Without a graph break, and bit for bit as eagerly. Scales are finite: their exponent bits are not all ones."""
    _, size = BLOCKS[kind]
    stored = torch.randint(0, 256, (8, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)) & 187
    embedding, tokens = StoredEmbedding(stored, READERS[kind], torch.bfloat16), torch.tensor([[5]])
    compiled = torch.compile(embedding, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.inference_mode():
        assert torch.isfinite(embedding(tokens)).all()
        assert torch.equal(compiled(tokens), embedding(tokens))
        assert embedding(tokens[:, :0]).shape == (1, 0, embedding(tokens).shape[-1])
