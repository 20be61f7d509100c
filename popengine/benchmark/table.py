"""The tables of a benchmark, as text."""

from typing import Any


def describe(result: dict[str, Any], summed_bytes: int) -> str:
    """Write the tables of all dtypes as text."""
    what = "random weights of the shape " if result["random_weights"] else ""
    shared = f", over {result['ranks']} ranks: bytes and memory are the first one's" if result["ranks"] > 1 else ""
    least = result["pruning"]["min_evidence"]
    waits = f"; steps run dense until {least} tokens were seen" if least else ""
    lines = [
        *heading(result),
        f"model     {what}{result['model']} on {result['device']}{shared}, batch {result['batch']}, "
        f"{result['prompt_tokens']} prompt tokens and {result['new_tokens']} new ones",
        f"pruning   width {result['pruning']['candidate_width']:g} under rules that have one" + waits,
        f"measured  {result['rounds']} rounds in turns, {result['threads']} threads for every engine; medians, and in "
        "brackets the quartiles",
    ]
    for group in result["dtypes"]:
        lines += ["", *describe_dtype(group, result["threads"], summed_bytes)]
    return "\n".join(lines)


def heading(result: dict[str, Any]) -> list[str]:
    """Write machine, versions and command, as lines."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in result["versions"].items())
    where = machine["card"] or f"{machine['processor']}, {machine['cores']} cores"
    return [
        f"machine   {where}; {machine['system']}",
        f"versions  {versions}",
        f"command   {' '.join(result['command'])}",
    ]


def describe_dtype(group: dict[str, Any], threads: int, summed_bytes: int) -> list[str]:
    """Write the tables of one dtype, as lines."""
    reads = group["bandwidth_gb_per_s"]
    others = [line["engine"] for line in group["rows"] if line["mode"] is None]
    shared_out = any(line["between_ranks"] is not None for line in group["rows"])
    times, costs = [], []
    compared = (("step", "step_time_over"), ("prompt", "prefill_time_over"), ("answer", "answer_time_over"))
    ratios = [["time over that of", *(f"{other}: {what}" for what, _ in compared for other in others)]]
    for line in group["rows"]:
        decode = line["decode_ms_per_token"]
        times.append([
            line["engine"],
            with_spread(line["prefill_ms"], 0),
            number(line["partition_ms"], 1),
            *(number(line[part], 1) for part in ("scores_ms", "sort_ms", "copy_ms")),
            with_spread(decode, 1),
            number(line["answer_s"], 2),
            *(["-" if line["between_ranks"] is None else f"{line['between_ranks']:.0%}"] if shared_out else []),
        ])
        if others and line["mode"] is not None:
            ratios.append([
                line["engine"],
                *(number(line[figure][other], 2) for _, figure in compared for other in others),
            ])
        costs.append([
            line["engine"],
            number(line["weight_bytes_per_token"] / 1e6, 0),
            number(line["gb_per_s"], 1),
            f"{line['bandwidth_share']:.0%}",
            number(line["speedup"], 2),
            number(line["ideal_speedup"], 2),
            number(line["break_even_tokens"], 0),
            number(None if line["peak_memory_bytes"] is None else line["peak_memory_bytes"] / 1e6, 0),
            number(line["load_s"], 1),
            number(line["first_use_s"] or None, 1),
            number(line["tokens_as_first_row"], 0),
        ])
    time_heads = ["", "prefill ms", "partition ms", "scores", "sort", "copy", "decode ms/token", "answer s"]
    time_heads += ["of it between ranks"] if shared_out else []
    cost_heads = [
        "", "MB/token", "GB/s", "of memory", "speed-up", "ideal", "break-even", "peak MB", "load s", "compile s",
        "same tokens",
    ]  # fmt: skip
    lines = [
        f"{group['dtype']}: this memory gives {with_spread(reads, 1)} GB/s (a sum over {summed_bytes >> 20} MiB, "
        f"{threads} threads)",
        *align([time_heads, *times]),
        "",
        *align([cost_heads, *costs]),
    ]
    if any(line["skips"] for line in group["rows"]):
        lines += ["", *align(prompt_table(group["rows"]))]
    if len(ratios) > 1:
        lines += ["", *align(ratios)]
    return lines + [f"absent: {name}: {reason}" for name, reason in group["absent"].items()]


def prompt_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Build the table of prompts against the dense model's: measured and ideal speed-ups."""
    names = ("speedup", "ideal_speedup", "ideal_linear", "ideal_attention")
    table = [["prompt, partition apart", "speed-up", "ideal", "of products with weights", "of attention"]]
    return table + [
        [line["engine"], *(number(line["prompt"][name], 2) for name in names)] for line in rows if line["prompt"]
    ]


def number(value: float | None, digits: int) -> str:
    """Format a number, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_spread(values: dict[str, float], digits: int) -> str:
    """Format a median with its quartiles in brackets."""
    first, third = values["first_quartile"], values["third_quartile"]
    return f"{values['median']:.{digits}f} ({first:.{digits}f}-{third:.{digits}f})"


def align(table: list[list[str]]) -> list[str]:
    """Pad columns to their widest cell; the first column is left-aligned, figures are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        figures = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *figures]))
    return lines
