"""The page of a recorded run: one HTML file with its data, style and script, which fetches nothing."""

import base64
import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

from weights.errors import InputError

PARTS = Path(__file__).parent
MOST_BYTES = 5_000_000


def fitted(found: dict[str, Any]) -> dict[str, Any]:
    """Drop layers, evenly spread, until the page fits MOST_BYTES. Raises InputError if not even one layer fits."""
    layers, room = found["layers"], MOST_BYTES - len(page(found | {"layers": []}).encode())
    weights = [len(json.dumps(packed(layer))) + len(", ") for layer in layers]
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
    tokens, pictures = len(found["frames"]), len(found["pictures"])
    # A second run has other times, and its data compress a little differently.
    fixed, spare = len(page({"layers": []}).encode()), 1.02
    enough = next(
        (count for count in range(tokens - 1, 0, -max(1, tokens // 64))
         if fixed + spare * (len(page(first_tokens(found, count)).encode()) - fixed) <= MOST_BYTES), 0,
    )
    fewer = [f"{enough} of the {tokens} new tokens"] if enough else []
    each = len(packed([found["pictures"], [one for one in found["prompt"] if one["image"]]])) / max(1, pictures)
    if pictures * each > over + each:
        fewer.append(f"{math.floor(pictures - over / each)} of the {pictures} pictures")
    return "at most " + " or ".join(fewer) if fewer else "a shorter prompt or a narrower model"


def first_tokens(found: dict[str, Any], count: int) -> dict[str, Any]:
    """Cut a recorded run after `count` new tokens, and keep only its first layer."""
    layer = found["layers"][0]
    networks = [
        one | {name: cut_masks(one[name], count) for name in ("picked", "wanted")}
        | {name: {at: value for at, value in one[name].items() if int(at) < count}
           for name in ("moved", "changed", "left_out")}
        for one in layer["networks"]
    ]
    answer = found["dense_answer"]
    return found | {
        "frames": found["frames"][:count], "experts": found["experts"][: count - 1],
        "dense_answer": answer | {"tokens": answer["tokens"][:count]}, "layers": [layer | {"networks": networks}],
    }


def cut_masks(masks: dict[str, Any], count: int) -> dict[str, Any]:
    """Keep the masks of frames before `count`."""
    kept = [at for at in masks["frames"] if at < count]
    bits = base64.b64decode(masks["bits"])
    each = len(bits) // max(1, len(masks["frames"]))
    return {"frames": kept, "bits": base64.b64encode(bits[: each * len(kept)]).decode()}


def page(found: dict[str, Any]) -> str:
    """Write the page of a recorded run. Texts of the run are compressed data to the script, so none is markup."""
    template, style, script = ((PARTS / f"explain.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("STYLE_DIGEST", style), ("SCRIPT_DIGEST", script))
    }
    data = json.dumps([packed(found | {"layers": []}), *map(packed, found["layers"])])
    for name, text in {**digests, "STYLE": style, "SCRIPT": script, "DATA": data}.items():
        template = template.replace(f"%{name}%", text, 1)
    return template


def packed(value: Any) -> str:
    """Compress a value: base64 of the zlib stream of its JSON."""
    return base64.b64encode(zlib.compress(json.dumps(value).encode(), 9)).decode()
