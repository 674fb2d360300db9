"""A few hand-picked launch configurations beside the table's: each held against fp64 before its time counts."""

import torch

from benchmarks.gpu.cells import Trial
from benchmarks.gpu.checks import TAU, Problem
from benchmarks.gpu.launches import sorted_copies
from benchmarks.gpu.measure import Outcome, measure
from benchmarks.gpu.timing import clear
from kmeans_route.bench import truth
from kmeans_route.bench.clock import Clock, reason
from kmeans_route.kernels.route import RouteResult, route_fwd
from kmeans_route.types import Routing


def try_config(trial: Trial, clock: Clock) -> Outcome:
    """The record of one kernel with one configuration: its time, and "wrong" or "skipped" with the reason."""
    p, config = Problem(trial.cell, clock.device), trial.config
    x, directions, bias, options = p.x.detach(), p.directions, p.bias, p.ours.options
    record: Outcome = {"kind": "config", "kernel": trial.kernel, **trial.cell._asdict()}
    record["config"] = None if config is None else list(config)

    def routed() -> RouteResult:
        return route_fwd(x, directions, bias, None, None, options, config=config)

    def check_route() -> None:
        r = routed()
        routing = Routing(r.indices, r.weights, r.selected, None, r.counts, r.inv_norm, r.valid)
        truth.check_routing(x, directions, bias, TAU, routing)

    run, check = routed, check_route
    if trial.kernel == "dispatch_fwd":
        r = route_fwd(x, directions, bias, None, None, options, want_std=True, want_rank=True)

        def run() -> object:
            return sorted_copies(x, r, trial.cell.num_experts, config)

        def check() -> None:
            sent = sorted_copies(x, r, trial.cell.num_experts, config)
            truth.check_sums(x, r.indices, sent.partials.sum(0))
            order = r.indices.flatten().sort(stable=True).indices
            assert torch.equal(sent.x_sorted, x[order // trial.cell.top_k]), "x_sorted differs"

    try:
        with torch.no_grad():
            check()
            record |= measure(clock, run)
    except AssertionError as error:
        record |= {"ok": False, "wrong": reason(error), **measure(clock, run)}
    except Exception as error:  # a configuration that does not fit the device fails to launch
        record["skipped"] = reason(error)
    clear()
    return record
