"""What transformers computes from a .gguf file, in a process of its own: it takes 9 GB for a file of 1.1 GB.

    python transformers_reference.py FILE.gguf TEXT.txt ENGINE.safetensors OUT.safetensors

Transformers dequantises the file itself and runs in float32. ENGINE holds `tokens` [T], `prompt` [P] and `greedy` [N],
the tokens that greedy steps of the engine added to the prompt. OUT gets
    ids       [S]      int64    the whole text by transformers' own tokenizer for the file
    logits    [T, V]   float32  after each of `tokens`
    greedy    [N]      int64    the likeliest token after the prompt and each of the engine's tokens but the last: as
                                long as the engine's tokens equal these, they are transformers' own greedy tokens
"""

import functools
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Transformers parses the file's header once for each of the config, the tokenizer and the weights: 5 to 10 s a time.
gguf.GGUFReader = functools.cache(gguf.GGUFReader)


@torch.inference_mode()
def main(file: Path, text: Path, engine: Path, out: Path) -> None:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    ids = AutoTokenizer.from_pretrained(**where)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    given = load_file(engine)
    logits = model(given["tokens"][None]).logits[0]                                         # [T, V]
    continued = torch.cat([given["prompt"], given["greedy"][:-1]])                          # [P + N - 1]
    greedy = model(continued[None], logits_to_keep=len(given["greedy"])).logits[0].argmax(-1)       # [N]
    save_file({"ids": ids, "logits": logits, "greedy": greedy}, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
