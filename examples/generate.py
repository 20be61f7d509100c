"""Generate one answer and see what pruning saved: python examples/generate.py [CHECKPOINT [PROMPT]]"""

import sys

import popengine

checkpoint = sys.argv[1] if len(sys.argv) > 1 else None                     # None: the default checkpoint
prompt = sys.argv[2] if len(sys.argv) > 2 else "Why is the sky blue?"

engine = popengine.load(checkpoint)
print(engine)
for piece in engine.stream(prompt, pruning=0.4, max_new_tokens=64):         # a prune ratio, or PruningSettings(...)
    print(piece.text, end="", flush=True)
print()
statistics = piece.statistics                                               # the last piece brings them
share = statistics.weight_bytes_per_token / statistics.dense_weight_bytes_per_token
print(f"{statistics.decode_tokens_per_s:.1f} tokens/s, {share:.1%} of the dense model's bytes per token")
