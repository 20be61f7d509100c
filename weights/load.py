"""Loading: fill a model built on the meta device with the tensors of a checkpoint, and account for every key."""

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
from weights.memory import keep_freed, require_memory

# For each parameter, the checkpoint key that holds it and an index into that tensor (() is the whole tensor).
Locate = Callable[[list[str], list[str]], dict[str, tuple[str, tuple[Any, ...]]]]

NAMES_SHOWN = 10

# Keys left over from training, unused in every family: buffers that follow from the config, and the value head of
# reinforcement learning. transformers ignores them as well.
NEVER_NEEDED = (
    r"(.*\.)?rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)", r"(.*\.)?position_ids", r"(.*\.)?masked_bias",
    r"(pretrained_model\.)?v_head\..*",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Conversion of a parameter that is not stored as it is read.

    make          converts successive blocks of its rows. Several threads convert different parameters
    put           puts the result into the model
    stretches     kind of a block: "values", a tensor of plain numbers (possibly a view of the file); "groups", the
                  checkpoint's Groups; "stored", uint8 [rows, bytes] as in the file
    rows_at_once  rows of a block
    held_bytes    memory of the result, in bytes
    """

    make: Callable[[Iterator[Any]], Any]
    put: Callable[[Any], None]
    stretches: Literal["values", "groups", "stored"]
    rows_at_once: int
    held_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of a tensor that this rank holds: some of its rows (dim 0) or columns (dim 1).

    whole  size of this dimension on all ranks together
    """

    dim: int
    own: slice
    whole: int

    def of(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """Turn an index of the whole in a checkpoint's tensor (integers, then slices) into an index of the part."""
        entries = list(index)
        while sum(isinstance(entry, slice) for entry in entries) <= self.dim:
            entries.append(slice(None))
        place = [number for number, entry in enumerate(entries) if isinstance(entry, slice)][self.dim]
        first = entries[place].start or 0
        entries[place] = slice(first + self.own.start, first + self.own.stop)
        return tuple(entries)


# Returns the conversion of a parameter, given its key and its entry; None: it is stored unchanged.
Pack = Callable[[Tensor, str, TensorEntry], Packing | None]


@dataclass(frozen=True)
class Wanted:
    """One parameter or persistent buffer of the model, all its names (if tied), and the source of its values."""

    names: list[str]
    target: Tensor
    key: str
    index: tuple[Any, ...]
    dtype: torch.dtype  # in memory
    packing: Packing | None = None
    share: Share | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, also if this rank holds a share of it."""
        shape = list(self.target.shape)
        if self.share is not None:
            shape[self.share.dim] = self.share.whole
        return tuple(shape)

    @property
    def held_bytes(self) -> int:
        """Memory that it takes, in bytes."""
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
    """Set every parameter and persistent buffer of `model` to its values from `checkpoint`.

    dtype     of floating-point tensors in memory; integer buffers keep theirs
    locate    maps the names of the parameters and the checkpoint's keys to {parameter: (key, index)}. A parameter
              that it omits has its own name as key. Several parameters may be pieces of one key; together they must
              use all of it
    ignored   regular expressions of whole checkpoint keys that may be present and are not needed
    progress  show a bar on stderr
    pack      decides which parameters are packed
    shares    parameters of which this rank holds a part, by name

    Tied parameters (one object under several names) are read once and stay tied; all but one of their names may be
    absent. Raises InputError before any allocation if keys are missing, unexpected or of another shape (all in one
    line), or if the weights do not fit into memory. Peak memory is that of the weights plus the checkpoint's largest
    tensor.
    """
    wanted = find_all(model, checkpoint, dtype, locate, ignored, pack, shares)
    needed = sum(one.held_bytes for one in wanted)
    require_memory(needed, device, f"{checkpoint.path} in {str(dtype).removeprefix('torch.')}")

    by_key: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_key.setdefault(one.key, []).append(one)

    def read_all(key: str) -> list[tuple[Wanted, Any]]:
        """Read all parameters of a key, in the form that the model holds."""
        read = [(one, read_one(checkpoint, one, device)) for one in by_key[key]]
        checkpoint.release(key)
        return read

    # One tensor per thread, instead of all threads in each operation: threads that wait for each other are far slower
    # if the cores have other work.
    threads = torch.get_num_threads()
    # In file order, so that a disk reads forwards, but the largest first: at the end it would occupy only one thread.
    keys = [key for key in checkpoint.entries if key in by_key]
    largest = max(keys, key=lambda key: checkpoint.entries[key].elements, default="")
    keys.sort(key=lambda key: key != largest)
    keep_freed()
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
    """Find the source of every tensor of `model` without reading any. Arguments as for load_weights."""
    names = list(model.state_dict())
    located: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name in names}
    if locate is not None:
        located |= locate(names, list(checkpoint.entries))
    wanted = find_sources(model, located, checkpoint, dtype, pack, shares or {})
    check_keys(checkpoint, wanted, {key for key, _ in located.values()}, list(ignored))
    return wanted


def told_apart(model: nn.Module, checkpoint: Checkpoint, locate: Locate | None = None) -> list[str]:
    """Return keys of one tied tensor under which the file stores different values, or [] if there are none."""
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
    """Raise InputError for a config larger than its checkpoint, before the model is built.

    sides   numbers that are each a dimension of a tensor
    blocks  layers and experts, each with its own matrices (or its own index in a tensor of three dimensions)
    """
    shapes = [entry.shape for entry in checkpoint.entries.values()]
    longest = max((side for shape in shapes for side in shape), default=0)
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes if len(shape) > 1)
    if (largest := max(sides)) > longest:
        raise InputError(
            f"{checkpoint.path}: its config has a size of {largest}, but no tensor has one above {longest}"
        )
    if blocks > matrices:
        raise InputError(
            f"{checkpoint.path}: its config has {blocks} layers and experts, but there are only {matrices} matrices"
        )


def find_sources(
    model: nn.Module, located: dict[str, tuple[str, tuple[Any, ...]]], checkpoint: Checkpoint, dtype: torch.dtype,
    pack: Pack | None, shares: Mapping[str, Share],
) -> list[Wanted]:
    """Return one item per tensor object of the model. A tied tensor has the first of its names that the file holds."""
    targets = model.state_dict(keep_vars=True)  # the objects themselves: tied names share one object
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
    """Raise InputError with all missing, unexpected and mis-shaped keys in one line, at most ten of them by name."""
    missing = [one.key for one in wanted if one.key not in checkpoint.entries]
    unexpected = [
        key
        for key in checkpoint.entries
        if key not in known and not any(re.fullmatch(pattern, key) for pattern in (*ignored, *NEVER_NEEDED))
        and not adds_nothing(checkpoint, key, known)
    ]
    misshaped = []
    used: dict[str, int] = {}  # elements of a key that its pieces use
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
    """Return True for a bias of zeros beside a matrix of the model: AutoGPTQ wrote one for every matrix until 2023."""
    matrix = key.removesuffix("bias") + "weight"
    return key.endswith(".bias") and matrix in known and not checkpoint.read(key).any()


def piece_shape(entry: TensorEntry, index: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Return the shape at `index` of a tensor with this entry's shape, or None for an invalid index."""
    try:
        return tuple(torch.empty(entry.shape, device="meta")[index].shape) if index else entry.shape
    except (IndexError, RuntimeError):
        return None


def read_index(checkpoint: Checkpoint, one: Wanted) -> Tensor:
    """Read the values of one parameter in the checkpoint's form, and no rows beyond its share."""
    if one.share is not None and one.share.dim == 0 and one.index == ():
        return checkpoint.read(one.key, one.share.own)
    return checkpoint.read(one.key)[one.index if one.share is None else one.share.of(one.index)]


def read_one(checkpoint: Checkpoint, one: Wanted, device: torch.device) -> Any:
    """Read one parameter and convert it if it is packed."""
    if one.packing is None:
        return read_piece(checkpoint, one, device)
    return one.packing.make(read_stretches(checkpoint, one, one.packing))


def read_stretches(checkpoint: Checkpoint, one: Wanted, packing: Packing) -> Iterator[Any]:
    """Yield one parameter block by block."""
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
        checkpoint.release(one.key)     # a large tensor is never mapped as a whole


def read_piece(checkpoint: Checkpoint, one: Wanted, device: torch.device) -> Tensor:
    """Return the values of one parameter on the device, in its dtype, in memory of their own."""
    piece = read_index(checkpoint, one)
    if not checkpoint.mapped and one.index == () and one.share is None and piece.dtype == one.dtype:
        return piece.to(device)  # `read` has returned a copy
    return piece.to(device, one.dtype, copy=True, memory_format=torch.contiguous_format)


def put(model: nn.Module, one: Wanted, value: Tensor) -> None:
    """Set `value` in the model under each of its names, as one object."""
    if isinstance(one.target, nn.Parameter):
        value = nn.Parameter(value, requires_grad=one.target.requires_grad)
    for name in one.names:
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, value)
