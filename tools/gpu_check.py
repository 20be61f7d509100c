"""Check and time the engine on a GPU, and print one table to paste into docs/measurements/speed.md (`make gpu-check`).

    python tools/gpu_check.py                       # on the first CUDA device; without one, a rehearsal on the CPU
    python tools/gpu_check.py --shape llama-3.1-8b

It first compares tiny random models of every kind with transformers and with the same model on the CPU, in float32.
Then it times random weights of a shape, eager and compiled: dense and POP steps, as a share of the device's memory
bandwidth and beside transformers. The yardstick is gpt-fast's published share of the bandwidth (82 % in bfloat16, 63 %
in int8, 51 % in int4).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from models.cost_model import layer_weights
from popengine.engine.loading import load_model
from popengine.engine.run import next_logits
from popengine.studies.resolve import resolve_study
from popengine.studies.settings import PruningSettings
from weights.checkpoint import open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=6),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48
    ),
}
POP = PruningSettings.paper(ffn_ratio=0.4, candidate_width=0.3, head_ratio=0.5)
PROMPT, STEPS = 20, 12
# Of logits, in float32: the sum of a few thousand products of 24 bits each, over three layers.
TOLERANCE = 1e-4


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--shape", help="of the timed weights (default: llama-3.2-1b; in a rehearsal smollm2-135m)")
    flags.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    given = flags.parse_args()
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    transformers.logging.disable_progress_bar()
    rehearsal = not device.startswith("cuda")
    if rehearsal:
        print(f"There is no CUDA device here: this is a rehearsal on the {device}. Its times say nothing of a GPU.\n")
    failed = [name for name, config in FAMILIES.items() if not check(name, config, torch.device(device))]
    print()
    shape = given.shape or ("smollm2-135m" if rehearsal else "llama-3.2-1b")
    print(table(timed(shape, device, rehearsal)))
    if failed:
        print(f"\nWrong on this device: {', '.join(failed)}. Please report this with the lines above.")
    return 1 if failed else 0


@torch.inference_mode()
def check(name: str, config: PretrainedConfig, device: torch.device) -> bool:
    """One tiny model of a family: dense logits beside transformers', and POP's steps beside the CPU's."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        reference.save_pretrained(folder)
        with open_checkpoint(Path(folder)) as checkpoint:
            models = [load_model(checkpoint, torch.float32, one)[0] for one in (device, torch.device("cpu"))]
    tokens = torch.randint(SIZES["vocab_size"], (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    wanted = reference(tokens).logits
    error = float((models[0](tokens.to(device)).cpu() - wanted).abs().max() / wanted.abs().max())
    steps = []
    for model in models:
        own = tokens.to(model.device)
        state = model.new_state(2, PROMPT + STEPS, resolve_study(POP, layer_weights(model)))
        logits = [model.prefill(model.embed(own[:, :PROMPT]), state)]
        logits += [next_logits(model, own[:, at], state) for at in range(PROMPT, PROMPT + STEPS - 1)]
        steps.append(torch.stack(logits).cpu())
    pruned = float((steps[0] - steps[1]).abs().max() / steps[1].abs().max())
    right = error <= TOLERANCE and pruned <= TOLERANCE
    print(f"{'ok   ' if right else 'WRONG'} {name}: dense {error:.1e} from transformers, POP {pruned:.1e} from the CPU")
    return right


def timed(shape: str, device: str, rehearsal: bool) -> list[dict[str, Any]]:
    """The rows of `popengine.bench`, with the form of the weights in each."""
    found = []
    tokens = ["-p", "32", "-n", "8", "--rounds", "2"] if rehearsal else ["-p", "512", "-n", "64"]
    with tempfile.TemporaryDirectory() as folder:
        for form in ("plain", "int8"):
            out = Path(folder) / f"{form}.json"
            peers = ["--against", "transformers"] if form == "plain" else []
            command = [
                sys.executable, "-m", "popengine.bench", "--shape", shape, "--device", device, "--dtype", "bfloat16",
                "--weights", form, "--prune-ratio", "0", "0.2", "0.4", "--compile", *tokens, *peers, "--json", str(out),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            result = json.loads(out.read_text())
            found += [line | {"form": form, "result": result} for group in result["dtypes"] for line in group["rows"]]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    result = rows[0]["result"]
    about = result["machine"]
    lines = [
        f"{about['card'] or about['processor']}; {result['model']} (random weights), {result['device']}, bfloat16, "
        f"prompt of {result['prompt_tokens']} tokens; `make gpu-check`", "",
        "| engine | weights | ms a step | of bandwidth | over dense | over transformers | memory, MB | compile, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = row["step_time_over"].get("transformers")
        memory, first = row["peak_memory_bytes"], row["first_use_s"]
        lines.append(
            f"| {row['engine']} | {row['form']} | {row['decode_ms_per_token']['median']:.2f} "
            f"| {row['bandwidth_share']:.0%} | {'-' if row['speedup'] is None else format(1 / row['speedup'], '.2f')} "
            f"| {'-' if peer is None else format(peer, '.2f')} | {'-' if memory is None else round(memory / 1e6)} "
            f"| {format(first, '.0f') if first else '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
