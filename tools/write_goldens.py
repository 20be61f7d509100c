"""Write tests/goldens/smollm2.safetensors: results of Hugging Face for the default .gguf checkpoint.

    python tools/write_goldens.py

Tests compare popengine with these numbers on a machine without transformers. The slow POP of tests/shared/slow_pop.py
runs on Hugging Face's modules. popengine contributes only the path of the checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from weights.default_checkpoint import DEFAULT_DIRECTORY, FROM_PACKAGE

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS / "shared"))
from slow_pop import SlowPOP  # noqa: E402
from smollm2_text import CHAT_PROMPT, TEXT  # noqa: E402

POP_RUNS = [(ratio, prefill) for ratio in (0.2, 0.4) for prefill in ("pruned", "dense")]
# SmolLM2-135M: H 576, 9 heads of 64, 3 key/value heads, I 1536.
ATTENTION, FFN = 2 * 576 * 64 * (9 + 3), 3 * 576 * 1536


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEFAULT_DIRECTORY, gguf_file=FROM_PACKAGE, dtype=torch.float32).eval()


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_DIRECTORY, gguf_file=FROM_PACKAGE)
    model = load()
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids[:, :256]
    chat = [{"role": "user", "content": CHAT_PROMPT}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)).input_ids
    with torch.inference_mode():
        logits = model(tokens).logits[0]                                            # [256, V]
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
    sampled = torch.linspace(0, logits.shape[-1] - 1, 16).long()
    arrays = {
        "tokens": tokens[0].int(),
        "argmax": logits.argmax(-1).int(),
        "sampled_ids": sampled.int(),
        "sampled_logits": logits[:, sampled],
        "prompt": torch.tensor(prompt).int(),
        "greedy": greedy.int(),
    }
    for ratio, prefill in POP_RUNS:
        slow = SlowPOP(load(), ratio * (ATTENTION + FFN) / FFN, 0.1, prefill)
        arrays[f"pop_{ratio}_{prefill}"] = torch.tensor(slow.generate(prompt, 48)).int()
    path = TESTS / "goldens" / "smollm2.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: array.contiguous() for name, array in arrays.items()}, path)
    print(f"wrote {path.relative_to(TESTS.parent)}, {path.stat().st_size} bytes: prompt of {len(prompt)} tokens")


if __name__ == "__main__":
    main()
