"""Draw docs/partition.svg: the partition, made once by prefill, and the picks of every decode step.

    python tools/draw_partition.py

The figure uses small numbers: 24 channels, ratio r = 0.375, width 0.25 (15 active, 6 candidates, 3 picked). The
partition is real: scores from a seed go through models.pruning.partition. The picks of the three tokens are random, for
illustration.
"""

from pathlib import Path

import torch

from models.pruning.partition import partition_channels, partition_sizes

CHANNELS, RATIO, WIDTH = 24, 0.375, 0.25
COLOURS = {"retained": "#2a6f97", "candidate": "#e9a23b", "pruned": "#c9ccd1"}
CELL, LEFT, INK, QUIET = 30, 150, "#1b1f24", "#5b6470"


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def cell(column: float, y: float, colour: str, label: str = "", height: int = 26, outline: bool = False) -> str:
    x = LEFT + column * CELL
    fill, stroke = ("#ffffff", colour) if outline else (colour, colour)
    dash = ' stroke-dasharray="3 2"' if outline else ""
    ink = QUIET if outline or colour == COLOURS["pruned"] else "#ffffff" if colour == COLOURS["retained"] else INK
    place = f'x="{x + 1}" y="{y}" width="{CELL - 2}" height="{height}" rx="3"'
    box = f'<rect {place} fill="{fill}" stroke="{stroke}"{dash}/>'
    return box + text(x + CELL / 2, y + height / 2 + 4, label, 11, ink, "middle")


def row_label(y: float, first: str, second: str = "") -> str:
    return text(LEFT - 12, y + 12, first, 13, INK, "end", bold=True) + text(LEFT - 12, y + 27, second, 11, QUIET, "end")


def bracket(start: int, end: int, y: float, words: str, colour: str) -> str:
    left, right = LEFT + start * CELL + 3, LEFT + end * CELL - 3
    line = f'<path d="M{left} {y} v6 H{right} v-6" fill="none" stroke="{colour}" stroke-width="2"/>'
    return line + text((left + right) / 2, y + 22, words, 13, INK, "middle", bold=True)


def draw() -> str:
    torch.manual_seed(5)
    scores = torch.rand(CHANNELS) ** 2 + 0.08
    sizes = partition_sizes(CHANNELS, RATIO, WIDTH)
    partition = partition_channels(scores, sizes)
    region = {int(channel): name for name in COLOURS for channel in getattr(partition, name)}
    parts = [text(24, 34, "Prefill: once per prompt", 17, bold=True)]

    top = 60
    parts.append(row_label(top + 34, "scores", "over the prompt"))
    for channel, score in enumerate(scores.tolist()):
        height = int(58 * score / float(scores.max()))
        parts.append(cell(channel, top + 60 - height, COLOURS[region[channel]], height=height))
        parts.append(text(LEFT + (channel + 0.5) * CELL, top + 76, str(channel), 10, QUIET, "middle"))
    y = top + 104
    parts.append(row_label(y, "partition", "cut by score"))
    for column, channel in enumerate(partition.order.tolist()):
        parts.append(cell(column, y, COLOURS[region[channel]], str(channel)))
    ends = (0, sizes.retained, sizes.active, CHANNELS)
    words = ("retained: always runs", "candidate: asked again", "pruned: never read")
    for start, end, caption, colour in zip(ends, ends[1:], words, COLOURS.values(), strict=False):
        parts.append(bracket(start, end, y + 32, caption, colour))

    y += 100
    parts.append(text(24, y, "Decode: every token", 17, bold=True))
    parts.append(text(LEFT + 100, y, f"reads the {sizes.active} rows that were copied together, keeps the best "
                      f"{sizes.pick} of {sizes.candidate} candidates", 13, QUIET))
    for step in range(3):
        row = y + 18 + step * 34
        parts.append(row_label(row, f"token {step + 1}", ""))
        picked = set(torch.randperm(sizes.candidate)[: sizes.pick].tolist())
        for column, channel in enumerate(partition.active.tolist()):
            lost = column >= sizes.retained and column - sizes.retained not in picked
            parts.append(cell(column, row, COLOURS[region[channel]], str(channel), outline=lost))
    width, height = LEFT + CHANNELS * CELL + 24, y + 18 + 3 * 34 + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img" '
        'aria-label="Channels are partitioned once from the prompt; each decode step re-decides the candidates">'
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>' + "\n".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "docs" / "partition.svg"
    path.write_text(draw(), encoding="utf-8")
    print(f"wrote {path}")
