"""Pictures, JSON and one self-contained HTML page of a set of runs."""

from __future__ import annotations

import base64
import html
import io
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kmeans_route import viz
from kmeans_route.lm.checkpoint import write_atomically
from kmeans_route.lm.results import (
    QUALITY_PAGE,
    Run,
    conclusion,
    group_by_label,
    is_whitened,
    not_yet_balanced,
    quality_rows,
    quality_title,
    routing_rows,
    table_rows,
    to_json,
    verdicts,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, RESULTS = "report.html", "results.json"
_DOTS_PER_INCH = 150
_CURVE_WINDOW = 20
_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa4af; --page: #0d1117; --line: #3d444d; } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } figcaption, .soft { color: var(--soft); font-size: .9rem; }
img { width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
li.no::marker { content: "no: "; font-weight: bold; } li.yes::marker { content: "yes: "; font-weight: bold; }
ul.checks { padding-left: 3rem; }
"""


class Picture(NamedTuple):
    """A figure of the report: file name without ending, heading, how to read it."""

    name: str
    heading: str
    caption: str
    figure: Figure


def draw(runs: Sequence[Run]) -> list[Picture]:
    """The pictures of at least one run. Curves use every seed, the two matrices each router's first."""
    groups = group_by_label(runs)
    first = {label: group[0] for label, group in groups.items()}
    several = any(len(group) > 1 for group in groups.values())
    other_seed = "" if several or len(groups) == 1 else " Another seed may order the lines otherwise."
    of_seed = f" Seed {runs[0]['config']['seed']}." if several else ""
    max_vio = {
        label: [[statistics.fmean(record["max_vio"]) for record in run["history"]] for run in group]
        for label, group in groups.items()
    }
    loss = {
        label: [[record["loss_bits"] for record in run["history"]] for run in group] for label, group in groups.items()
    }
    whitened = [label for label, run in first.items() if is_whitened(run["config"])]
    less_mean = (
        " Whitened directions all hold the mean of the centroids, which decides no choice, so the mean of all is taken "
        "off first; above a panel of them stands how like an expert is to the one nearest to it. Pale off the diagonal "
        "says that no two directions are alike; how often tokens choose two experts together, the table alone tells."
    )
    less_mean = less_mean if whitened else ""
    return [
        Picture(
            "load",
            "Load by layer and expert",
            "How much of the validation text each expert received, against a fair share of 1: white is fair, orange is "
            "overloaded, purple underused. A router is even where its whole panel is pale. One colour scale for all "
            f"routers.{of_seed}",
            viz.load_heatmap({label: run["layers"]["load"] for label, run in first.items()}),
        ),
        Picture(
            "max_vio",
            "Balance while training",
            "MaxVio of each training batch, mean over the layers: 0 is perfect balance, 1 means that the busiest "
            "expert has twice its share. Lower is better.",
            viz.max_vio_curves(max_vio, window=_CURVE_WINDOW),
        ),
        Picture(
            "loss",
            "Loss while training",
            "Bits needed for the next byte, without auxiliary losses; markers are passes over held-out files. "
            "Lower is better. Below, the same curves minus K-Means': every router reads the same batches, so their "
            f"common noise cancels.{other_seed}",
            viz.loss_curves(loss, _validation_points(groups), window=_CURVE_WINDOW),
        ),
        Picture(
            "directions",
            "Similarity of the experts' directions",
            "Cosine between the directions (K-Means) or router rows (learned) of every two experts in each layer, "
            "experts of like directions side by side. The diagonal is each expert with itself. A block on it that is "
            "as dark as the diagonal is a group of experts that ask for the same tokens, so they act as one; the "
            f"table's effective experts count them as one too.{less_mean}{of_seed}",
            viz.direction_similarity(
                {label: run["layers"]["direction_cosine"] for label, run in first.items()}, less_mean=whitened
            ),
        ),
    ]


def _validation_points(groups: dict[str, list[Run]]) -> dict[str, list[tuple[int, float]]]:
    points = {}
    for label, group in groups.items():
        by_step: dict[int, list[float]] = {}
        for run in group:
            for record in run["history"]:
                if "validation_bits" in record:
                    by_step.setdefault(record["step"], []).append(record["validation_bits"])
        points[label] = [(step, statistics.fmean(bits)) for step, bits in sorted(by_step.items())]
    return points


def write_report(runs: Sequence[Run], folder: Path, *, title: str, environment: dict[str, Any]) -> list[Path]:
    """Write results.json, the pictures and report.html of at least one run, each whole or not at all.

    `title` heads the page, `environment` names versions and machine. Returns: the paths written, the page last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {"title": title, "environment": environment, "runs": list(runs)}
    written = [folder / RESULTS]
    write_atomically(written[0], to_json(results).encode())
    images = []
    for picture in draw(runs):
        written.append(folder / f"{picture.name}.png")
        images.append((picture, write_picture(written[-1], picture.figure)))
    written.append(folder / PAGE)
    study = Path(__file__).resolve().parents[2] / QUALITY_PAGE  # there in a clone alone
    link = os.path.relpath(study, folder.resolve()) if study.exists() else ""
    page = render(runs, images, title=title, environment=environment, quality_page=link)
    write_atomically(written[-1], page.encode())
    return written


def write_picture(path: Path, figure: Figure) -> bytes:
    """Write a figure as PNG, whole or not at all. Returns: the file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()


def render(
    runs: Sequence[Run],
    images: Sequence[tuple[Picture, bytes]],
    *,
    title: str,
    environment: dict[str, Any],
    quality_page: str = "",
) -> str:
    """The page: tables, pictures inside it, and what was run. It loads nothing from anywhere.

    quality_page: where the page of the study lies, seen from this one; "" gives its name alone.
    """
    escape = html.escape
    figures = "".join(
        f"<h2>{escape(picture.heading)}</h2><figure>"
        f"<img alt='{escape(picture.heading)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture, png in images
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{escape(_summary(runs))}</p>{_tables(runs)}{figures}{_closing(runs, quality_page)}"
        f"<h2>What was run</h2><div class='scroll'><table><tbody>{_facts(runs, environment)}</tbody></table></div>"
        "</body></html>\n"
    )


def _tables(runs: Sequence[Run]) -> str:
    """Of routers that took turns, what the run can tell and what it cannot; else all measures."""
    if "time_ratio" not in runs[0]["measures"]:
        return f"{_table(*table_rows(runs))}<p class='soft'>{html.escape(_reading(runs))}</p>"
    return (
        f"<h2>What this run can tell</h2>{_table(*routing_rows(runs))}"
        f"<p class='soft'>{html.escape(_reading(runs))}</p>"
        f"<h2>{html.escape(quality_title(runs))}</h2>{_table(*quality_rows(runs))}{_checks(runs)}"
    )


def _closing(runs: Sequence[Run], page: str) -> str:
    if "time_ratio" not in runs[0]["measures"]:
        return ""
    link = f"<a href='{html.escape(page, quote=True)}'>{QUALITY_PAGE}</a>" if page else QUALITY_PAGE
    return f"<h2>In one sentence</h2><p>{html.escape(conclusion(runs))} {link}.</p>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _summary(runs: Sequence[Run]) -> str:
    config, corpus = runs[0]["config"], runs[0]["corpus"]
    seeds = sorted({run["config"]["seed"] for run in runs})
    return (
        f"A byte-level language model ({config['layers']} layers, hidden size {config['hidden']}, "
        f"{config['experts']} experts a layer, {config['top_k']} for each byte) trained for {config['steps']} steps of "
        f"{config['batch'] * config['seq_len']} bytes on {corpus['name']} ({corpus['train_bytes'] / 1e6:.1f} MB), "
        f"scored on {corpus['validation_files']} held-out files. Every router starts from the same weights and reads "
        f"the same text in the same order. Seeds: {', '.join(map(str, seeds))}."
    )


def _reading(runs: Sequence[Run]) -> str:
    several = len({run["config"]["seed"] for run in runs}) > 1
    text = (
        "MaxVio is the busiest expert's load over the mean load, minus 1, averaged over the layers: 0 is even. "
        "Effective experts count those that are always chosen together as one, mean over the layers. "
    )
    if "time_ratio" in runs[0]["measures"]:
        text += (
            "The routers took their steps in turn, so whatever else the machine did fell on all alike; "
            "step time / that of K-Means is the median over the rounds."
        )
    else:
        text += "Step times share the machine with whatever else ran."
    text += " Numbers are mean ± standard deviation over the seeds." if several else ""
    return f"{text} {not_yet_balanced(runs[0]['config'])}".rstrip()


def _checks(runs: Sequence[Run]) -> str:
    items = "".join(
        f"<li class='{'yes' if check['passed'] else 'no'}'>{html.escape(check['text'])}</li>"
        for check in verdicts(runs)
    )
    return f"<ul class='checks'>{items}</ul>" if items else ""


def _facts(runs: Sequence[Run], environment: dict[str, Any]) -> str:
    config = {key: value for key, value in runs[0]["config"].items() if key not in ("router", "balance", "seed")}
    rates = {run["label"]: run["config"]["bias_rate"] for run in runs if run["config"]["bias_rate"] is not None}
    config["bias_rate"] = ", ".join(f"{rate:g} ({label})" for label, rate in rates.items()) or "each router's default"
    facts = {**runs[0]["corpus"], "parameters": runs[0]["num_parameters"], **config}
    facts |= {key: value for key, value in environment.items() if isinstance(value, (str, int))}
    return "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(facts[key]))}</td></tr>" for key in facts)
