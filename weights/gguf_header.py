"""The header of a .gguf file: metadata as a dict, and the position of each tensor.

The layout (version 2 and 3, little-endian): "GGUF", version u32, tensor count u64, metadata count u64, the metadata as
(key, type u32, value), the tensors as (name, number of dimensions u32, dimensions u64 each, fastest first, type u32,
offset u64), then, aligned, the tensors' bytes. A string is a length u64 and UTF-8; an array is a type u32, a count u64
and its items.

The gguf package's reader is not used: it makes a Python object of every number and trusts every count, so that 20
corrupt bytes can keep it busy for ever. Here a count is accepted only if the file is long enough to hold that many
items.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.errors import InputError
from weights.mapped_file import MappedFile

STRING, ARRAY = 8, 9
# The struct code of every other type of value.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
LENGTH = struct.Struct("<Q")    # of a string

# Far above any real file; these bounds limit the memory that a hostile file can take.
MOST_ENTRIES = 1_000_000
MOST_STRINGS = 10_000_000
MOST_DIMENSIONS = 4


class Metadata:
    """The metadata of a .gguf file.

    A getter raises InputError if the key has another type. If the key is absent, the getter returns `default`; without
    a default it raises InputError.

    prefix  start of every key in the file, omitted in calls
    """

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def under(self, name: str) -> "Metadata":
        """Return the keys that begin with `name` and a dot."""
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}
        return Metadata(own, self.path, prefix)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def _get(self, key: str, kind: type, kind_name: str, default: Any) -> Any:
        if key not in self.values and default is not None:
            return default
        if key not in self.values:
            raise InputError(f"{self.path} has no {self.prefix}{key} in its metadata")
        value = self.values[key]
        if isinstance(value, memoryview) and kind is not memoryview and len(value) and len(set(value)) == 1:
            value = value[0]  # one value per layer, all equal
        if type(value) is not kind:
            raise InputError(f"{self.path}: {self.prefix}{key} in its metadata is not {kind_name}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, str, "a text", default)

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, bool, "true or false", default)

    def whole(self, key: str, default: int | None = None) -> int:
        return self._get(key, int, "one whole number", default)

    def size(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to 2^31."""
        value = self.whole(key, default)
        if not 1 <= value <= 2**31:
            raise InputError(f"{self.path}: {self.prefix}{key} in its metadata is {value}, which cannot be a size")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._get(key, float, "one number", default)
        if not math.isfinite(value):
            raise InputError(f"{self.path}: {self.prefix}{key} in its metadata is {value}, not a finite number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise InputError(f"{self.path}: {self.prefix}{key} in its metadata is {value}, not a number above zero")
        return value

    def strings(self, key: str) -> list[str]:
        return self._get(key, list, "a list of texts", None)

    def numbers(self, key: str) -> memoryview:
        return self._get(key, memoryview, "a list of numbers", None)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the file describes it: shape in PyTorch's order, type number of ggml, offset into the data."""

    shape: tuple[int, ...]
    type_number: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a file."""

    metadata: Metadata
    tensors: dict[str, GGUFTensor]
    data_start: int  # bytes from the start of the file


class Cursor:
    """A reader that goes from the front of the file to its end and never beyond."""

    def __init__(self, file: MappedFile, path: Path) -> None:
        self.data = file.data
        self.size = file.size
        self.path = path
        self.position = 0

    def advance(self, count: int) -> int:
        """Advance by `count` bytes and return the position of the first."""
        begin = self.position
        if count > self.size - begin:
            raise InputError(f"{self.path} is truncated or corrupt: {count} bytes are needed at {begin} of {self.size}")
        self.position = begin + count
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.advance(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        (length,) = LENGTH.unpack_from(self.data, self.advance(LENGTH.size))
        begin = self.advance(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is corrupt: the text at byte {begin} is not UTF-8") from error

    def strings(self, count: int) -> list[str]:
        """Read many strings, in a loop without calls: vocabularies and merges have 300,000."""
        texts, data, size, position, unpack = [], self.data, self.size, self.position, LENGTH.unpack_from
        try:
            for _ in range(count):
                begin = position + LENGTH.size
                end = begin + unpack(data, position)[0]
                if end > size:
                    raise struct.error
                texts.append(str(data[begin:end], "utf-8"))
                position = end
        except (struct.error, UnicodeDecodeError):
            self.position = position
            self.string()       # says what is wrong
            raise
        self.position = position
        return texts

    def value(self, kind: int) -> Any:
        """Read a metadata value; an array of numbers as a memoryview, an array of strings as a list."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise InputError(f"{self.path} is corrupt: metadata of the unknown type {kind} at byte {self.position}")
        item_kind, count = self.number("I"), self.number("Q")
        if item_kind in SCALARS:
            code = SCALARS[item_kind]
            size = struct.calcsize(code) * count
            begin = self.advance(size)
            return memoryview(self.data)[begin : begin + size].cast(code)  # type: ignore[call-overload]
        if item_kind == STRING:
            if count > min(MOST_STRINGS, (self.size - self.position) // 8):  # each has a length of 8 bytes
                raise InputError(f"{self.path} is truncated or corrupt: an array of {count} strings at {self.position}")
            return self.strings(count)
        raise InputError(f"{self.path}: an array of type {item_kind} in the metadata at byte {self.position}")


def read_header(file: MappedFile, path: Path) -> GGUFHeader:
    """Read the header of a mapped .gguf file. Raises InputError for another format or inconsistent contents."""
    cursor = Cursor(file, path)
    if file.data[:4] != b"GGUF":
        raise InputError(f"{path} is not a .gguf file: it does not begin with the letters GGUF")
    cursor.advance(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise InputError(f"{path} has version {version} of the .gguf format; versions 2 and 3 (little-endian) are read")
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, metadata_count) > MOST_ENTRIES:
        raise InputError(f"{path} is corrupt: it claims {tensor_count} tensors and {metadata_count} metadata keys")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise InputError(f"{path} is corrupt: the metadata key {key} is given twice")
        metadata[key] = cursor.value(cursor.number("I"))

    tensors: dict[str, GGUFTensor] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.number("I")
        if name in tensors or not 1 <= dimensions <= MOST_DIMENSIONS:
            what = "is given twice" if name in tensors else f"has {dimensions} dimensions"
            raise InputError(f"{path} is corrupt: the tensor {name} {what}")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        tensors[name] = GGUFTensor(shape, type_number=cursor.number("I"), offset=cursor.number("Q"))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(f"{path} is corrupt: general.alignment is {alignment}, not a power of two")
    return GGUFHeader(Metadata(metadata, path), tensors, data_start=-(-cursor.position // alignment) * alignment)
