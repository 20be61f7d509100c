"""Measure the cost of a picture before the first token: the vision towers of Qwen's models, with random weights.

    python tools/measure_towers.py SHAPE... [WIDTHxHEIGHT...]

Prints tokens and the median of five times for each released shape (popengine.bench --shape) and size of a picture.
"""

import sys
import time
from statistics import median

import torch
from PIL import Image

from models.families.qwen2_vl import Qwen2VLForConditionalGeneration
from models.registry import architecture
from popengine.benchmark.shapes import SHAPES
from popengine.images.patches import parse_patch_processing
from weights.json_files import JsonObject

SIZES = ("224x224", "448x448", "640x480", "1280x960")


@torch.inference_mode()
def main() -> None:
    sizes = [argument for argument in sys.argv[1:] if argument[0].isdigit()] or SIZES
    shapes = [argument for argument in sys.argv[1:] if argument in SHAPES]
    if not shapes:
        raise SystemExit(__doc__)
    print("| shape | picture | tokens | prepared, ms | encoded, ms |\n|---|---|---|---|---|")
    for shape in shapes:
        with torch.device("meta"):
            model = architecture(SHAPES[shape], shape).from_config(SHAPES[shape])
        assert isinstance(model, Qwen2VLForConditionalGeneration)
        frequencies = model.visual.frequencies
        tower = model.visual.to_empty(device="cpu").bfloat16()
        tower.frequencies = frequencies
        for parameter in tower.parameters():
            parameter.normal_(std=0.02)
        patch = JsonObject({"patch_size": tower.config.patch_size, "max_pixels": 2**24}, shape)
        processing = parse_patch_processing(patch)
        for size in sizes:
            width, height = map(int, size.split("x"))
            picture, grid = Image.effect_noise((width, height), 50).convert("RGB"), processing.grid(height, width)
            prepared, encoded = [], []
            for _ in range(5):
                began = time.perf_counter()
                patches = processing.pixel_values(picture)
                between = time.perf_counter()
                tower(patches, [grid])
                prepared.append(1000 * (between - began))
                encoded.append(1000 * (time.perf_counter() - between))
            figures = f"{grid[0] * grid[1]} | {median(prepared):.0f} | {median(encoded):.0f}"
            print(f"| {shape} | {width} x {height} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
