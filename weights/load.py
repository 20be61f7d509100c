"""Fill a model that was built on the meta device with the tensors of a checkpoint, every key accounted for."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from weights.checkpoint import Checkpoint
from weights.entries import TensorEntry
from weights.errors import InputError
from weights.memory import require_memory

# For each parameter, the checkpoint key that holds it and an index into that tensor (() is all of it).
Locate = Callable[[list[str], list[str]], dict[str, tuple[str, tuple[Any, ...]]]]

NAMES_SHOWN = 10

# What files carry of their training that plays no part, in any family: buffers that follow from the config, and the
# value head of reinforcement learning. transformers leaves them aside as well.
NEVER_NEEDED = (
    r"(.*\.)?rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)", r"(.*\.)?position_ids", r"(.*\.)?masked_bias",
    r"(pretrained_model\.)?v_head\..*",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """What becomes of a parameter that is not kept as it is read.

    make          makes it from stretches of its rows, one after the other. Several threads make different parameters
    put           puts what was made into the model
    stretches     what a stretch is: "values", a tensor of plain numbers (which may be a view of the file); "groups",
                  the Groups that the checkpoint keeps; "stored", uint8 [rows, bytes], as they lie in the file
    rows_at_once  rows of a stretch
    held_bytes    memory that it takes
    """

    make: Callable[[Iterator[Any]], Any]
    put: Callable[[Any], None]
    stretches: Literal["values", "groups", "stored"]
    rows_at_once: int
    held_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of a tensor that is held, where a model is shared out: these of its rows (dim 0) or columns (1).

    whole  how many there are
    """

    dim: int
    own: slice
    whole: int

    def of(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """An index of the part, from that of the whole in a checkpoint's tensor: numbers, then slices."""
        entries = list(index)
        while sum(isinstance(entry, slice) for entry in entries) <= self.dim:
            entries.append(slice(None))
        place = [number for number, entry in enumerate(entries) if isinstance(entry, slice)][self.dim]
        first = entries[place].start or 0
        entries[place] = slice(first + self.own.start, first + self.own.stop)
        return tuple(entries)


# What becomes of a parameter, by its key and the entry that holds it; None: it is kept as it is.
Pack = Callable[[Tensor, str, TensorEntry], Packing | None]


@dataclass(frozen=True)
class Wanted:
    """One parameter or persistent buffer of the model, all of its names (tied), and where its values come from."""

    names: list[str]
    target: Tensor
    key: str
    index: tuple[Any, ...]
    dtype: torch.dtype  # in memory
    packing: Packing | None = None
    share: Share | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole that it is, or is a share of."""
        shape = list(self.target.shape)
        if self.share is not None:
            shape[self.share.dim] = self.share.whole
        return tuple(shape)

    @property
    def held_bytes(self) -> int:
        """Memory that it takes."""
        return self.target.numel() * self.dtype.itemsize if self.packing is None else self.packing.held_bytes


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    locate: Locate | None = None,
    ignored: Iterable[str] = (),
    progress: bool = False,
    pack: Pack | None = None,
    shares: Mapping[str, Share] | None = None,
) -> None:
    """Give every parameter and persistent buffer of `model` its values from `checkpoint`.

    dtype     of the floating-point tensors in memory; integer buffers keep theirs
    locate    where a parameter lies when that is not under its own name: a function of the parameters' names and the
              checkpoint's, to {parameter: (key, index)}; one it leaves out lies under its own name. Several parameters
              may be pieces of one key, and together they must use all of it
    ignored   regular expressions of whole checkpoint keys that may be there and are not needed
    progress  a bar on stderr
    pack      says which parameters are packed instead
    shares    parameters that are a part of what the checkpoint has, by name

    Tied parameters (one object under several names) are read once and stay tied; all but one of their names may be
    absent. InputError, before anything is allocated, when keys are missing, unexpected or of another shape (all in one
    line) and when the weights will not fit into memory. At its peak loading takes the memory of the weights plus that
    of the checkpoint's largest tensor.
    """
    wanted = find_all(model, checkpoint, dtype, locate, ignored, pack, shares)
    needed = sum(one.held_bytes for one in wanted)
    require_memory(needed, device, f"{checkpoint.path} in {str(dtype).removeprefix('torch.')}")

    by_key: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_key.setdefault(one.key, []).append(one)

    def read_all(key: str) -> list[tuple[Wanted, Any]]:
        """What a key holds, as the model is to hold it."""
        read = [(one, read_one(checkpoint, one, device)) for one in by_key[key]]
        checkpoint.release(key)
        return read

    # A tensor on each thread, instead of each operation shared out over all: threads that wait for each other take far
    # longer where the cores have other work.
    threads = torch.get_num_threads()
    # In their order, so that a disk reads forwards; but the largest first: no other thread could share it at the end.
    keys = [key for key in checkpoint.entries if key in by_key]
    largest = max(keys, key=lambda key: checkpoint.entries[key].elements, default="")
    keys.sort(key=lambda key: key != largest)
    try:
        with (
            tqdm(total=needed, desc="loading", unit="B", unit_scale=True, disable=not progress, leave=False) as bar,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for read in pool.map(read_all, keys):
                for one, value in read:
                    put(model, one, value) if one.packing is None else one.packing.put(value)
                    bar.update(one.held_bytes)
    finally:
        torch.set_num_threads(threads)


def find_all(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, locate: Locate | None = None,
    ignored: Iterable[str] = (), pack: Pack | None = None, shares: Mapping[str, Share] | None = None,
) -> list[Wanted]:
    """Where everything lies that `model` needs, nothing read yet. As for load_weights"""
    names = list(model.state_dict())
    located: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name in names}
    if locate is not None:
        located |= locate(names, list(checkpoint.entries))
    wanted = find_sources(model, located, checkpoint, dtype, pack, shares or {})
    check_keys(checkpoint, wanted, {key for key, _ in located.values()}, list(ignored))
    return wanted


def told_apart(model: nn.Module, checkpoint: Checkpoint, locate: Locate | None = None) -> list[str]:
    """Keys of one tensor of the model, tied by its config, under which the file has several that are not the same."""
    names = model.state_dict(keep_vars=True)
    located: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name in names}
    if locate is not None:
        located |= locate(list(names), list(checkpoint.entries))
    keys_of: dict[int, list[str]] = {}
    for name, target in names.items():
        if located[name][0] in checkpoint.entries:
            keys_of.setdefault(id(target), []).append(located[name][0])
    return next((
        keys for keys in keys_of.values()
        if any(not torch.equal(checkpoint.stored_bytes(keys[0]), checkpoint.stored_bytes(key)) for key in keys[1:])
    ), [])


def require_room(checkpoint: Checkpoint, sides: Iterable[int], blocks: int) -> None:
    """InputError for a model that is larger than what is there: it must not even be laid out.

    sides   numbers that are each to be a side of a tensor
    blocks  layers and experts, which have matrices of their own (or a place each in a tensor of three dimensions)
    """
    shapes = [entry.shape for entry in checkpoint.entries.values()]
    longest = max((side for shape in shapes for side in shape), default=0)
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes if len(shape) > 1)
    if (largest := max(sides)) > longest:
        raise InputError(f"{checkpoint.path}: its config has a size of {largest}, and no tensor a side above {longest}")
    if blocks > matrices:
        raise InputError(
            f"{checkpoint.path}: its config has {blocks} layers and experts, and there are only {matrices} matrices"
        )


def find_sources(
    model: nn.Module, located: dict[str, tuple[str, tuple[Any, ...]]], checkpoint: Checkpoint, dtype: torch.dtype,
    pack: Pack | None, shares: Mapping[str, Share],
) -> list[Wanted]:
    """What the model needs, one item for each tensor object; a tied one comes from the first name that is there."""
    targets = model.state_dict(keep_vars=True)  # the objects themselves, so that tied names show as one object
    names_of: dict[int, list[str]] = {}
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)
    wanted = []
    for names in names_of.values():
        target = targets[names[0]]
        sources = [located[name] for name in names]
        key, index = next((source for source in sources if source[0] in checkpoint.entries), sources[0])
        kind = dtype if target.is_floating_point() else target.dtype
        entry = checkpoint.entries.get(key)
        packing = None if pack is None or entry is None else pack(target, key, entry)
        wanted.append(Wanted(names, target, key, index, kind, packing, shares.get(names[0])))
    return wanted


def check_keys(checkpoint: Checkpoint, wanted: list[Wanted], known: set[str], ignored: list[str]) -> None:
    """InputError with every missing, unexpected and mis-shaped key in one line, at most ten of them by name."""
    missing = [one.key for one in wanted if one.key not in checkpoint.entries]
    unexpected = [
        key
        for key in checkpoint.entries
        if key not in known and not any(re.fullmatch(pattern, key) for pattern in (*ignored, *NEVER_NEEDED))
        and not adds_nothing(checkpoint, key, known)
    ]
    misshaped = []
    used: dict[str, int] = {}  # elements of a key that its pieces take
    for one in wanted:
        entry = checkpoint.entries.get(one.key)
        if entry is None:
            continue
        used[one.key] = used.get(one.key, 0) + math.prod(one.shape)
        shape = piece_shape(entry, one.index)
        if shape != one.shape:
            misshaped.append(f"{one.key} {list(entry.shape)} for {one.names[0]} {list(one.shape)}")
        elif entry.dtype.is_floating_point != one.target.is_floating_point():
            misshaped.append(f"{one.key} is {entry.dtype}, {one.names[0]} is {one.dtype}")
    if not misshaped:
        misshaped = [
            f"{key} {list(checkpoint.entries[key].shape)}, of which the model uses {count} elements"
            for key, count in used.items()
            if count != checkpoint.entries[key].elements
        ]

    kinds = [
        (what, names)
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if kinds:
        share = NAMES_SHOWN // len(kinds)
        listed = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:share])}{', ...' if len(names) > share else ''}"
            for what, names in kinds
        )
        raise InputError(f"{checkpoint.path} does not hold the weights that its config describes: {listed}")


def adds_nothing(checkpoint: Checkpoint, key: str, known: set[str]) -> bool:
    """Whether a key is a bias of zeros beside a matrix of the model: AutoGPTQ wrote one for every matrix until 2023."""
    matrix = key.removesuffix("bias") + "weight"
    return key.endswith(".bias") and matrix in known and not checkpoint.read(key).any()


def piece_shape(entry: TensorEntry, index: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The shape of a tensor of this entry's shape at `index`, None where it has no such index."""
    try:
        return tuple(torch.empty(entry.shape, device="meta")[index].shape) if index else entry.shape
    except (IndexError, RuntimeError):
        return None


def read_index(checkpoint: Checkpoint, one: Wanted) -> Tensor:
    """The values of one parameter as the checkpoint reads them: of rows no more than are held."""
    if one.share is not None and one.share.dim == 0 and one.index == ():
        return checkpoint.read(one.key, one.share.own)
    return checkpoint.read(one.key)[one.index if one.share is None else one.share.of(one.index)]


def read_one(checkpoint: Checkpoint, one: Wanted, device: torch.device) -> Any:
    """What one parameter becomes."""
    if one.packing is None:
        return read_piece(checkpoint, one, device)
    return one.packing.make(read_stretches(checkpoint, one, one.packing))


def read_stretches(checkpoint: Checkpoint, one: Wanted, packing: Packing) -> Iterator[Any]:
    """One parameter, some rows at a time."""
    by_columns = one.share is not None and one.share.dim == 1
    if packing.stretches == "values" and (one.index != () or by_columns):
        yield from read_index(checkpoint, one).split(packing.rows_at_once)
        return
    own = range(one.shape[0])
    if one.share is not None and not by_columns:
        own = range(one.share.own.start, one.share.own.stop)
    for start in own[:: packing.rows_at_once]:
        rows = slice(start, min(start + packing.rows_at_once, own.stop))
        if packing.stretches == "stored":
            yield checkpoint.stored_bytes(one.key).view(one.shape[0], -1)[rows]
        elif packing.stretches == "values":
            yield checkpoint.read(one.key, rows)
        else:
            groups = checkpoint.read_groups(one.key, rows)
            yield groups.part(1, one.share.own) if one.share is not None and by_columns else groups
        checkpoint.release(one.key)     # so that a large tensor is never mapped whole


def read_piece(checkpoint: Checkpoint, one: Wanted, device: torch.device) -> Tensor:
    """The values of one parameter, on the device, in its dtype, and in memory that is nobody else's."""
    piece = read_index(checkpoint, one)
    if not checkpoint.mapped and one.index == () and one.share is None and piece.dtype == one.dtype:
        return piece.to(device)  # what was read is already a tensor of its own
    return piece.to(device, one.dtype, copy=True, memory_format=torch.contiguous_format)


def put(model: nn.Module, one: Wanted, value: Tensor) -> None:
    """Set `value` in the model under each of its names, as one object."""
    if isinstance(one.target, nn.Parameter):
        value = nn.Parameter(value, requires_grad=one.target.requires_grad)
    for name in one.names:
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, value)
