"""A text of some 270 tokens, written for these tests, and a chat prompt of more than 100."""

TEXT = """The harbour master kept two books. In the first he wrote every ship that came in, with its cargo, its captain
and the hour of its arrival, in a clear round hand that never changed from one year to the next. The second book was
smaller, and nobody but his daughter had ever seen it. There he wrote what the sea had looked like: grey as slate, or
green like old glass, or so still that the lamps of the town seemed to burn under the water.

When the new bridge was opened in 1931, fewer ships came. Some weeks there were only three or four lines to write. The
harbour master did not complain. He walked along the quay at six in the morning, checked the ropes, counted the gulls
and went home to his tea. "A harbour without ships is still a harbour," he told his daughter, "but a town that forgets
its harbour is only a street with a view."

After his death the first book went to the archive, where students use it to work out the price of coal and the routes
of the timber trade. The second book stayed in a kitchen drawer, under the string and the candles, until a storm took
the roof and the rain reached the paper. By then his daughter knew most of it by heart.
"""

CHAT_PROMPT = (
    "I keep a small vegetable garden behind my house. It gets about six hours of sun a day, the soil is heavy "
    "clay, and last summer the tomatoes split, the lettuce went to seed in June and the carrots came out short "
    "and forked. I have a heap of old leaves, two bags of compost and some straw, and I can spend an hour or two "
    "each weekend. I would rather grow a few things well than many things badly. Please explain, step by step, "
    "what I should do this autumn and next spring so that the soil gets lighter and the harvest gets better, and "
    "say which three vegetables you would choose for such a place and why."
)
