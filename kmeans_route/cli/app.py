"""The commands and their options; what is longer than a page lives in the modules beside this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

import kmeans_route
from kmeans_route import KMeansRouter, calibrate
from kmeans_route.bench.routing_contest import CONTESTANTS, MODES, RIVALS
from kmeans_route.cli import info as machine
from kmeans_route.cli import places
from kmeans_route.cli.bench import DTYPES, SHAPE_NAMES, bench, parse_options
from kmeans_route.cli.demo import DEMO_STEPS, demo
from kmeans_route.cli.inspect import inspect
from kmeans_route.cli.output import Output
from kmeans_route.cli.pretrained import Pretrained, is_pretrained
from kmeans_route.cli.selftest import selftest
from kmeans_route.cli.train import Stopped, resumed, train
from kmeans_route.cli.trained import Trained
from kmeans_route.cli.watch import watch
from kmeans_route.lm import checkpoint as checkpoints
from kmeans_route.lm.config import THREADS, TrainConfig
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.trainer import NotFiniteError

app = typer.Typer(
    name="kmeans-route",
    help="Online K-Means routing for mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help and usage errors: readable in a pipe, on paper and aloud.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kmeans-route {kmeans_route.__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Online K-Means routing for mixture-of-experts models."""


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]
Plain = Annotated[bool, typer.Option("--plain", help="No colour, no boxes, no bars.")]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="File or folder to train on, repeatable [default: this Python's standard library]."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help=THREADS)]


@contextmanager
def _speaking(json_mode: bool, plain: bool) -> Iterator[Output]:
    """Where a command speaks; errors that a user can mend become one line and exit code 1."""
    output = Output(json_mode=json_mode, plain=plain)
    try:
        yield output
    except BrokenPipeError:  # whoever reads has enough, as `head` has; typer ends in silence
        raise
    except (ValueError, OSError, ModuleNotFoundError, checkpoints.CheckpointError, NotFiniteError) as error:
        output.fail(" ".join(str(error).split()))
        raise typer.Exit(1) from None
    except Stopped as stopped:
        raise typer.Exit(stopped.tell(output)) from None


def _with_options_of_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """Put an option for each field of `TrainConfig` after the first parameter of a command, in place of **options."""
    options = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=getattr(TrainConfig, name),
            annotation=Annotated[kind.__origin__, typer.Option(help=kind.__metadata__[0])],
        )
        for name, kind in get_type_hints(TrainConfig, include_extras=True).items()
        if name != "router_options"
    ]
    first, *others, _ = signature(command, eval_str=True).parameters.values()
    command.__signature__ = Signature([first, *options, *others])  # type: ignore[attr-defined]
    return command


@app.command("train")
@_with_options_of_a_run
def train_command(
    context: typer.Context,
    *,
    router_options: Annotated[
        list[str] | None,
        typer.Option("--router-option", metavar="NAME=VALUE", help="Another of the router's, repeatable."),
    ] = None,
    text: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of checkpoint and report [default: runs/ROUTER-seedN].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    more_steps: Annotated[
        int, typer.Option(min=0, help="With --resume: steps to add; the schedule of the rate spans the new total.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints, 0: at the end.")] = 200,
    json_mode: Json = False,
    plain: Plain = False,
    **options: Any,
) -> None:
    """Train a small byte-level language model and report its routing."""
    with _speaking(json_mode, plain) as output:
        values = {**options, "router_options": dict(map(_named_value, router_options or []))}
        folder, paths = out or Path("runs") / f"{options['router']}-seed{options['seed']}", text or []
        given = {name: value for name, value in values.items() if _was_given(context, name)}
        if resume and overwrite:
            raise ValueError("--resume goes on with the run that --overwrite would replace, got both: leave one out")
        if resume:
            places.check_folder(folder)
            config, corpus, checkpoint = resumed(folder, given, paths, more_steps)
        else:
            if more_steps:
                raise ValueError(f"--more-steps extends a run, got {more_steps} without --resume: add that")
            config, checkpoint = TrainConfig(**values), None
            config.check_used(given)
            held = places.held_by(folder)
            if held and not overwrite:
                resume_it = "add --resume, " if held == "a run" else ""
                raise ValueError(f"{folder} already holds {held}: {resume_it}add --overwrite, or name another --out")
            places.check_folder(folder)
            corpus = load_corpus(paths)
        train(config, corpus, folder, output, checkpoint=checkpoint, save_every=save_every)


def _named_value(text: str) -> tuple[str, Any]:
    """The two sides of NAME=VALUE; a value that reads as JSON is what it says, any other is text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--router-option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@app.command("demo")
def demo_command(
    seeds: Annotated[str, typer.Option(help='Seeds, for example "0 1 2".')] = "0",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = DEMO_STEPS,
    text: Text = None,
    out: Annotated[Path, typer.Option(help="Folder of the report; gets a number where it holds one.")] = Path(
        "demo-report"
    ),
    threads: Threads = TrainConfig.threads,
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Train K-Means and two learned routers side by side. Prints a table, writes a report."""
    with _speaking(json_mode, plain) as output:
        config = TrainConfig(steps=steps, threads=threads, eval_every=-(-steps // 4), eval_bytes=32768)
        demo(config, text or [], _seeds(seeds), out, output)


def _seeds(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f'--seeds must be whole numbers such as "0 1 2", got {text!r}')
    seeds = list(dict.fromkeys(map(int, words)))
    if len(seeds) < len(words):
        raise ValueError(f"--seeds must differ from each other, got {text!r}")
    return seeds


@app.command("info")
def info_command(json_mode: Json = False, plain: Plain = False) -> None:
    """Show versions, devices and backends."""
    output = Output(json_mode=json_mode, plain=plain)
    facts = machine.environment()
    output.table("kmeans-route on this machine", ["what", "value"], machine.rows(facts), numbers=False)
    for name, why in facts["backends"].items():
        if why != machine.AVAILABLE:
            output.note(f"backend {name}: {why}")
    output.document({"command": "info", **facts})


@app.command("selftest")
def selftest_command(threads: Threads = TrainConfig.threads, json_mode: Json = False, plain: Plain = False) -> None:
    """Check that routing here agrees with its fp64 definition. In seconds; with TRITON_INTERPRET=1 the kernels too."""
    torch.set_num_threads(threads)
    with _speaking(json_mode, plain) as output:
        raise typer.Exit(selftest(output))


@app.command("bench")
def bench_command(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help=f"{', '.join(SHAPE_NAMES)}, or T,D,E,K; repeatable [default: olmoe]."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="T of the named shapes.")] = 4096,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="One or a list with commas [default: all that need no compiler]. "
            + " ".join(f"{name}: {CONTESTANTS[name]}." for name in RIVALS),
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help=f"{' or '.join(MODES)}: routing alone, or forward, statistics and backward.")
    ] = "eval",
    dtype: Annotated[
        str, typer.Option(help=f"Of the hidden states: {', '.join(DTYPES)} [default: float32, on a GPU bfloat16].")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda [default: cuda if there is one].")] = "",
    repeats: Annotated[int, typer.Option(min=2, help="Rounds, each with one step of every contestant.")] = 15,
    threads: Threads = 2,
    csv: Annotated[
        str, typer.Option("--csv", metavar="FILE", help="Write the rows to FILE; - for stdout and nothing else there.")
    ] = "",
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Check and time routing against other ways to do it. One that is wrong is not timed.

    The table's ours / theirs is the time of kmeans_route over that of the row: below 1 kmeans_route is faster. With
    --threads 1 times are CPU time of the thread, so other work on the machine disturbs them least.
    """
    with _speaking(json_mode, plain) as output:
        options = parse_options(
            shape or ["olmoe"],
            tokens,
            against or [],
            mode=mode,
            dtype=dtype,
            device=device,
            repeats=repeats,
            threads=threads,
            csv=csv,
        )
        if csv == "-" and json_mode:
            raise ValueError("--csv - and --json both want stdout: name a file for --csv")
        torch.set_num_threads(threads)
        raise typer.Exit(bench(options, output))


Source = Annotated[
    Path, typer.Argument(help="Folder of a run of kmeans-route train, or of save_pretrained with its tokenizer.")
]
Made = Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
TheirText = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", help="Text, repeatable [default: as the run named it; for a model this Python's standard library]."
    ),
]
CalibrationBytes = Annotated[int, typer.Option(min=1, help="Bytes of training text to calibrate on.")]
MoreSteps = Annotated[int, typer.Option(min=0, help="Steps to add, so that train --resume goes on.")]


def _opened(
    context: typer.Context, source: Path, out: Path, overwrite: bool, text: list[Path] | None, *only_runs: str
) -> Trained | Pretrained:
    """The checkpoint to convert or export. Only runs of `kmeans-route train` take the options `only_runs`."""
    if not (checkpoints.exists(source) or is_pretrained(source)):
        raise checkpoints.CheckpointError(
            f"{source} holds no checkpoint: name the --out folder of kmeans-route train, or one of save_pretrained"
        )
    held = "a model" if is_pretrained(out) else places.held_by(out)
    if held and (not overwrite or out.resolve() == source.resolve()):
        raise ValueError(f"{out} already holds {held}: name another --out" + ("" if overwrite else ", or --overwrite"))
    if not is_pretrained(source):
        places.check_folder(out)
        return Trained(source, text or [])
    for name in only_runs:
        if _was_given(context, name):
            raise ValueError(f"--{name.replace('_', '-')} is for runs of kmeans-route train, got a model: leave it out")
    places.check_folder(out)
    return Pretrained(source, text or [])


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run or of save_pretrained, or a state dict's file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for pictures [default: none are drawn].")] = None,
    against: Annotated[Path | None, typer.Option(help="Earlier checkpoint, to show the drift since.")] = None,
    text: TheirText = None,
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Show a checkpoint's routers: load, bias, drift, dead experts."""
    with _speaking(json_mode, plain) as output:
        inspect(checkpoint, out, output, text=text or [], against=against)


@app.command("watch")
def watch_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run of kmeans-route train, which may be going on.")],
    once: Annotated[bool, typer.Option("--once", help="Draw what is there and end.")] = False,
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Redraw the load of each expert as a run goes on. Here and in loads.png; --json implies --once."""
    with _speaking(json_mode, plain) as output:
        watch(run, output, once=once or json_mode)


@app.command("convert")
def convert_command(
    context: typer.Context,
    source: Source,
    out: Made,
    start: Annotated[
        str, typer.Option(help="rows: the learned rows as directions; means: of the hidden states sent to each expert.")
    ] = "rows",
    balance: Annotated[str, typer.Option(help="Balance rule of K-Means [default: proportional].")] = "",
    balance_steps: Annotated[int, typer.Option(min=0, help="Of the selection bias, 0: no bias yet.")] = 0,
    tau: Annotated[float | None, typer.Option(help="Gate temperature [default: nearest to the old gates].")] = None,
    calibration_bytes: CalibrationBytes = 32768,
    more_steps: MoreSteps = 0,
    text: TheirText = None,
    overwrite: Overwrite = False,
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Put K-Means routers in place of learned ones. A warm start, with agreement and loss."""
    with _speaking(json_mode, plain) as output:
        old = _opened(context, source, out, overwrite, text, "more_steps")
        new = old.with_kmeans(balance, tau, more_steps, None if start == "means" else "centroids")
        batches, held_out, counted = old.windows(calibration_bytes)
        passes = (start == "means") + (tau is None or balance_steps > 0)
        with output.batches("calibrating", passes * len(batches) + 2 * len(held_out)) as tick:
            comparison = calibrate(
                old.model,
                new,
                batches,
                held_out=held_out,
                start=start,
                balance_steps=balance_steps,
                fit_tau=tau is None,
                forward=old.forward,
                progress=tick,
            )
        old.save(new, out)
        fitted = next(module.options.tau for module in new.modules() if isinstance(module, KMeansRouter))
        old.tell("convert", new, out, comparison, {"tau": fitted, **counted}, output)


@app.command("export")
def export_command(
    context: typer.Context,
    source: Source,
    out: Made,
    router: Annotated[str, typer.Option(help="softmax or sigmoid gates.")] = "softmax",
    balance: Annotated[str, typer.Option(help="Their balance rule [default: aux for softmax, sign for sigmoid].")] = "",
    bias: Annotated[
        str,
        typer.Option(help="Where the selection bias goes: score, logit, rows or none [default: its place, if any]."),
    ] = "",
    calibration_bytes: CalibrationBytes = 32768,
    more_steps: MoreSteps = 0,
    text: TheirText = None,
    overwrite: Overwrite = False,
    json_mode: Json = False,
    plain: Plain = False,
) -> None:
    """Put ordinary gates in place of K-Means routers. Tells agreement, load and loss."""
    with _speaking(json_mode, plain) as output:
        old = _opened(context, source, out, overwrite, text, "more_steps", "router", "balance")
        new = old.with_gates(router, balance, more_steps)
        batches, held_out, counted = old.windows(calibration_bytes)
        with output.batches("exporting", len(batches) + 2 * len(held_out)) as tick:
            new, comparison, facts = old.fit_gates(new, batches, held_out, bias, tick)
        old.save(new, out)
        old.tell("export", new, out, comparison, {**facts, **counted}, output)
