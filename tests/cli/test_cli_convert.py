"""`kmeans-route inspect`, `convert` and `export` on runs of a tiny model."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

from kmeans_route import KMeansRouter, LearnedRouter, metrics, viz
from kmeans_route.cli import inspect, train
from kmeans_route.cli.train import resumed
from kmeans_route.cli.trained import Trained
from kmeans_route.lm.checkpoint import load_checkpoint, save_checkpoint
from kmeans_route.lm.data import load_corpus
from kmeans_route.lm.trainer import Trainer
from tests.helpers.commands import invoke, write_text

SIZES = "--layers 2 --hidden 16 --heads 2 --experts 4 --expert-hidden 16 --seq-len 16 --batch 4 --eval-bytes 512"
NAMES = ["blocks.0.moe.router", "blocks.1.moe.router"]
CALIBRATE = ("--calibration-bytes", 512)
ESCAPE = "\x1b"


@pytest.fixture(scope="module", autouse=True)
def no_training_report() -> Iterator[None]:
    """`train` draws its pictures only where matplotlib is; here they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "find_spec", lambda name: None)
        yield


@pytest.fixture(scope="module")
def runs(no_training_report: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and one finished run of each router."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder / "text")
    for router in ("softmax", "sigmoid", "kmeans"):
        config = ["--router", router, "--steps", 8, "--threads", 1, *SIZES.split()]
        code, _ = invoke("train", "--text", text, *config, "--out", folder / router, "--json")
        assert code == 0
    return folder


def trainer_of(folder: Path) -> Trainer:
    config, corpus, checkpoint = resumed(folder, {}, [])
    trainer = Trainer(config, corpus)
    trainer.restore(checkpoint)
    trainer.attachment.remove()
    return trainer


def assert_rest_is_the_same(one: Path, other: Path) -> None:
    """All tensors of two checkpoints equal, but those of routers."""
    first, second = load_checkpoint(one), load_checkpoint(other)
    rest = [{name for name in c.tensors if ".router." not in name} for c in (first, second)]
    assert rest[0] == rest[1]
    assert len(rest[0]) > 40
    for name in rest[0]:
        assert torch.equal(first.tensors[name], second.tensors[name]), name
    assert (first.step, first.history, first.corpus) == (second.step, second.history, second.corpus)


@pytest.mark.parametrize("start", ["rows", "means"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_convert_starts_warm(router: str, start: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    arguments = ("--start", start, "--balance-steps", 4, *CALIBRATE, "--more-steps", 3)
    code, document = invoke("convert", runs / router, "--out", out, *arguments, "--json")
    assert code == 0
    assert_rest_is_the_same(runs / router, out)
    old, new = trainer_of(runs / router), trainer_of(out)
    assert (new.config.router, new.config.balance, new.config.steps) == ("kmeans", "proportional", 11)
    assert new.config.tau == document["tau"]
    directions = {"rows": "centroids", "means": "whitened"}[start]
    for name in NAMES:
        ours, theirs = new.model.get_submodule(name), old.model.get_submodule(name)
        assert isinstance(ours, KMeansRouter)
        assert bool(ours.initialized)
        assert int(ours.steps) == 999
        assert ours.commit_options.directions == directions
        assert float(ours.expert_bias.abs().max()) > 0
        turned = metrics.centroid_drift(ours.weight, theirs.weight.detach()).max()
        assert (turned < 1e-5) == (start == "rows")
    # What the command says is what the two checkpoints do.
    for key, trainer in (("bits_per_byte_before", old), ("bits_per_byte_after", new)):
        evaluation = trainer.evaluate(sample=False)
        assert document[key] == pytest.approx(evaluation.bits_per_byte, rel=1e-6)
    loads = metrics.max_vio(evaluation.tokens_per_expert).tolist()
    assert [document["routers"][name]["max_vio_after"] for name in NAMES] == pytest.approx(loads)
    if start == "rows":
        assert document["mean"]["overlap"] > 0.6
    # It trains on.
    code, document = invoke("train", "--resume", "--out", out, "--json")
    assert code == 0
    assert document["completed"]
    assert load_checkpoint(out).step == 11


def test_export_without_a_bias_chooses_alike(runs: Path, tmp_path: Path) -> None:
    """Convert by rows with no bias, then export: every choice is the K-Means model's."""
    converted, out = tmp_path / "converted", tmp_path / "exported"
    assert invoke("convert", runs / "softmax", "--out", converted, *CALIBRATE, "--json")[0] == 0
    code, document = invoke("export", converted, "--out", out, *CALIBRATE, "--json")
    assert code == 0
    assert document["mean"]["overlap"] == 1.0
    assert document["mean"]["top1"] == 1.0
    assert document["mean"]["max_vio_after"] == pytest.approx(document["mean"]["max_vio_before"])
    assert document["bits_per_byte_after"] == pytest.approx(document["bits_per_byte_before"], abs=1e-3)
    assert_rest_is_the_same(converted, out)
    new = trainer_of(out)
    assert isinstance(new.model.get_submodule(NAMES[0]), LearnedRouter)
    assert (new.config.router, new.config.balance) == ("softmax", "aux")


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_export_of_a_trained_run(router: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    code, document = invoke(
        "export", runs / "kmeans", "--router", router, "--out", out, *CALIBRATE, "--more-steps", 2, "--json"
    )
    assert code == 0
    assert document["bias"] == {"softmax": "rows", "sigmoid": "score"}[router]
    assert_rest_is_the_same(runs / "kmeans", out)
    old, new = trainer_of(runs / "kmeans"), trainer_of(out)
    for key, trainer in (("bits_per_byte_before", old), ("bits_per_byte_after", new)):
        assert document[key] == pytest.approx(trainer.evaluate(sample=False).bits_per_byte, rel=1e-6)
    if router == "softmax":
        assert not any(new.model.get_submodule(name).expert_bias.any() for name in NAMES)
    assert document["mean"]["overlap"] > 0.8
    assert invoke("train", "--resume", "--out", out, "--json")[0] == 0
    assert load_checkpoint(out).step == 10


def test_export_keeps_those_of_the_routers_options_that_the_new_one_has(runs: Path, tmp_path: Path) -> None:
    options = ("--router-option", "directions=whitened", "--router-option", "scaling=2.0")
    few = ["--text", runs / "text", "--steps", 2, "--threads", 1, *SIZES.split(), *options]
    assert invoke("train", *few, "--out", tmp_path / "whitened", "--json")[0] == 0
    code, document = invoke("export", tmp_path / "whitened", "--out", tmp_path / "new", *CALIBRATE, "--json")
    assert code == 0, document
    assert load_checkpoint(tmp_path / "new").config["router_options"] == {"scaling": 2.0}
    assert trainer_of(tmp_path / "new").model.moe_layers[0].router.scaling == 2.0


def test_convert_takes_a_run_that_was_stopped_before_its_first_step(runs: Path, tmp_path: Path) -> None:
    config, corpus, _ = resumed(runs / "softmax", {}, [])
    save_checkpoint(tmp_path / "stopped", Trainer(config, corpus).checkpoint())
    code, document = invoke("convert", tmp_path / "stopped", "--out", tmp_path / "new", *CALIBRATE, "--json")
    assert code == 0, document
    assert trainer_of(tmp_path / "new").step == 0


def test_export_takes_a_run_that_was_stopped_between_two_commits(runs: Path, tmp_path: Path) -> None:
    """What is pending is of routers that the new model has not, and nothing warns of it."""
    config, corpus, _ = resumed(runs / "kmeans", {}, [])
    trainer = Trainer(replace(config, commit_every=2), corpus)
    for _ in range(3):
        trainer.train_step()
    save_checkpoint(tmp_path / "stopped", trainer.checkpoint())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pending")
        code, document = invoke("export", tmp_path / "stopped", "--out", tmp_path / "new", *CALIBRATE, "--json")
    assert code == 0, document
    assert not [name for name in load_checkpoint(tmp_path / "new").tensors if name.startswith("pending.")]
    new = trainer_of(tmp_path / "new")
    assert (new.step, [int(layer.router.pending.num_tokens) for layer in new.model.moe_layers]) == (3, [0, 0])


def test_plain_output_names_the_figures(runs: Path, tmp_path: Path) -> None:
    code, stdout = invoke(
        "convert", runs / "softmax", "--out", tmp_path / "c", *CALIBRATE, "--more-steps", 1, "--plain"
    )
    assert code == 0
    assert ESCAPE not in stdout
    for phrase in ("softmax, aux loss 0.01 -> K-Means, proportional", "top-1", "MaxVio", "mean  ", "validation bits"):
        assert phrase in stdout
    assert f"train on with: kmeans-route train --resume --out {tmp_path / 'c'}" in stdout


def test_refusals_leave_no_checkpoint(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    for arguments, message in (
        (("convert", runs / "kmeans", "--out", out), "must hold a learned router, got K-Means"),
        (("convert", runs / "softmax", "--out", out, "--balance", "aux"), "balance must be one of proportional"),
        (("convert", runs / "softmax", "--out", out, "--start", "seeds"), "start must be one of 'means', 'rows'"),
        (("convert", runs / "softmax", "--out", out, "--tau", 0), "tau must be in [1e-06, inf)"),
        (("convert", runs / "softmax", "--out", runs / "sigmoid"), "already holds a run: name another --out, or"),
        (("convert", runs / "softmax", "--out", runs / "softmax", "--overwrite"), "already holds a run: name another"),
        (("export", runs / "softmax", "--out", out), "must hold K-Means routers, got softmax"),
        (("export", runs / "kmeans", "--out", out, "--router", "kmeans"), "must be softmax or sigmoid, got kmeans"),
        (("export", runs / "kmeans", "--out", out, "--bias", "score"), "a place for bias='score'"),
        (("convert", tmp_path / "absent", "--out", out), "holds no checkpoint"),
        (("inspect", tmp_path / "absent"), "does not exist"),
    ):
        code, document = invoke(*arguments, "--json")
        assert code == 1, arguments
        assert message in document["error"], (arguments, document["error"])
    assert not out.exists()


# inspect


def test_inspect_leaves_out_of_long_names_what_all_share() -> None:
    ends = inspect._shared_ends
    names = [f"model.layers.{layer}.block_sparse_moe.router" for layer in (0, 1, 12)]
    assert ends(names) == ("model.layers.", ".block_sparse_moe.router")
    assert ends(names[:1]) == ("", "")
    assert ends(["a.router", "a.b.router"]) == ("a.", ""), "of the shorter name something is left"
    assert ends(["a", "b"]) == ("", "")
    assert ends(["x.1.a", "x.2.b"]) == ("x.", "")


def test_inspect_a_run(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, document = invoke("inspect", runs / "kmeans", "--out", tmp_path / "pictures", "--json")
    assert code == 0
    assert list(document["routers"]) == NAMES
    trainer = trainer_of(runs / "kmeans")
    counts = trainer.evaluate(sample=False).tokens_per_expert
    for facts, count, layer in zip(document["routers"].values(), counts, trainer.model.moe_layers, strict=True):
        router = layer.router
        assert (facts["kind"], facts["experts"], facts["hidden"], facts["steps"]) == ("kmeans", 4, 16, 7)
        assert facts["load"] == pytest.approx(metrics.load(count).tolist())
        assert facts["max_vio"] == pytest.approx(float(metrics.max_vio(count)))
        assert facts["dead_experts"] == int((count == 0).sum())
        assert facts["bias"] == pytest.approx(router.expert_bias.tolist())
        assert all((lag is None) == (one == 0) for lag, one in zip(facts["lag_degrees"], count.tolist(), strict=True))
    assert [Path(file).name for file in document["files"]] == ["directions.png", "load.png"]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in document["files"])
    code, stdout = invoke("inspect", runs / "kmeans", "--plain")
    assert code == 0
    assert "blocks.1.moe.router  kmeans" in stdout
    code, document = invoke("inspect", runs / "sigmoid", "--json")
    assert code == 0
    assert {facts["kind"] for facts in document["routers"].values()} == {"learned"}
    assert all("lag_degrees" not in facts and "load" in facts for facts in document["routers"].values())


def test_inspect_takes_off_what_all_directions_share(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the picture of whitened directions alone; the rule is told from the state."""
    pytest.importorskip("matplotlib")
    drawn: list[tuple[dict[str, torch.Tensor], list[str]]] = []

    def draw(similarities: dict[str, torch.Tensor], *, less_mean: list[str]) -> Any:
        drawn.append((similarities, less_mean))
        return viz.new_figure(1.0)

    monkeypatch.setattr(viz, "direction_similarity", draw)
    plain = ["--text", runs / "text", "--steps", 4, "--threads", 1, *SIZES.split(), "--router-option"]
    assert invoke("train", *plain, "directions=centroids", "--out", tmp_path / "plain", "--json")[0] == 0
    for folder, rule in ((runs / "kmeans", "whitened"), (tmp_path / "plain", "centroids")):
        code, document = invoke("inspect", folder, "--out", tmp_path / rule, "--json")
        assert code == 0
        label = f"kmeans, {rule}, 4 experts"
        similarities, less_mean = drawn.pop()
        assert (list(similarities), less_mean) == ([label], [label] * (rule == "whitened"))
        cosine = {"whitened": metrics.differences_cosine, "centroids": metrics.pairwise_cosine}[rule]
        for layer, (name, facts) in enumerate(document["routers"].items()):
            assert facts["directions"] == rule
            weight = trainer_of(folder).model.get_submodule(name).weight
            torch.testing.assert_close(similarities[label][layer], cosine(weight))
            assert facts["nearest_cosine"] == pytest.approx(
                float(metrics.nearest_cosine(metrics.differences_cosine(weight))), abs=1e-6
            )
    code, said = invoke("inspect", runs / "kmeans", "--plain")
    assert "nearest: cosine with the direction most alike, the mean of all taken off; near 1 two act as one" in said
    assert "commits: after the one that set the centroids" in said
    assert "drift" not in said, "no column, no legend"
    code, said = invoke("inspect", tmp_path / "plain", "--against", tmp_path / "plain", "--plain")
    assert "drift: degrees since --against" in said
    code, said = invoke("inspect", runs / "softmax", "--plain")
    assert "commits" not in said.partition("\n\n")[2], "learned routers make none"


def test_lag_is_the_angle_to_the_tokens_of_now(runs: Path) -> None:
    """A centroid set to the mean of its tokens has no lag; one turned by 90 degrees has that."""
    trainer = trainer_of(runs / "kmeans")
    layer = trainer.model.moe_layers[0]
    x: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    trainer.evaluate(sample=False)
    rows = torch.nn.functional.normalize(torch.cat([one.reshape(-1, 16) for one in x]), dim=1)
    ids = layer.router.route(rows).indices
    means = torch.stack([rows[(ids == e).any(1)].sum(0) for e in range(4)])
    routers = inspect.describe(inspect.state_of(runs / "kmeans"))
    want = torch.rad2deg(metrics.centroid_drift(layer.router.centroids, means))
    run = Trained(runs / "kmeans", [])
    inspect.add_loads(routers, run.model, run.windows(512)[1], run.forward)
    for got, angle, mean in zip(routers[NAMES[0]]["lag_degrees"], want.tolist(), means, strict=True):
        assert got == (pytest.approx(angle, abs=0.05) if mean.any() else None)


def test_inspect_drift_against_an_earlier_checkpoint(runs: Path, tmp_path: Path) -> None:
    corpus = load_corpus([runs / "text"])
    state = inspect.state_of(runs / "kmeans")
    turned = {name: value.clone() for name, value in state.items()}
    weight = turned[f"{NAMES[0]}.weight"]
    swapped = weight.clone()
    swapped[:, 0], swapped[:, 1] = -weight[:, 1], weight[:, 0]
    turned[f"{NAMES[0]}.weight"] = swapped
    torch.save({"model": turned, "step": 3, "note": corpus.name}, tmp_path / "earlier.pt")
    code, document = invoke("inspect", runs / "kmeans", "--against", tmp_path / "earlier.pt", "--json")
    assert code == 0
    first, second = (document["routers"][name]["drift_degrees"] for name in NAMES)
    assert first == pytest.approx(torch.rad2deg(metrics.centroid_drift(swapped, weight)).tolist(), abs=1e-3)
    assert max(first) > 1
    assert max(second) < 1e-3
    del turned[f"{NAMES[1]}.weight"]
    torch.save(turned, tmp_path / "other.pt")
    code, document = invoke("inspect", runs / "kmeans", "--against", tmp_path / "other.pt", "--json")
    assert code == 1
    assert f"must hold router {NAMES[1]} with weight (4, 16), got none" in document["error"]


def test_inspect_plain_state_dicts(tmp_path: Path) -> None:
    kmeans = KMeansRouter(8, 4, 2)
    kmeans.expert_bias.copy_(torch.tensor([0.5, -0.25, -0.25, 0.0]))
    state = {f"model.layers.10.mlp.gate.{name}": value for name, value in kmeans.state_dict().items()}
    state |= {
        "model.layers.2.mlp.gate.weight": torch.eye(4, 8),
        "model.layers.2.mlp.gate.e_score_correction_bias": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "model.layers.3.block_sparse_moe.router.weight": torch.full((3, 8), torch.nan),
        "model.layers.2.mlp.gate_proj.weight": torch.ones(4, 8),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(8, 8),
        "model.layers.2.mlp.up.bias": torch.ones(8),
    }
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        code, document = invoke("inspect", tmp_path / name, "--json")
        assert code == 0
        routers = document["routers"]
        assert [key.split(".")[2] for key in routers] == ["2", "3", "10"]
        learned, broken, ours = routers.values()
        assert (learned["kind"], learned["bias_abs_max"], learned["direction_cosine"]) == ("learned", 1.0, 0.0)
        assert (broken["finite"], broken["experts"]) == (False, 3)
        assert (ours["kind"], ours["initialized"], ours["bias_abs_max"], ours["steps"]) == ("kmeans", False, 0.5, 0)
        assert "load" not in ours
    code, stdout = invoke("inspect", tmp_path / "model.pt", "--plain")
    assert "kmeans, no data yet" in stdout
    assert "warning: model.layers.3.block_sparse_moe.router holds NaN or Inf" in stdout


def test_inspect_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"x": Trainer}, tmp_path / "code.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    torch.save({"a.weight": torch.ones(64, 64)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:10_000])
    for name, message in (
        ("none.pt", "holds no router: looked for NAME.weight"),
        ("list.pt", "must hold a state dict, got list"),
        ("code.pt", "a state dict that torch.save wrote, got a file that holds other things"),
        ("broken.safetensors", "is no readable state dict"),
        ("broken.pt", "broken.pt must be a .safetensors file or a state dict"),
        ("cut.pt", "cut.pt is no readable state dict"),
    ):
        code, document = invoke("inspect", tmp_path / name, "--json")
        assert code == 1
        assert message in document["error"], name
