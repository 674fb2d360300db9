"""What a GPU run shows: a table of each cell as it is measured, and one of all cells for the README."""

from typing import Any

Record = dict[str, Any]
COLUMNS = (
    "shape", "T", "routing, us", "of floor", "training forward, us", "of floor", "step, us",
    "step / compiled learned", "eager step / step",
)  # fmt: skip


def cell_table(r: Record) -> str:
    """A cell in plain text; without timings where it was wrong or skipped."""
    name = f"\n{r['shape']} T={r['num_tokens']} D={r['hidden_size']} E={r['num_experts']} K={r['top_k']} {r['dtype']}"
    for word in ("skipped", "error"):
        if word in r:
            return f"{name}: {word}: {r[word]}"
    if not r["correct"]:
        wrong = [f"  {check}: {found['message']}" for check, found in r["checks"].items() if not found["ok"]]
        return "\n".join([f"{name}: WRONG, not timed", *wrong])
    near = r["checks"]["training routing"]
    lines = [
        f"{name}: correct, {near['near_ties']} near-ties, largest score error {near['max_score_error']:.1e}",
        f"  {'part':<17}{'contestant':<20}{'median us':>11}{'quartiles':>24}{'GB/s':>8}{'% copy':>8}{'% floor':>13}"
        f"{'peak MiB':>10}{'back to back':>14}  method",
    ]
    for part, contestants in r["parts"].items():
        for who, t in contestants.items():
            if "skipped" in t:
                lines.append(f"  {part:<17}{who:<20}skipped: {t['skipped']}")
                continue
            floor = f"{t['percent_of_floor']:.0f} {r['floors'][part]['largest']}"
            peak = "" if t["peak_bytes"] is None else f"{t['peak_bytes'] / 2**20:.0f}"
            warm = f"{t['back_to_back_us']:.1f}" if "back_to_back_us" in t else ""
            notes = f"{t['method']}{', ' + t['note'] if 'note' in t else ''}"
            quartiles = f"{t['q1_us']:.1f} .. {t['q3_us']:.1f}"
            lines.append(
                f"  {part:<17}{who:<20}{t['median_us']:>11.1f}{quartiles:>24}{t['gb_per_s']:>8.0f}"
                f"{t['percent_of_copy']:>8.1f}{floor:>13}{peak:>10}{warm:>14}  {notes}"
            )
    return "\n".join(lines)


def readme_table(records: list[Record]) -> str:
    """Markdown: medians of this package, percent of the largest floor, and ratios of whole steps.

    A step is forward, backward and commit; the learned router's is its compiled forward and backward.
    """
    header = next(r for r in records if r["kind"] == "header")
    peaks = next((r for r in records if r["kind"] == "peaks"), {})
    end = next((r for r in records if r["kind"] == "end"), {"left": []})
    lines = [_sentence(header, peaks), "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_row(r))} |" for r in records if r["kind"] == "cell"]
    if end["left"]:
        lines += ["", f"Not measured in this run: {', '.join(end['left'])}."]
    return "\n".join(lines) + "\n"


def _sentence(header: Record, peaks: Record) -> str:
    versions = ", ".join(f"{name} {header[name]}" for name in ("driver", "torch", "triton") if header.get(name))
    commit = f", commit {header['commit'][:10]}" if header.get("commit") else ""
    rates = ""
    if peaks:
        rates = (
            f" Measured in the same run: copy {peaks['copy_bytes_per_s'] / 1e12:.2f} TB/s, reads from L2 "
            f"{peaks['l2_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {peaks['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s."
        )
    return (
        f"{header['device']} ({versions}{commit}, {header['date'][:10]}, `{header['command']}`): medians under CUDA "
        f"graph replay with a cold L2.{rates}"
    )


def _row(r: Record) -> list[str]:
    name = [r["shape"], str(r["num_tokens"])]
    if not r.get("parts"):
        why = "skipped" if "skipped" in r else "wrong, not timed" if r.get("correct") is False else "not timed"
        return [*name, why, *[""] * (len(COLUMNS) - 3)]
    routing, forward, step = (_timing(r, part, "kmeans_route") for part in ("eval", "forward", "step"))
    return [
        *name,
        *_time_and_floor(routing),
        *_time_and_floor(forward),
        _time_and_floor(step)[0],
        _ratio(step, _timing(r, "step", "learned compiled")),
        _ratio(_timing(r, "step", "eager"), step),
    ]


def _timing(r: Record, part: str, contestant: str) -> Record:
    return r["parts"].get(part, {}).get(contestant, {})


def _time_and_floor(timing: Record) -> list[str]:
    if "median_us" not in timing:
        return ["n/a", "n/a"]
    return [f"{timing['median_us']:.1f}", f"{timing['percent_of_floor']:.0f}%"]


def _ratio(one: Record, other: Record) -> str:
    if "median_us" not in one or "median_us" not in other:
        return "n/a"
    return f"{one['median_us'] / other['median_us']:.2f}"
