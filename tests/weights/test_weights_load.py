"""Loading into a model on the meta device: every key accounted for, tied weights tied, and no more memory than said."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weights.load
import weights.memory
from weights.checkpoint import Checkpoint, open_checkpoint
from weights.errors import InputError
from weights.load import load_weights

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """An embedding, tied to the output; a projection; a buffer that is saved, one of integers and one that is not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.proj = nn.Linear(4, 3)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.empty(3))
        self.register_buffer("count", torch.empty(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.empty(3), persistent=False)


def tiny(tied: bool = True) -> Tiny:
    with torch.device("meta"):
        return Tiny(tied)


def tensors(tied: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (6, 4), "proj.weight": (3, 4), "proj.bias": (3,), "scale": (3,)}
    shapes |= {} if tied else {"head.weight": (6, 4)}
    floats = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return floats | {"count": torch.tensor([5, 2**40])}


def checkpoint_of(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(state, path / "model.safetensors")
    return open_checkpoint(path)


def message_of(model: nn.Module, checkpoint: Checkpoint, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(model, checkpoint, torch.float32, CPU, **options)
    assert "\n" not in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())  # nothing was loaded in part
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_arrive_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    state = {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in tensors().items()}
    model = tiny()
    load_weights(model, checkpoint_of(tmp_path / "c", state), dtype, CPU)
    for name, tensor in state.items():
        loaded = model.state_dict()[name]
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert loaded.dtype == expected.dtype and torch.equal(loaded, expected)
        assert not loaded.is_meta and loaded.is_contiguous()


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    model = tiny()
    load_weights(model, checkpoint_of(tmp_path / "c", tensors()), torch.float32, CPU)
    (tmp_path / "c" / "model.safetensors").write_bytes(b"")
    with torch.no_grad():
        model.proj.weight.mul_(2)  # a view of a read-only mapping would end the process here
    assert torch.equal(model.proj.weight, tensors()["proj.weight"] * 2)


def test_tensors_are_read_on_threads_of_their_own_and_the_number_of_threads_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, before = checkpoint_of(tmp_path / "c", tensors()), torch.get_num_threads()
    seen: list[tuple[bool, int]] = []
    read = weights.load.read_piece

    def watched(*given: Any) -> Any:
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return read(*given)

    def failing(*given: Any) -> Any:
        raise InputError("a tensor that cannot be read")

    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(weights.load, "read_piece", watched)
        load_weights(tiny(), checkpoint, torch.float32, CPU)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(weights.load, "read_piece", failing)
        with pytest.raises(InputError, match="cannot be read"):
            load_weights(tiny(), checkpoint, torch.float32, CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(False, 1)}


@pytest.mark.parametrize("present", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
def test_tied_weights_stay_tied_whichever_name_the_file_has(tmp_path: Path, present: tuple[str, ...]) -> None:
    state = tensors()
    embedding = state.pop("embed.weight")
    model = tiny()
    checkpoint = checkpoint_of(tmp_path / "c", state | {name: embedding.clone() for name in present})
    load_weights(model, checkpoint, torch.float32, CPU)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, embedding)


def test_missing_unexpected_and_misshaped_keys_are_all_in_one_line(tmp_path: Path) -> None:
    state = tensors()
    del state["proj.bias"], state["count"]
    state |= {"extra.weight": torch.ones(1), "proj.weight": torch.ones(4, 3)}
    message = message_of(tiny(), checkpoint_of(tmp_path / "c", state))
    assert "2 missing: count, proj.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: proj.weight [4, 3] for proj.weight [3, 4]" in message


def test_at_most_ten_keys_are_named(tmp_path: Path) -> None:
    extra = {f"extra.{number:03}": torch.ones(1) for number in range(500)}
    message = message_of(tiny(), checkpoint_of(tmp_path / "c", tensors() | extra))
    assert "500 unexpected: extra.000" in message and message.count("extra.") == 10
    message = message_of(tiny(), checkpoint_of(tmp_path / "c", extra))
    assert message.count("extra.") == 5 and "5 missing" in message and "proj.weight" in message


def test_untied_weights_are_both_needed(tmp_path: Path) -> None:
    assert "1 missing: head.weight" in message_of(tiny(tied=False), checkpoint_of(tmp_path / "c", tensors()))


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    state = tensors() | {"proj.weight": torch.ones(3, 4, dtype=torch.int8)}
    assert "proj.weight is torch.int8" in message_of(tiny(), checkpoint_of(tmp_path / "c", state))


def test_ignored_keys_may_be_there_and_only_they(tmp_path: Path) -> None:
    state = tensors() | {"layers.0.inv_freq": torch.ones(1), "inv_freq_2": torch.ones(1)}
    checkpoint = checkpoint_of(tmp_path / "c", state)
    assert "1 unexpected: inv_freq_2" in message_of(tiny(), checkpoint, ignored=[r".*\.inv_freq"])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ParameterList([nn.Parameter(torch.empty(2, 3)) for _ in range(4)])
        self.up = nn.ParameterList([nn.Parameter(torch.empty(2, 3)) for _ in range(4)])


def fused(names: list[str], keys: list[str]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Expert e's gate is the first half of the rows of "gate_up"[e], its up the second."""
    halves = {"gate": slice(0, 2), "up": slice(2, 4)}
    return {name: ("gate_up", (int(name.split(".")[1]), halves[name.split(".")[0]])) for name in names}


def test_several_parameters_can_be_pieces_of_one_key(tmp_path: Path) -> None:
    stored = torch.randn(4, 4, 3)
    with torch.device("meta"):
        model = Experts()
    load_weights(model, checkpoint_of(tmp_path / "c", {"gate_up": stored}), torch.float32, CPU, locate=fused)
    for expert in range(4):
        assert torch.equal(model.gate[expert], stored[expert, :2])
        assert torch.equal(model.up[expert], stored[expert, 2:])


@pytest.mark.parametrize("shape", [(3, 4, 3), (5, 4, 3), (4, 5, 3), (4, 4, 2), (4,)])
def test_a_fused_key_of_another_shape_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = Experts()
    message = message_of(model, checkpoint_of(tmp_path / "c", {"gate_up": torch.ones(shape)}), locate=fused)
    assert "of another shape: gate_up" in message


def test_a_checkpoint_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.memory, "available_memory", lambda device: 100)
    message = message_of(tiny(), checkpoint_of(tmp_path / "c", tensors()))
    assert "in float32 needs about 0.0 MB of memory on cpu" in message and "is available" in message


MEASURE = """
import sys, torch
from torch import nn
from weights.checkpoint import open_checkpoint
from weights.load import load_weights

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

dtype = getattr(torch, sys.argv[2])
torch.ones(1_000_000).to(torch.bfloat16)  # what the first conversion costs once and for all
checkpoint = open_checkpoint(sys.argv[1])
model = nn.Module()
for name, entry in checkpoint.entries.items():
    *path, attribute = name.split(".")
    module = model
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    setattr(module, attribute, nn.Parameter(torch.empty(entry.shape, dtype=dtype, device="meta")))
before = status("VmRSS")
load_weights(model, checkpoint, dtype, torch.device("cpu"))
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


def peak_and_weights(path: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes by which loading raised the process's peak, and bytes of the weights, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(path), str(dtype).removeprefix("torch.")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights_size = result.stdout.split()
    return int(peak), int(weights_size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_loading_takes_the_weights_once_and_one_tensor(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text("{}")
    weight_map = []
    for shard in range(4):
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        state = {f"s{shard}.t{number}": torch.ones(2_500, 1_000, dtype=stored) for number in range(8)}
        save_file(state, tmp_path / name)
        weight_map += [f'"{key}": "{name}"' for key in state]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {' + ", ".join(weight_map) + "}}")
    largest = 2_500 * 1_000 * 4
    peak, size = peak_and_weights(tmp_path, dtype)
    assert size == 32 * 2_500 * 1_000 * dtype.itemsize
    assert peak < size + largest + 4_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_the_default_checkpoint_takes_the_weights_once_and_one_tensor(default_checkpoint_path: Path) -> None:
    peak, size = peak_and_weights(default_checkpoint_path, torch.bfloat16)
    embedding = 49_152 * 576 * 4  # as it is read from a .gguf, in float32
    assert peak < size + embedding + 20_000_000
