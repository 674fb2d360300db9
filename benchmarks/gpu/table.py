"""What a GPU run shows: a table of each cell as it is measured, and one of all cells for the README."""

from typing import Any

Record = dict[str, Any]
COLUMNS = (
    "shape", "T", "routing, us", "of floor", "product, us", "product, top-k / routing", "training forward, us",
    "of floor", "step, us", "eager step / step", "step / compiled learned",
)  # fmt: skip


def near_ties(checks: Record) -> str:
    """What a cell that is right has to say of its routing."""
    near = checks["training routing"]
    return f"right, {near['near_ties']} near-ties, largest score error {near['max_score_error']:.1e}"


def cell_table(r: Record) -> str:
    """A cell in plain text; wrong timings are marked."""
    if "skipped" in r:
        return f"skipped: {r['skipped']}"
    wrong = [f"  WRONG {check}: {found['message']}" for check, found in r["checks"].items() if not found["ok"]]
    lines = [
        "WRONG, timed all the same" if wrong else near_ties(r["checks"]),
        *wrong,
        f"  {'part':<17}{'contestant':<30}{'median us':>11}{'quartiles':>24}{'GB/s':>8}{'% copy':>8}{'% floor':>13}"
        f"{'peak MiB':>10}{'back to back':>14}  method",
    ]
    for part, contestants in r["parts"].items():
        for who, t in contestants.items():
            if "skipped" in t:
                lines.append(f"  {part:<17}{who:<30}skipped: {t['skipped']}")
                continue
            floor = f"{t['percent_of_floor']:.0f} {r['floors'][part]['largest']}" if "percent_of_floor" in t else ""
            rate, copy = (f"{t[key]:.{n}f}" if key in t else "" for key, n in (("gb_per_s", 0), ("percent_of_copy", 1)))
            peak = "" if t["peak_bytes"] is None else f"{t['peak_bytes'] / 2**20:.0f}"
            warm = f"{t['back_to_back_us']:.1f}" if "back_to_back_us" in t else ""
            notes = [
                t["method"],
                *([t["note"]] if "note" in t else []),
                *([f"WRONG: {t['wrong']}"] if "wrong" in t else []),
            ]
            quartiles = f"{t['q1_us']:.1f} .. {t['q3_us']:.1f}"
            lines.append(
                f"  {part:<17}{who:<30}{t['median_us']:>11.1f}{quartiles:>24}{rate:>8}{copy:>8}{floor:>13}{peak:>10}"
                f"{warm:>14}  {', '.join(notes)}"
            )
    return "\n".join(lines)


def readme_table(records: list[Record]) -> str:
    """Markdown: medians of this package, percent of the floor, and ratios; of a cell that was timed twice the last.

    A step is forward, backward and commit; the learned router's is its compiled forward and backward.
    """
    header = next(r for r in records if r["kind"] == "header")
    peaks = next((r for r in reversed(records) if r["kind"] == "peaks"), {})
    end = records[-1] if records[-1]["kind"] == "end" else {"left": ["what comes after it, for it has not ended"]}
    cells = {(r["shape"], r["num_tokens"]): r for r in records if r["kind"] == "cell"}
    rows = [_row(r) for r in cells.values()]
    shown = [i for i in range(len(COLUMNS)) if i < 9 or any(row[i] != "n/a" for row in rows)]
    lines = [_sentence(header, peaks), "", f"| {' | '.join(COLUMNS[i] for i in shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(row[i] for i in shown)} |" for row in rows]
    best = _best_configs(records)
    if best:
        lines += ["", *best]
    if end["left"]:
        lines += ["", f"Not measured in this run: {'; '.join(end['left'])}."]
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
    name = [r["shape"], f"{r['num_tokens']}{'' if r.get('correct', True) else ' (wrong)'}"]
    if not r.get("parts"):
        return [*name, "skipped", *["n/a"] * (len(COLUMNS) - 3)]
    routing, forward, step = (_timing(r, part, "kmeans_route") for part in ("eval", "forward", "step"))
    return [
        *name,
        *_time_and_floor(routing),
        _time_and_floor(_timing(r, "eval", "product"))[0],
        _ratio(_timing(r, "eval", "product, top-k"), routing),
        *_time_and_floor(forward),
        _time_and_floor(step)[0],
        _ratio(_timing(r, "step", "eager"), step),
        _ratio(step, _timing(r, "step", "learned compiled")),
    ]


def _timing(r: Record, part: str, contestant: str) -> Record:
    return r["parts"].get(part, {}).get(contestant, {})


def _time_and_floor(timing: Record) -> list[str]:
    if "median_us" not in timing:
        return ["n/a", "n/a"]
    wrong = " (wrong)" if "wrong" in timing else ""
    return [f"{timing['median_us']:.1f}{wrong}", f"{timing.get('percent_of_floor', 0):.0f}%"]


def _ratio(one: Record, other: Record) -> str:
    if "median_us" not in one or "median_us" not in other:
        return "n/a"
    return f"{one['median_us'] / other['median_us']:.2f}"


def _best_configs(records: list[Record]) -> list[str]:
    """A sentence for each kernel and cell whose table configuration another right one beat."""
    trials: dict[tuple[str, str, int], list[Record]] = {}
    for r in records:
        if r["kind"] == "config" and "median_us" in r and "wrong" not in r:
            trials.setdefault((r["kernel"], r["shape"], r["num_tokens"]), []).append(r)
    lines = []
    for (kernel, shape, num_tokens), some in trials.items():
        own, best = next((r for r in some if r["config"] is None), None), min(some, key=lambda r: r["median_us"])
        if own is not None and best is not own:
            lines.append(
                f"{kernel}, {shape}, T={num_tokens}: {best['config']} takes {best['median_us']:.1f} us, the table's "
                f"configuration {own['median_us']:.1f} us."
            )
    return lines
