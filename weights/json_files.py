"""JSON files of a checkpoint, read within bounds and field by field, each with its expected type.

No field is trusted: a field of another type, or out of bounds, raises an InputError that names the file, the field,
the expected value and the value found.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weights.errors import InputError, one_line
from weights.mapped_file import read_bytes

# In bytes: far above any real file (an index of 130,000 tensors has 13 MB), and harmless to memory.
LARGEST_JSON = 16_000_000
# Sizes and indices fit into 32 bits everywhere, and factors into float32.
LARGEST_INTEGER, LARGEST_NUMBER, SMALLEST_NUMBER = 2**31, 1e30, 1e-30


def read_json(path: Path, optional: bool = False, surrogates_allowed: bool = False) -> dict[str, Any]:
    """Read the object in a JSON file, or raise InputError. optional: return {} if there is no such file"""
    if optional and not path.exists():
        return {}
    return parse_json(read_bytes(path, LARGEST_JSON), str(path), surrogates_allowed=surrogates_allowed)


def parse_json(
    data: bytes, where: str, repeats_allowed: bool = True, surrogates_allowed: bool = False
) -> dict[str, Any]:
    """Parse JSON text whose top level is an object. Raises InputError with a message that begins with `where`.

    surrogates_allowed  for our own files with file names, whose bytes may not be UTF-8
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=None if repeats_allowed else object_without_repeats)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} is not valid JSON: {error.msg} ({place}){lfs_hint(data)}") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, endless nesting
        raise InputError(f"{where} is not usable JSON: {error}") from error
    if not surrogates_allowed and b"\\ud" in data.lower():       # halves of characters, invalid alone
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} has a lone surrogate, {error.object[error.start]!a}, which is no text") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object, but {type(value).__name__}")
    return value


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises ValueError if a key occurs twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


def lfs_hint(data: bytes) -> str:
    """Return advice if the data is a Git LFS pointer, the most common wrong content, else an empty string."""
    is_pointer = data.startswith(b"version https://git-lfs")
    return "; it is a Git LFS pointer, fetch the file itself with `git lfs pull`" if is_pointer else ""


def shown(value: Any) -> str:
    """Format a value from a file for an error message, never at length."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return one_line(repr(value), 100)


class JsonObject:
    """An object of a JSON file. A field that is absent or null has the getter's default.

    raw    the object; where: its name in messages; read: names of the fields requested so far
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field unchecked, of any type."""
        self.read.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def wrong(self, name: str, wanted: str, value: Any) -> InputError:
        return InputError(f"{self.where}: {name} must be {wanted}, not {shown(value)}")

    def integer(self, name: str, default: int | None, least: int = 1, most: int = LARGEST_INTEGER) -> int:
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"an integer of at least {least} and at most {most}", value)
        return value

    def integers(self, name: str, default: Iterable[int]) -> list[int]:
        """Return a list of integers; a single one becomes a list."""
        value = self.get(name, list(default))
        value = value if isinstance(value, list) else [value]
        if not all(type(one) is int and abs(one) <= LARGEST_INTEGER for one in value):
            raise self.wrong(name, "an integer or a list of integers", value)
        return value

    def number(self, name: str, default: float | None, positive: bool = True) -> float:
        return self._number(name, self.get(name, default), positive)

    def numbers(self, name: str, default: Iterable[float], positive: bool = True) -> tuple[float, ...]:
        """Return a tuple of numbers; a single one becomes a tuple."""
        value = self.get(name, list(default))
        return tuple(self._number(name, one, positive) for one in (value if isinstance(value, list) else [value]))

    def _number(self, name: str, value: Any, positive: bool) -> float:
        number = type(value) in (int, float)
        if not number or not (SMALLEST_NUMBER if positive else -LARGEST_NUMBER) <= value <= LARGEST_NUMBER:
            raise self.wrong(name, f"a {'positive ' if positive else ''}number", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None, choices: Iterable[str] = ()) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a text", value)
        if choices and value not in choices:
            raise InputError(f"{self.where}: {name} {shown(value)} is not one of {', '.join(choices)}")
        return value

    def section(self, name: str) -> "JsonObject":
        """Return a nested object, empty if it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return type(self)(value, f"{self.where}: {name}")
