"""The engines that a benchmark compares, each with the same method: generate greedily and report times.

Peers are optional: transformers and llama-cpp-python are imported only if asked for. They run on the same weights in
the same dtype.
"""

import contextlib
import importlib
import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.profiler import profile

from models.read_config import read_llama_config
from models.rope import rotary_frequencies
from popengine.engine.engine import Engine
from popengine.engine.results import measured
from popengine.images.images import ImageSource
from popengine.studies.resolve import StudyPruning
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.errors import InputError
from weights.gguf_families import LAYER_NAMES, NAMES, ROPE_FACTORS
from weights.gguf_file import open_parts
from weights.gguf_header import read_header
from weights.mapped_file import MappedFile

# .gguf's names of dtypes.
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Generated:
    """One greedy generation. prefill_ms excludes the partition, whose parts are scores, sort and copy.

    compile_s is the time of compiling before the generation.
    """

    tokens: list[int]
    prefill_ms: float
    step_ms: list[float]
    scores_ms: float = 0.0
    sort_ms: float = 0.0
    copy_ms: float = 0.0
    compile_s: float = 0.0

    @property
    def partition_ms(self) -> float:
        return self.scores_ms + self.sort_ms + self.copy_ms

    @property
    def answer_s(self) -> float:
        """Seconds of the whole answer: prompt, partition and steps, without compiling."""
        return (self.prefill_ms + self.partition_ms + sum(self.step_ms)) / 1000


class Contender(Protocol):
    """An engine in the benchmark. name: in the table; load_s: seconds from files to weights, without imports"""

    name: str
    load_s: float

    def generate(self, prompts: list[list[int]], new_tokens: int, steps: int | None = None) -> Generated:
        """Generate `new_tokens` tokens greedily, also after an end of sequence; return those of the first prompt.

        prompts  of equal length
        steps    stop after this many decode steps, but with buffers for `new_tokens` (a warm-up)
        """

    def drop_buffers(self) -> None:
        """Free the buffers that generations keep for reuse."""


class AbsentPeer(InputError):
    """Raised with the reason if a peer cannot run."""


class OwnEngine:
    """One setting of popengine. Settings share the weights of an engine and use its buffers in turn."""

    def __init__(
        self, name: str, engine: Engine, pruning: StudyPruning, images: Sequence[ImageSource] = ()
    ) -> None:
        self.name, self.engine, self.pruning, self.load_s = name, engine, pruning, engine.load_s
        self.images = images                        # of every prompt

    def generate(self, prompts: list[list[int]], new_tokens: int, steps: int | None = None) -> Generated:
        images = [image for _ in prompts for image in self.images]
        run = self.engine.run(prompts, new_tokens, self.pruning, ignore_eos=True, images=images)
        iterator: Iterator[list[int | None]] = iter(run)
        tokens, times = [], []
        for _ in range(new_tokens if steps is None else min(new_tokens, 1 + steps)):
            began = time.perf_counter()
            token, *_ = next(iterator)
            times.append((time.perf_counter() - began) * 1000)
            assert token is not None
            tokens.append(token)
        iterator.close()  # type: ignore[attr-defined]  # a generator: it gives its buffers back to the engine
        found = measured(run)
        return Generated(
            tokens,
            found.prefill_ms,
            times[1:],
            found.scores_ms,
            found.sort_ms,
            found.copy_ms,
            found.compile_s,
        )

    def share_between_ranks(self, prompts: list[list[int]], new_tokens: int, steps: int) -> float:
        """Measure the share of a decode step that communication takes, including the wait for the slower rank.

        PyTorch's profiler reports gloo's operations on the host and NCCL's on the GPU. It makes steps slower, so only
        the share is used; the time of a step is measured without it.
        """
        images = [image for _ in prompts for image in self.images]
        run = iter(self.engine.run(prompts, new_tokens, self.pruning, ignore_eos=True, images=images))
        next(run)
        with profile() as seen:
            began = time.perf_counter()
            for _ in range(steps):
                next(run)
            took = time.perf_counter() - began
        run.close()  # type: ignore[attr-defined]
        microseconds = sum(
            event.self_device_time_total if event.key.startswith("nccl") else event.cpu_time_total
            for event in seen.key_averages() if event.key.startswith(("gloo:", "nccl"))
        )
        return microseconds / 1e6 / took

    def drop_buffers(self) -> None:
        self.engine.idle_state = None


def import_peer(module: str, package: str) -> ModuleType:
    """Import a module. Raises AbsentPeer if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AbsentPeer(f"{package} is not installed ({error})") from None


class TransformersEngine:
    """Hugging Face's model as from_pretrained returns it: eager, with default attention and default cache."""

    name = "transformers"

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        transformers = import_peer("transformers", "transformers")
        transformers.utils.logging.disable_progress_bar()
        self.device = device
        importlib.import_module("transformers.models.llama.modeling_llama")     # seconds, not counted as loading
        began = time.perf_counter()
        if path.is_dir():
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:
            # Do not let transformers read the .gguf itself: it may keep the weights packed.
            with open_checkpoint(path) as checkpoint:
                config = dict(checkpoint.config)
                del config["architectures"], config["torch_dtype"]
                config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
                weights = {name: checkpoint.read(name).to(dtype) for name in checkpoint.entries}
            tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
            missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
            if set(missing) - tied or unexpected:
                raise AbsentPeer(f"it does not take these weights: {[*missing, *unexpected][:3]}")
            model.tie_weights()
        self.model = model.eval().to(device)
        self.load_s = time.perf_counter() - began

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int, steps: int | None = None) -> Generated:
        tokens: list[int] = []
        times = []
        ids, cache = torch.tensor(prompts, device=self.device), None
        for _ in range(new_tokens if steps is None else min(new_tokens, 1 + steps)):
            began = time.perf_counter()
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values      # [B, 1]
            tokens.append(int(ids[0]))
            times.append((time.perf_counter() - began) * 1000)
        return Generated(tokens, times[0], times[1:])

    def drop_buffers(self) -> None:
        """Do nothing: its cache ends with each generation."""


def llama_cpp_type(path: Path, form: str, dtype: str) -> str | None:
    """Choose the type of weights for llama.cpp that matches ours; None: the same file."""
    with open_checkpoint(path) as checkpoint:
        quantised = any(entry.stored is not None for entry in checkpoint.entries.values())
    if form == "auto" and quantised and path.is_file() and dtype != "float32":
        return None
    return {"int8": "Q8_0", "int4": "Q4_1"}.get(form, GGUF_TYPES[dtype])


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python, on a .gguf written with the same weights, or on the checkpoint itself.

    It runs in a process of its own (see llama_cpp.py), which ends with this object.

    kind  the type of its matrices; None: the checkpoint is a .gguf and is used as it is
    """

    def __init__(self, path: Path, kind: str | None, context: int, threads: int, folder: Path) -> None:
        if kind is None:
            files = [part.path for part in open_parts(path)]
        else:
            with open_checkpoint(path) as checkpoint:
                files = [write_gguf(checkpoint, kind, folder / f"{kind}.gguf")]
        self.name = f"llama.cpp, {kind or 'the same file'}"
        self.bytes_per_token = gguf_bytes_per_token(files)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "popengine.benchmark.llama_cpp", files[0], str(context), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )
        weakref.finalize(self, self.process.kill)
        loaded = self.answer()
        if "absent" in loaded:
            raise AbsentPeer(loaded["absent"])
        self.load_s = loaded["load_s"]

    def answer(self) -> dict[str, Any]:
        """Read one answer. Raises AbsentPeer if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AbsentPeer(f"llama.cpp's process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(self, prompts: list[list[int]], new_tokens: int, steps: int | None = None) -> Generated:
        (prompt,) = prompts
        assert self.process.stdin is not None
        count = new_tokens if steps is None else min(new_tokens, 1 + steps)
        with contextlib.suppress(BrokenPipeError):      # it has ended: `answer` says so
            self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": count}) + "\n")
            self.process.stdin.flush()
        found = self.answer()
        return Generated(found["tokens"], found["milliseconds"][0], found["milliseconds"][1:])

    def drop_buffers(self) -> None:
        """Do nothing: its cache belongs to the loaded model."""


def gguf_bytes_per_token(files: Sequence[Path]) -> int:
    """Count the bytes of matrices that a decode step reads of a .gguf file, or of all its parts; vectors do not count.

    Only experts that the token is routed to count. The embedding counts only if it is also the output head.
    """
    gguf = import_peer("gguf", "gguf")
    headers = [read_header(MappedFile(file), file) for file in files]
    metadata, tensors = headers[0].metadata, {name: one for header in headers for name, one in header.tensors.items()}
    architecture, tied, total = metadata.text("general.architecture"), "output.weight" not in tensors, 0
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2 or (name == "token_embd.weight" and not tied):
            continue
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_number)]
        size = math.prod(tensor.shape) // block * block_bytes
        if "_exps." in name:                                        # all experts of a layer in one tensor
            used, count = (metadata.size(f"{architecture}.expert_{what}") for what in ("used_count", "count"))
            size = size * used // count
        total += size
    return total


def write_gguf(checkpoint: Checkpoint, kind: str, path: Path) -> Path:
    """Write a Llama's weights in llama.cpp's names and order, matrices of this type and vectors in float32.

    The file has no vocabulary, as prompts are token ids. Raises AbsentPeer for a checkpoint that cannot be written.
    """
    gguf = import_peer("gguf", "gguf, which writes llama.cpp's weights,")
    if checkpoint.config.get("architectures") != ["LlamaForCausalLM"] or checkpoint.config.get("attention_bias"):
        raise AbsentPeer("its weights are written for plain Llama checkpoints only")
    config = read_llama_config(checkpoint.config)
    plain_rope = replace(config.rope, rope_type="default")
    factors = rotary_frequencies(plain_rope, config.head_dim) / rotary_frequencies(config.rope, config.head_dim)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    names = {name: gguf_name(name) for name in checkpoint.entries if not name.endswith("rotary_emb.inv_freq")}
    for name, other in names.items():
        shape = checkpoint.entries[name].shape
        add_tensor_info(gguf, writer, other, shape, kind if len(shape) > 1 else "F32")
    add_tensor_info(gguf, writer, ROPE_FACTORS, tuple(factors.shape), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        tensor = checkpoint.read(name)
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates neighbouring coordinates, Hugging Face the two halves of a head.
            tensor = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2)
        matrix = gguf.GGMLQuantizationType[kind if len(checkpoint.entries[name].shape) > 1 else "F32"]
        writer.write_tensor_data(gguf.quantize(tensor.contiguous().float().numpy(), matrix))
        checkpoint.release(name)
    writer.write_tensor_data(factors.numpy())
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of Hugging Face's tensors."""
    whole = {hugging_face: gguf for gguf, hugging_face in NAMES.items()}
    parts = {hugging_face: gguf for gguf, hugging_face in LAYER_NAMES.items()}
    if name in whole:
        return whole[name]
    _, _, layer, *part, suffix = name.split(".")
    return f"blk.{layer}.{parts['.'.join(part)]}.{suffix}"


def add_tensor_info(gguf: ModuleType, writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Declare a tensor of this shape and type in a .gguf file."""
    raw = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[raw]
    byte_shape = (*shape[:-1], shape[-1] // block * block_bytes)
    numpy = importlib.import_module("numpy")
    writer.add_tensor_info(name, byte_shape, numpy.dtype("uint8"), numpy.prod(byte_shape).item(), raw_dtype=raw)

