"""A conversation of two turns: python examples/chat.py [CHECKPOINT [PICTURE]]

Earlier turns are not computed again. A checkpoint that reads pictures takes one with any turn.
"""

import sys

import popengine

checkpoint = sys.argv[1] if len(sys.argv) > 1 else None
pictures = sys.argv[2:3]

engine = popengine.load(checkpoint)
conversation = engine.chat(max_new_tokens=48)
for said in ("What do you see?" if pictures else "Name three trees.", "Tell me more about the first one."):
    print(f"> {said}")
    for piece in conversation.stream(said, pictures):
        print(piece.text, end="", flush=True)
    print(f"\n  ({piece.statistics.kept_tokens} of {piece.statistics.prompt_tokens} prompt tokens were in the cache)")
    pictures = []
conversation.save("conversation.json")                                      # conversation.load goes on with it
