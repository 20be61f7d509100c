"""The page of a recorded run: one HTML file with its data, style and script, which fetches nothing."""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from weights.errors import InputError

PARTS = Path(__file__).parent
MOST_BYTES = 5_000_000


def fitted(found: dict[str, Any]) -> dict[str, Any]:
    """Drop layers, evenly spread, until the page fits MOST_BYTES. Raises InputError if not even one layer fits."""
    layers, room = found["layers"], MOST_BYTES - len(page(found | {"layers": []}).encode())
    weights = [len(json.dumps(layer)) + len(", ") for layer in layers]
    for count in range(len(layers), 0, -1):
        chosen = sorted({round(index * (len(layers) - 1) / max(1, count - 1)) for index in range(count)})
        if sum(weights[index] for index in chosen) <= room:
            return found | {"layers": [layers[index] for index in chosen]}
    over = weights[0] - room
    raise InputError(
        f"the page would have {(MOST_BYTES + over) / 1e6:.1f} MB with one layer alone, and {MOST_BYTES / 1e6:g} MB is "
        f"the most: {what_would_fit(found, over)} would fit"
    )


def what_would_fit(found: dict[str, Any], over: int) -> str:
    """Suggest how many new tokens or pictures would fit, for a page of one layer that is `over` bytes too large."""
    steps = [one | {"drawings": []} for one in found["layers"][0]["networks"]]
    of_pictures = [found["pictures"], [one for one in found["prompt"] if one["image"]]]
    tokens, pictures = len(found["frames"]), len(found["pictures"])
    each_token = len(json.dumps([found["frames"], found["experts"], steps])) / tokens
    each_picture = len(json.dumps(of_pictures)) / max(1, pictures)
    fewer = [
        f"{math.floor(count - over / each)} of the {count} {what}"
        for count, each, what in ((tokens, each_token, "new tokens"), (pictures, each_picture, "pictures"))
        if count * each > over + each
    ]
    return "at most " + " or ".join(fewer) if fewer else "a shorter prompt or a narrower model"


def page(found: dict[str, Any]) -> str:
    """Write the page of a recorded run. Texts of the run are data to the script: `<` is escaped, so none is markup."""
    template, style, script = ((PARTS / f"explain.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("STYLE_DIGEST", style), ("SCRIPT_DIGEST", script))
    }
    data = json.dumps(found).replace("<", "\\u003c")
    for name, text in {**digests, "STYLE": style, "SCRIPT": script, "DATA": data}.items():
        template = template.replace(f"%{name}%", text, 1)
    return template
