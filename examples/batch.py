"""Generate for several prompts at once: python examples/batch.py [CHECKPOINT [PROMPT ...]]

One partition of the channels serves the whole batch. Prompts of different lengths are padded on the left.
"""

import sys

import popengine

checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
prompts = sys.argv[2:] or ["Name three trees.", "Why is the sky blue?", "What is a prime number?"]

engine = popengine.load(checkpoint)
answers = engine.generate(prompts, max_new_tokens=32, temperature=0.7, top_p=0.9, seed=0, logprobs=True)
for prompt, answer in zip(prompts, answers, strict=True):
    assert answer.logprobs is not None
    mean = sum(answer.logprobs) / len(answer.logprobs)
    print(f"{prompt}\n  {answer.text}\n  ({answer.finish_reason}, mean log-probability {mean:.2f})")
