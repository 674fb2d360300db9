"""The files in examples/, each run as a user runs it, at a toy size; those whose framework is absent are skipped."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.compare import assert_same_bits, routers_of

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LENGTH = "32"
GIVEN = 999
"""Steps of a router that was given its centroids: 1 / (1 - decay) - 1."""
pytestmark = [pytest.mark.usefixtures("plain_empty"), pytest.mark.filterwarnings("ignore")]


def run(name: str, *arguments: Any) -> dict[str, Any]:
    """What `python examples/NAME ARGUMENTS` leaves behind."""
    given, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = given


def losses_in(printed: str) -> list[float]:
    return [float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines() if line.startswith("step ")]


def test_each_example_is_linked_once_and_run_here() -> None:
    page, here = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8"), Path(__file__).read_text("utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert page.count(f"](../examples/{path.name})") == 1, path.name
        assert f'"{path.name}"' in here or f'"{path.stem}.' in here, path.name


def saved(folder: Path, to: Path) -> dict[str, Tensor]:
    """A checkpoint of torch.distributed.checkpoint, on one process and flat."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, to)
    leaves: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, f"{name}.{key}")
        elif isinstance(value, Tensor):
            leaves[name] = value

    walk(torch.load(to, weights_only=True), "")
    return leaves


def test_pretraining_on_two_ranks_resumes_bit_for_bit(tmp_path: Path) -> None:
    def start(out: Path) -> list[float]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sizes = ["--steps", "4", "--save-every", "2", "--length", LENGTH, "--batch", "4", "--hidden", "32"]
        done = subprocess.run(
            [*command, str(EXAMPLES / "pretrain.py"), *sizes, "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return losses_in(done.stdout)

    first, last = start(tmp_path / "straight")
    assert last < first
    shutil.copytree(tmp_path / "straight" / "2", tmp_path / "resumed" / "2")
    assert start(tmp_path / "resumed")[-1] == last
    want, got = (saved(tmp_path / name / "4", tmp_path / f"{name}.pt") for name in ("straight", "resumed"))
    assert got.keys() == want.keys()
    assert any(name.endswith("router.centroids") for name in want)
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


def test_the_notebook_shows_what_it_says() -> None:
    pytest.importorskip("matplotlib")
    book = json.loads((EXAMPLES / "heatmap.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in cells:
        *lines, last = "".join(cell["source"]).splitlines(keepends=True)
        if last[0].isidentifier() and " = " not in last.partition("(")[0]:  # a picture, as a notebook shows it
            exec(compile("".join(lines), "heatmap.ipynb", "exec"), names)
            shown.append(eval(last, names))
        else:
            exec(compile("".join([*lines, last]), "heatmap.ipynb", "exec"), names)
    assert [type(picture).__name__ for picture in shown] == ["Figure", "Figure"]
    worst = {name: float((load[-10:].amax(-1) - 1).mean()) for name, load in names["loads"].items()}
    assert worst["K-Means"] < worst["softmax"]


# Models of transformers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint with learned gates."""
    pytest.importorskip("transformers", minversion="5.16")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    before = run("tiny_mixtral.py", folder, "--steps", 3, "--length", LENGTH)
    assert before["tokenizer"].decode(before["tokenizer"]("import é")["input_ids"]) == "import é"
    return folder


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A K-Means checkpoint, and what the example left behind."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("tuned")
    return folder, run("finetune_trainer.py", tiny, "--out", folder, "--steps", 8, "--length", LENGTH)


def test_fine_tuning_learns_and_loads_what_it_saved(tuned: tuple[Path, dict[str, Any]]) -> None:
    _, left = tuned
    logs = [entry for entry in left["trainer"].state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert "routers/maxvio_max" in logs[0]
    assert [int(router.steps) for router in routers_of(left["model"])] == [GIVEN + 8] * 2
    for name, value in left["model"].state_dict().items():
        assert_same_bits(left["again"].state_dict()[name], value, name)


def test_fine_tuning_goes_on(tiny: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(tuned[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    left = run("finetune_trainer.py", tiny, "--out", tmp_path, "--steps", 10, "--length", LENGTH, "--resume")
    assert left["trainer"].state.global_step == 10
    assert [int(router.steps) for router in routers_of(left["model"])] == [GIVEN + 10] * 2


def test_a_warm_start_and_the_way_back(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    left = run("warm_start.py", tiny, "--out", tmp_path, "--steps", 3, "--length", LENGTH)
    assert capsys.readouterr().out.count("MaxVio before") == 2
    assert len(routers_of(left["model"])) == 2
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not routers_of(vanilla)
    with torch.no_grad():
        losses = torch.stack([vanilla(**batch).loss for batch in left["held_out"]])
    assert left["export"].comparison.loss_after == pytest.approx(float(losses.mean()))


def test_trl_trains(tiny: Path, tmp_path: Path) -> None:
    for needed in ("datasets", "trl"):
        pytest.importorskip(needed)
    from transformers import AutoModelForCausalLM

    from kmeans_route.integrations.transformers import load_kmeans_pretrained

    left = run("finetune_trl.py", tiny, "--out", tmp_path, "--steps", 8, "--length", LENGTH)
    logs = [entry for entry in left["trainer"].state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert "routers/maxvio_max" in logs[0]
    loaded = load_kmeans_pretrained(AutoModelForCausalLM, tmp_path)
    assert [int(router.steps) for router in routers_of(loaded)] == [GIVEN + 8] * 2


def test_axolotl_calls_the_plugin(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own manager, in the order of its training; the rest of axolotl is not run."""
    base = pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)
    from axolotl.utils.dict import DictDefault
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    monkeypatch.syspath_prepend(str(EXAMPLES))
    manager = base.PluginManager.get_instance()
    manager.register("axolotl_plugin.KMeansPlugin")
    try:
        (path,) = manager.get_input_args()
        module, _, name = path.rpartition(".")
        checked = getattr(sys.modules[module], name)(kmeans_route={"tau": 0.3})
        cfg = DictDefault(plugins=["axolotl_plugin.KMeansPlugin"], **checked.model_dump())
        model = AutoModelForCausalLM.from_pretrained(tiny)
        manager.post_model_build(cfg, model)
        assert [router.options.tau for router in routers_of(model)] == [0.3, 0.3]
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (16, 32))]
        options = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to=[], save_strategy="no")
        trainer = Trainer(model, options, train_dataset=rows)
        manager.post_trainer_create(cfg, trainer)
        trainer.train()
    finally:
        manager.plugins.clear()
        sys.modules.pop("axolotl_plugin", None)
    assert "routers/maxvio_max" in trainer.state.log_history[0]
    assert [int(router.steps) for router in routers_of(model)] == [GIVEN + 2] * 2


def test_vllm_serves_a_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", minversion="0.32")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kmeans_route.integrations.transformers import apply_kmeans_routing

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    apply_kmeans_routing(model)
    nn.init.normal_(model.lm_head.weight)  # after so little training every answer would be the same token, repeated
    prompts, wanted = ["import ", "def main(", "class", "return x", "# why", "for"], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        wanted.append(answer[0, ids["input_ids"].shape[1] :].tolist())
    assert len(set(map(tuple, wanted))) > 2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    asked = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    left = run("serve_vllm.py", tmp_path, *asked, "--tokens", 5, "--dtype", "float32", "--max-length", 64)
    answers = [list(done.outputs[0].token_ids) for done in left["answers"]]
    left.clear()
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    assert answers == wanted


# On a CPU in the place of a GPU


@pytest.fixture
def as_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The environment of its one process, and no process group left behind."""
    start = dist.init_process_group

    def by_file(backend: str, **options: Any) -> None:  # no port that another test may have
        start(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, **options)

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", by_file)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def without_cuda(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, on the CPU where it is asked for "cuda"."""

    def made(*arguments: Any, **options: Any) -> Tensor:
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return make(*arguments, **options)

    return made


@pytest.mark.usefixtures("as_torchrun")
def test_megatron_trains_in_its_own_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("kmeans_route.integrations.megatron", exc_type=ImportError)
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch, "zeros", without_cuda(torch.zeros))
    monkeypatch.setattr(torch, "tensor", without_cuda(torch.tensor))
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", torch.manual_seed)
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    sizes = ["--steps", 4, "--batch", 4, "--length", LENGTH, "--clip-grad", 0]  # its clipping takes tensors of a GPU
    with torch.compiler.set_stance("force_eager"):  # for time, none of its fusing
        left = run("pretrain_megatron.py", *sizes)
    first, last = losses_in(capsys.readouterr().out)
    assert last < first
    routers = routers_of(left["model"])
    assert [int(router.steps) for router in routers] == [3, 3]  # the first commit sets the centroids
    assert [int(router.tokens_per_expert.sum()) for router in routers] == [2 * 4 * 32 * 2] * 2  # both micro-batches


@pytest.mark.usefixtures("as_torchrun")
def test_torchtitans_trainer_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: "cpu")  # torchtitan asks as it is imported
    for needed in ("datasets", "tensorboard", "torchdata"):  # what its Trainer imports beside its models
        pytest.importorskip(needed)
    utils = pytest.importorskip("torchtitan.distributed.utils", exc_type=ImportError)
    if utils.device_type != "cpu":
        pytest.skip("torchtitan was imported by another test, before it could be told of the CPU")
    memory = {
        "get_device_name": lambda _: "cpu",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=2**30),
        "memory_stats": lambda _: defaultdict(int),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, value in memory.items():
        monkeypatch.setattr(torch.cpu, name, value, raising=False)
    monkeypatch.setattr(utils, "set_pg_timeouts", lambda *_, **__: None)  # its barrier names a GPU
    out = tmp_path / "out"
    left = run("pretrain_torchtitan.py", "--steps", 4, "--batch", 2, "--length", LENGTH, "--out", out)
    trainer = left["trainer"]
    assert trainer.step == 4
    routers = routers_of(trainer.model_parts[0])
    assert len(routers) == 5
    assert {int(router.steps) for router in routers} == {3}  # the first commit sets the centroids
    assert {int(router.tokens_per_expert.sum()) for router in routers} == {2 * 32 * 3}  # once, with selective AC
    kept = saved(out / "checkpoint" / "step-4", tmp_path / "kept.pt")
    for name, value in trainer.model_parts[0].state_dict().items():
        if name.endswith("router.centroids"):
            assert_same_bits(kept[f".{name}"], value, name)
