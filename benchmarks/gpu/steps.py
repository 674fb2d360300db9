"""The steps of the GPU run: what each does to its cells. Their order and their ends stand in `plan.py`.

compile: rates of the device; meanwhile a process a core compiles what follows. race: repeated bits of hidden states
that lie in L2; streams, graphs, sums, a host that waits for nothing. shapes: every kernel at the named shapes against
fp64. timing: our kernels, the library's product, eager PyTorch, peers. ncu: bytes counted beside the time. configs:
hand-picked launch configurations. sanitizer: memcheck and racecheck. full, without a time limit: torch.compile, learned
routers, all peers, every T.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from triton.runtime import driver

from benchmarks.gpu import checks, configs, full, ncu, peaks, profile, race, sanitize, table, timing
from benchmarks.gpu.ahead import Ahead, LateCompilations, cores
from benchmarks.gpu.cells import PROFILED, Cell, Trial, cells_of, trials
from benchmarks.gpu.launches import Seen, distinct, key_of
from benchmarks.gpu.peers import look_up, peer_contestants
from benchmarks.gpu.plan import Step, Unit
from benchmarks.gpu.report import Record
from benchmarks.offline import TARGETS
from kmeans_route.bench.clock import Clock
from kmeans_route.kernels import configs as table_configs

JOBS = {
    "race": ("race", "streams", "graphs", "sums", "no sync"),
    "shapes": ("shapes", "layer"),
    "timing": ("timing", "peers"),
}
"""Step -> its jobs in the table of cells, where those are not called like the step."""
COMMON = 0.5
DRY_AHEAD = 3
"""Launches that a dry run really compiles."""
CHILD_S = 600
"""The most that another program gets, where the step has no limit."""
Left = Callable[[], float]


class Session:
    """What the steps share: the device's clock, its rates, the planned launches, and those that nobody had planned.

    peers: whether other packages are timed before the step without a time limit, too.
    """

    def __init__(self, clock: Clock, names: list[str], *, dry: bool, peers: bool = False) -> None:
        self.clock, self.dry, self.names, self.with_peers = clock, dry, names, peers
        self.rates: Record = {}
        self.no_ncu = profile.DRY if dry else ""
        self.late, self.unplanned, self.step = LateCompilations(), dict[str, None](), ""
        jobs = [job for name in names for job in JOBS.get(name, (name,)) if job not in ("compile", "full")]
        jobs = [job for job in jobs if peers or job != "peers"]
        cells = [cell for job in jobs for cell in cells_of(job, dry=dry)]
        nearest = [Trial("route_fwd", cell._replace(top_k=1)) for cell in cells_of("peers", dry=dry)]
        table_configs.assumed_architecture = self.arch = table_configs.architecture(clock.device)
        others = trials(dry=dry) if "configs" in names else []
        self.plan = (cells, [*(nearest if "peers" in jobs else []), *others])
        self.planned = distinct(*self.plan)

    def start_compiling(self, cache: str = "") -> None:
        """The processes that are ahead; for a dry run one, which compiles a few launches for an H100 into `cache`."""
        if self.dry:
            number, environment = min(DRY_AHEAD, len(self.planned)), {"TRITON_CACHE_DIR": cache}
            self.ahead = Ahead(
                self.plan, number, TARGETS["sm_90"], self.arch, workers=1, launchers=False, environment=environment
            )
            return
        target = driver.active.get_current_target()
        launchers = target.backend == "cuda"
        self.ahead = Ahead(self.plan, len(self.planned), target, self.arch, workers=cores(), launchers=launchers)

    @cached_property
    def peers(self) -> tuple[dict[str, Any], Record, str]:
        """Modules of other packages by the contestants' names, what is there and what is not, and that in a line."""
        return look_up(slow=self.dry or "full" in self.names, dry=self.dry)

    def note(self, seen: Seen) -> None:
        """What a dry run is told of each launch; those of the step without a time limit are not planned."""
        if self.step != "full" and key_of(seen.launch) not in self.planned:
            self.unplanned[f"{self.step}: {seen.launch.name}"] = None

    def begin(self, step: str) -> None:
        """From the second step on, up to that without a time limit, whatever this process compiles is late."""
        self.step = step
        if not self.dry:
            self.late.listen(step not in ("compile", "full"))

    def late_record(self) -> Record:
        """Launches that were not compiled ahead; in a dry run those that nobody had planned."""
        names = list(self.unplanned) if self.dry else sorted(self.late.names)
        text = (
            f"{len(names)} kernels compiled late" if not self.dry else f"{len(names)} launches that nobody had planned"
        )
        return {"kind": "late", "kernels": names, "text": text + (f": {', '.join(names)}" if names else "")}


def steps(session: Session, ends: Mapping[str, float]) -> list[Step]:
    """Those that the session names, in order; without a limit where `ends` names none."""
    makers = {
        "compile": compile_units, "race": race_units, "shapes": shape_units, "timing": timing_units,
        "ncu": ncu_units, "configs": config_units, "sanitizer": sanitizer_units, "full": full_units,
    }  # fmt: skip
    return [Step(name, ends.get(name, float("inf")), makers[name](session)) for name in session.names]


def compile_units(s: Session) -> list[Unit]:
    """The device's rates, then what the processes have compiled by then."""

    def rates(_left: Left) -> tuple[Record, str]:
        s.rates = peaks.peaks(s.clock)
        return {"kind": "peaks", **s.rates}, ", ".join(f"{name} {value:.3g}" for name, value in s.rates.items())

    def ready(left: Left) -> tuple[Record, str]:
        done = s.ahead.wait(left())
        ready = f"{len(s.ahead.ready)} of {s.ahead.number} launches ready"
        record: Record = {"kind": "compile", "ready": len(s.ahead.ready), "of": s.ahead.number}
        record |= {"cpu_s": round(s.ahead.cpu_s, 1), "problems": s.ahead.problems}
        if not done:
            record["left"] = [f"{s.ahead.number - len(s.ahead.ready)} of {s.ahead.number} launches"]
        return record, f"{ready}, {record['cpu_s']:g} s of work{''.join(f'; {p}' for p in s.ahead.problems)}"

    return [Unit("rates", rates), Unit("ahead", ready)]


def check_unit(s: Session, name: str, cell: Cell, check: Callable[..., Record], **options: Any) -> Unit:
    """A function that raises AssertionError or returns figures."""

    def do(_left: Left) -> tuple[Record, str]:
        found = check(cell, s.clock, **options)
        figures = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        return {"kind": "check", "check": name, **cell._asdict(), "ok": True, **found}, f"right {figures}".rstrip()

    return Unit(f"{name} {cell.label}", do)


def race_units(s: Session) -> list[Unit]:
    """The race first, then streams, graphs, repeated sums, and the host that waits for nothing."""
    few: dict[str, Any] = {"repeats": 1} if s.dry else {}
    rounds: dict[str, Any] = {"rounds": 1} if s.dry else {}
    named = partial(cells_of, dry=s.dry)
    units = [check_unit(s, "race", cell, race.race, **few) for cell in named("race")]
    units += [check_unit(s, "streams", cell, race.streams, **rounds) for cell in named("streams")]
    units += [check_unit(s, "graph", cell, race.graph_replay, **rounds) for cell in named("graphs")]
    units += [
        check_unit(s, "graph follows", cell, race.graph_follows_centroids, **rounds)
        for cell in named("graphs")[-2:][:1]
    ]
    units += [check_unit(s, "sums", cell, race.same_sums, **few) for cell in named("sums")]
    return units + [check_unit(s, "no sync", cell, race.no_sync) for cell in named("no sync")]


def shape_units(s: Session) -> list[Unit]:
    """Every check of every cell."""

    def unit(cell: Cell) -> Unit:
        def do(_left: Left) -> tuple[Record, str]:
            found = checks.verify(checks.Problem(cell, s.clock.device, common=COMMON))
            wrong = [f"{name}: {check['message']}" for name, check in found.items() if not check["ok"]]
            record = {"kind": "check", "check": "shapes", **cell._asdict(), "checks": found, "ok": not wrong}
            return record, "WRONG: " + "; ".join(wrong) if wrong else table.near_ties(found)

        return Unit(f"{cell.label} {cell.dtype}", do)

    units = [unit(cell) for cell in cells_of("shapes", dry=s.dry)]
    return units + [check_unit(s, "layer", cell, race.layer_against_torch) for cell in cells_of("layer", dry=s.dry)]


def cell_units(s: Session, job: str, make: Callable[[checks.Problem], timing.Parts], **other: Any) -> list[Unit]:
    """Every contestant of every part of every cell. other: than usual in its record."""

    def unit(cell: Cell) -> Unit:
        def do(left: Left) -> tuple[Record, str]:
            record = timing.time_cell(cell, s.clock, rates_of(s), left, make) | other
            return record, table.cell_table(record)

        return Unit(f"peers {cell.label}" if job == "peers" else cell.label, do)

    return [unit(cell) for cell in cells_of(job, dry=s.dry)]


def timing_units(s: Session) -> list[Unit]:
    """This package and plain PyTorch at every cell; then, where they are wanted, its peers at a few."""
    units = cell_units(s, "timing", timing.contestants)
    if not s.with_peers:
        return units
    beside = cell_units(s, "peers", lambda p: peer_contestants(s.peers[0], p), kind="peers cell")
    return [*units, Unit("peers", lambda _left: s.peers[1:]), *beside]


def full_units(s: Session) -> list[Unit]:
    """The same with the contestants that take long to compile."""
    compiler = full.Compiler("eager" if s.dry else "inductor")
    cells = cell_units(s, "full", lambda p: full.all_contestants(compiler, s.peers[0], p))
    return [Unit("peers", lambda _left: s.peers[1:]), *cells]


def rates_of(s: Session) -> Record:
    """The device's rates, measured now where the first step did not come to it."""
    s.rates = s.rates or peaks.peaks(s.clock)
    return s.rates


def ncu_units(s: Session) -> list[Unit]:
    """Time, bytes that moved and bytes that had to, for a few kernels."""

    def unit(kernel: str, cell: Cell) -> Unit:
        def do(left: Left) -> tuple[Record, str]:
            p = checks.Problem(cell, s.clock.device)
            found = profile.measured(kernel, p, s.clock, rates_of(s), no_ncu=s.no_ncu, seconds=min(left(), CHILD_S))
            error = found["ncu"].get("error", "")
            if ncu.NO_PERMISSION in error:
                s.no_ncu = error
            late = {"left": ["ncu"]} if error.startswith(ncu.NOT_FINISHED) else {}
            return {"kind": "profile", **found, **late}, profile.text_of(found)

        return Unit(f"{kernel} {cell.label}", do)

    cells = cells_of("ncu", dry=s.dry)
    return [unit(kernel, cells[place % len(cells)]) for kernel, place in PROFILED]


def config_units(s: Session) -> list[Unit]:
    """One unit a configuration."""

    def unit(trial: Trial) -> Unit:
        def do(_left: Left) -> tuple[Record, str]:
            record = configs.try_config(trial, s.clock)
            time = f"{record['median_us']:.1f} us" if "median_us" in record else f"skipped: {record['skipped']}"
            return record, time + (f" WRONG: {record['wrong']}" if "wrong" in record else "")

        return Unit(trial.label, do)

    return [unit(trial) for trial in trials(dry=s.dry)]


def sanitizer_units(s: Session) -> list[Unit]:
    """Both tools at once."""

    def do(left: Left) -> tuple[Record, str]:
        if s.dry:
            record: Record = {"kind": "sanitizer", **dict.fromkeys(sanitize.TOOLS, "not run: a dry run")}
        else:
            torch.cuda.empty_cache()
            record = sanitize.sanitize(min(left(), CHILD_S))
        return record, "; ".join(f"{tool} {record[tool]}" for tool in sanitize.TOOLS if tool in record)

    return [Unit("memcheck, racecheck", do)]
