"""llama.cpp in a process of its own, which answers requests on standard input: the other half of LlamaCppEngine.

llama.cpp configures the AMX tiles once per thread, and PyTorch's products release them on the same thread. In one
process llama.cpp then ends with an illegal instruction. The two take turns, so they never share the cores.

Requests and answers are JSON, one per line. The first line written reports the model, each later one a generation.
"""

import argparse
import importlib
import json
import os
import sys
import time
from typing import Any

import numpy


def main(arguments: list[str] | None = None) -> int:
    """Load the model, and answer requests until the input ends."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("file", help="a .gguf file, the first part of several")
    flags.add_argument("context", type=int, help="tokens")
    flags.add_argument("threads", type=int)
    given = flags.parse_args(arguments)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                                   # whatever the library prints is not an answer

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as error:
        answer({"absent": f"llama-cpp-python is not installed ({error})"})
        return 0
    began = time.perf_counter()
    try:
        model = llama_cpp.Llama(
            given.file, n_ctx=given.context, n_threads=given.threads, n_threads_batch=given.threads, verbose=False
        )
    except (ValueError, RuntimeError) as error:
        answer({"absent": f"it does not load a .gguf of these weights ({error})"})
        return 0
    answer({"load_s": time.perf_counter() - began})
    for line in sys.stdin:
        request = json.loads(line)
        answer(generation(llama_cpp, model, request["prompt"], request["tokens"]))
    return 0


def generation(library: Any, model: Any, prompt: list[int], count: int) -> dict[str, list[Any]]:
    """Generate `count` tokens greedily. Return them and the milliseconds of each; the first includes the prompt."""
    vocabulary = model.n_vocab()
    model.reset()
    tokens: list[int] = []
    times, ids = [], prompt
    for _ in range(count):
        began = time.perf_counter()
        model.eval(ids)
        logits = library.llama_get_logits_ith(model.ctx, -1)
        tokens.append(int(numpy.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax()))
        times.append((time.perf_counter() - began) * 1000)
        ids = tokens[-1:]
    return {"tokens": tokens, "milliseconds": times}


if __name__ == "__main__":
    sys.exit(main())
