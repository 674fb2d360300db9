"""Other packages' kernels as contestants of `make gpu`: wheels from a folder, checks that reject, what is absent.

Stand-ins in plain PyTorch have the peers' interfaces, right and wrong; the packages themselves run where they are
installed, in Triton's interpreter.
"""

import importlib.metadata
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import peers, plan, steps, table, timing
from benchmarks.gpu.ahead import LateCompilations
from benchmarks.gpu.cells import TINY
from benchmarks.gpu.checks import Problem
from benchmarks.harness.checks import one_expert_after_another
from kmeans_route.bench.clock import Clock
from tests.helpers import programs

CPU = torch.device("cpu")
PEAKS = {"copy_bytes_per_s": 1e12, "l2_bytes_per_s": 1e13, "bf16_flop_per_s": 1e15}
REQUIREMENTS = Path(peers.__file__).with_name("peers.txt")
NAMES = [row.name for row in peers.PEERS]
NEEDS_A_GPU = ("flashlib", "flash-kmeans")
"""They ask whether a tensor is on a CUDA device, and for that device's shared memory."""
RIGHT = {"training routing": {"ok": True, "near_ties": 0, "max_score_error": 0.0}}


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this package is right, other tests ask: seconds in the interpreter."""
    monkeypatch.setattr(timing, "verify", lambda p: RIGHT)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    selected, ids = logits.topk(k, dim=1)
    return selected.softmax(1), ids.int(), torch.zeros(0)


def sorted_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, rows (T, K) and counts; last come first within an expert, as a sort by atomics may have it."""
    order = len(ids.flatten()) - 1 - ids.flatten().flip(0).argsort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(ids.shape)
    return order, rows, torch.bincount(ids.flatten(), minlength=num_experts)


def permute(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    order, rows, counts = sorted_by_expert(ids, E)
    return x[order // ids.shape[1]], rows.T.flatten().int(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def unpermute(rows: Tensor, row_of: Tensor, gates: Tensor, num_tokens: int, k: int) -> Tensor:
    return (rows[row_of.view(k, num_tokens).T.long()] * gates[..., None]).sum(1)


def sparse_matrix(ids: Tensor, _gates: Tensor, _bits: Tensor) -> Any:
    order, rows, counts = sorted_by_expert(ids, TINY.num_experts)
    return SimpleNamespace(
        mask_metadata=SimpleNamespace(col_sorted_indx=order, row_sorted_indx=rows.flatten(), col_sum=counts)
    )


def nearest(x: Tensor, centroids: Tensor, c_sq: Tensor | None = None) -> Tensor:
    return (x @ centroids.transpose(1, 2)).argmax(2).int()


class FusedLayer:
    @staticmethod
    def apply(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return one_expert_after_another(SimpleNamespace(gate_up=gate_up, down=down), ids, gates, x)


def stand_ins() -> dict[str, Any]:
    """Contestant -> a module that has what it calls."""
    moe_ops = SimpleNamespace(
        fused_topk_softmax=lambda logits, k: top_k(logits, k)[:2], permute=permute, unpermute=unpermute
    )
    triton_kernels = SimpleNamespace(topk_forward=top_k, SparseMatrix=sparse_matrix)
    of = {"moe-ops": moe_ops, "tokenspeed-triton-kernels": triton_kernels}
    of["flashlib"] = SimpleNamespace(euclid_assign_triton=nearest)
    of["flash-kmeans"] = SimpleNamespace(cosine_assign_triton=nearest)
    of["liger-kernel"] = SimpleNamespace(LigerFusedMoEFunction=FusedLayer)
    return {row.name: of[row.package] for row in peers.PEERS if row.package in of}


def timed(modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The record of the tiny cell, and each peer's timing."""
    record = timing.time_cell(TINY, Clock(CPU), PEAKS, lambda: 1.0, lambda p: only_peers(modules, p))
    return record, {name: t for some in record["parts"].values() for name, t in some.items()}


def only_peers(modules: dict[str, Any], p: Problem) -> timing.Parts:
    """Without this package's own contestants, which other tests time."""
    return {
        part: {name: make for name, make in some.items() if name in modules}
        for part, some in peers.peer_contestants(modules, p).items()
    }


def test_right_peers_are_right() -> None:
    record, found = timed(stand_ins())
    assert record["ok"], table.cell_table(record)
    assert found.keys() == stand_ins().keys()
    assert all(t["median_us"] > 0 for t in found.values())


def wrong_ids(k: int) -> Any:
    """The last id of the fourth row is another, and its gate stays."""

    def select(logits: Tensor, _k: int) -> tuple[Tensor, Tensor, Tensor]:
        gates, ids, bits = top_k(logits, k)
        ids[3, -1] = int(logits[3].argmin())
        return gates, ids, bits

    return select


def wrong_gates(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    gates, ids, bits = top_k(logits, k)
    return gates * 1.001, ids, bits


def other_copy(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    x_sorted, row_of, offsets = permute(x, ids, E)
    return x_sorted.roll(1, 0), row_of, offsets


def other_expert(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row of the first expert and one of the last change places, and their copies with them."""
    x_sorted, row_of, offsets = permute(x, ids, E)
    place = torch.arange(len(x_sorted))
    place[0], place[-1] = place[-1].clone(), 0
    return x_sorted[place], place[row_of.long()], offsets


def same_row_twice(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    x_sorted, row_of, offsets = permute(x, ids, E)
    return x_sorted, row_of.clamp(min=1), offsets


def other_offsets(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    x_sorted, row_of, offsets = permute(x, ids, E)
    return x_sorted, row_of, offsets + 1


WRONG = {
    "ids": ("product, moe-ops top-k", "fused_topk_softmax", lambda *a: wrong_ids(2)(*a)[:2], "outside near-ties"),
    "gates": ("product, triton_kernels top-k", "topk_forward", wrong_gates, "gates: error"),
    "nearest": ("flashlib", "euclid_assign_triton", lambda *a, **k: nearest(*a) * 0, "outside near-ties"),
    "copies": ("moe-ops permute", "permute", other_copy, "x_sorted differs"),
    "expert": ("moe-ops permute", "permute", other_expert, "among those of another expert"),
    "rows": ("moe-ops permute", "permute", same_row_twice, "not a permutation"),
    "offsets": ("moe-ops permute", "permute", other_offsets, "offsets are not"),
    "combine": ("moe-ops unpermute", "unpermute", lambda *a: unpermute(*a) * 1.001, "combine: "),
    "experts": ("Liger", "LigerFusedMoEFunction", SimpleNamespace(apply=lambda *a: FusedLayer.apply(*a) * 1.001),
                "y: error"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_peer_is_timed_and_marked(case: str) -> None:
    name, function, wrong, message = WRONG[case]
    module = SimpleNamespace(**vars(stand_ins()[name]) | {function: wrong})
    record, found = timed({name: module})
    assert record["correct"], "this package is right"
    assert not record["ok"]
    assert message in found[name]["wrong"]
    assert found[name]["median_us"] > 0
    assert f"WRONG: {found[name]['wrong']}" in table.cell_table(record)


def test_a_wrong_sigmoid_router_is_marked() -> None:
    p = Problem(TINY, CPU)
    x, k = p.x.detach(), TINY.top_k
    chosen, ids = (x @ p.directions.T).sigmoid().topk(k, dim=1, sorted=False)
    gates = chosen / chosen.sum(1, keepdim=True)
    peers.check_sigmoid(p, gates, ids)
    with pytest.raises(AssertionError, match="gates"):
        peers.check_sigmoid(p, gates * 1.001, ids)
    with pytest.raises(AssertionError, match="outside near-ties"):
        peers.check_sigmoid(p, gates, (ids + 1) % TINY.num_experts)


def test_a_peer_that_fails_is_skipped_with_the_reason() -> None:
    record, found = timed({"flashlib": SimpleNamespace()})
    assert "has no attribute 'euclid_assign_triton'" in found["flashlib"]["skipped"]
    assert record["ok"]


@pytest.mark.parametrize("row", peers.PEERS, ids=NAMES)
def test_what_is_installed_is_right(row: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, within bounds; where the package asks for a GPU, behind one that is played.

    Programs run in two orders and leave the same bits, all but those of moe-ops' counting sort.
    """
    module = pytest.importorskip(row.module, exc_type=ImportError)
    peers.one_configuration({row.module.partition(".")[0]})
    p = Problem(TINY, CPU)
    if row.name in NEEDS_A_GPU:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        properties = SimpleNamespace(name="none", shared_memory_per_block_optin=1 << 17)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    made = row.make(p, module)
    if row.name == "moe-ops permute":
        with pytest.raises(programs.OrderMatters, match="_permute_countsort_kernel"):
            made.check()
        with programs.shuffled(0):
            made.check()
    else:
        made.check()


def make_wheel(folder: Path, name: str, source: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.5-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", source)
        archive.writestr(f"{name}-1.5.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")


@pytest.fixture
def clean_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds to the path and imports goes with it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("moe_ops", "kmeans_route_wheel"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


@pytest.mark.usefixtures("clean_imports")
def test_wheels_are_found_behind_what_is_installed(tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "kmeans_route_wheel", "here = 1")
    make_wheel(tmp_path / "wheels", "torch", "raise ImportError")
    peers.unpack(tmp_path / "wheels", tmp_path / "site")
    assert __import__("kmeans_route_wheel").here == 1
    assert importlib.metadata.version("kmeans-route-wheel") == "1.5"
    assert importlib.metadata.version("torch") == torch.__version__


def test_absent_peers_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in peers.PEERS:
        monkeypatch.setitem(sys.modules, row.module.partition(".")[0], None)  # as if it were not installed
        monkeypatch.setitem(sys.modules, row.module, None)
    modules, record, text = peers.look_up(slow=True, dry=True)
    assert modules == {}
    assert list(record["absent"]) == NAMES
    assert text.startswith("none; absent: moe-ops (ModuleNotFoundError: ")
    assert "\n" not in text
    assert text.count("moe-ops") == 1, "once a package"
    fewer = peers.look_up(slow=False, dry=False)[1]["absent"]
    assert set(NAMES) - set(fewer) == {row.name for row in peers.PEERS if row.slow}


def test_their_compilations_are_not_late_ones_of_the_package() -> None:
    late = LateCompilations()
    for module in ("moe_ops.permute_ops", "kmeans_route.kernels.route"):
        late(src=SimpleNamespace(name=module, fn=SimpleNamespace(__module__=module)), cache_hit=False)
    assert late.names == ["kmeans_route.kernels.route"]


def test_every_package_can_be_fetched() -> None:
    """transformers alone is not: it is large, asks for much else, and is there where models are trained."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    listed = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    assert {row.package for row in peers.PEERS} - listed == {"transformers"}
    assert all("==" in line for line in lines if not line.startswith("#"))


@pytest.mark.usefixtures("clean_imports")
def test_a_dry_run_with_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: a folder of wheels, what is absent, a wrong peer that is timed and marked, exit code 1."""
    source = "def fused_topk_softmax(logits, k):\n    selected, ids = logits.topk(k)\n    return selected, ids\n"
    make_wheel(tmp_path / "wheels", "moe_ops", source)
    if importlib.util.find_spec("moe_ops"):
        pytest.skip("moe-ops is installed, and comes first")
    monkeypatch.setattr(peers, "PEERS", tuple(row for row in peers.PEERS if row.package in ("moe-ops", "no-such")))
    for unit in ("compile_units", "race_units", "shape_units", "ncu_units", "config_units", "sanitizer_units"):
        monkeypatch.setattr(steps, unit, lambda s: [])
    monkeypatch.setattr(steps, "Ahead", lambda *_, **__: SimpleNamespace(stop=lambda: None))
    monkeypatch.setattr(steps.peaks, "peaks", lambda clock: PEAKS)
    monkeypatch.setattr(timing, "contestants", lambda p: {})
    given = ["--dry", "--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out")]
    assert command.main(given) == plan.WRONG
    (file,) = (tmp_path / "out").glob("*.jsonl")
    text = file.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    lines = [json.loads(line) for line in text.splitlines()]
    (said,), (cell,) = ([line for line in lines if line["kind"] == kind] for kind in ("peers", "peers cell"))
    assert said["versions"]["moe-ops permute"] == "moe-ops 1.5"
    assert "gates: error" in cell["parts"]["eval"]["product, moe-ops top-k"]["wrong"]
    assert "has no attribute 'permute'" in cell["parts"]["dispatch"]["moe-ops permute"]["skipped"]
    assert lines[-1]["wrong"] == ["timing: peers tiny T=16"]


def test_a_folder_without_wheels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry", "--wheels", str(tmp_path)]) == plan.NO_START
    assert capsys.readouterr().err == (
        f"--wheels {tmp_path} has no wheels: `make gpu-wheels` fetches them where there is a network.\n"
    )
