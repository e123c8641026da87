"""Guidance is refused where it means nothing: no trained null class, no labels, nothing to guide, or a guide that cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from cmt_fast import api
from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.diffusion.guidance import Autoguided, Guided
from cmt_fast.engine import LocalEngine
from cmt_fast.run import guidance
from cmt_fast.run.folder import RUN_FILE
from cmt_fast.run.workspace import Workspace, open_stage
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from tests.fixtures.small import recipe
from tests.fixtures.tiny import source_of, tiny
from tests.models.test_unets import RECIPES

ALONE = ["post.anchor=null", "post.trajectories=null"]
ECD = [*ALONE, "post.objective={kind: ecd}"]
SCD = [*ALONE, "post.objective={kind: scd}"]
UNREAD = "model={kind: edm, width: 8, multipliers: [1, 2], blocks: 1, attention: [4], conditional: false}"
MF, FROM_NOTHING = "post.objective={kind: meanflow, %s}", ["post.start=null", "post.teacher=null", *ALONE]
DROPS = "pre.label_dropout=0.1"

# recipe, overrides, words of the line
REFUSED = [
    ("digits", ["mid.trajectories.guidance=2"], ["mid.trajectories.guidance: 2.0 guides pre", "pre.label_dropout is 0"]),
    ("digits", ["mid.trajectories.guidance=0.5"], ["mid.trajectories.guidance: 0.5", "null class is not trained"]),
    ("digits", ["post.trajectories.guidance=2"], ["post.trajectories.guidance: 2.0 guides pre", "post.autoguidance"]),
    ("digits", [DROPS, *ALONE, "post.trajectories={guidance: 2}"], ["post.trajectories.guidance", "guides nothing here, ect"]),
    ("digits", ["post.teacher_guidance=2", DROPS], ["post.teacher_guidance", "guides nothing here, ect", "of ecd, scd, ayf"]),
    ("digits", [*ECD, "post.teacher_guidance=2"], ["post.teacher_guidance: 2.0 guides pre", "is not trained", "published: 0.1"]),
    ("digits", [*SCD, "post.teacher_guidance=2"], ["post.teacher_guidance: 2.0 guides pre", "is not trained"]),
    ("digits", ["sampler.guidance=2"], ["sampler.guidance: 2.0 guides pre", "is not trained", "sampler.guidance 1"]),
    ("gmm", ["sampler.guidance=2"], ["sampler.guidance: 2.0", "class labels", "data has none"]),
    ("gmm", [DROPS], ["pre.label_dropout", "class labels", "data has none"]),
    ("digits", [UNREAD, DROPS], ["pre.label_dropout", "this network reads none (model.conditional: false)"]),
    ("digits", [UNREAD, "sampler.guidance=2"], ["sampler.guidance", "model.conditional: false"]),
    ("digits", ["pre.label_dropout=1"], ["pre.label_dropout: 1.0", "no class is learned"]),
    ("digits", ["mid.label_dropout=0.1"], ["mid.label_dropout: 0.1 with cmt_cm", "teacher pre", "is not trained"]),
    ("digits-mf", ["mid.label_dropout=0.1"], ["mid.label_dropout: 0.1 with cmt_mf", "teacher pre", "is not trained"]),
    ("digits", [*ECD, "post.label_dropout=0.1"], ["post.label_dropout: 0.1 with ecd", "teacher pre", "is not trained"]),
    ("digits-mf", [MF % "omega: 3"], ["post.objective.omega: 3.0", "begun from mid", "post.label_dropout"]),
    ("digits-mf", [MF % "kappa: 0.5"], ["post.objective.omega: 1.0 with kappa 0.5", "null class"]),
    ("digits-mf", [MF.replace("meanflow", "imeanflow") % "omega: 3"], ["post.objective.omega: 3.0"]),
    ("digits-mf", [*FROM_NOTHING, DROPS, MF % "omega: 3"], ["post.objective.omega", "post.label_dropout is 0"]),
    ("digits-mf", [MF % "omega: 1, kappa: 1", "post.label_dropout=0.1"], ["post.objective.kappa: 1.0", "not below 1"]),
    ("digits-mf", [MF % "omega: 2, guide_t_min: 0.5, guide_t_max: 0.5", DROPS], ["guide_t_max: 0.5", "no time is guided"]),
    ("digits", [*SCD, "post.autoguidance={network: pre}"], ["post.autoguidance.network: 'pre' is the teacher itself"]),
    ("digits", [*SCD, "post.autoguidance={network: mid}"], ["the guide mid is trained by cmt_cm, for few steps"]),
    ("digits", ["post.teacher=mid", *SCD, "post.autoguidance={network: pre}"], ["the teacher mid is trained by cmt_cm"]),
]  # fmt: skip
TAKEN = [
    ("digits", [DROPS, "mid.trajectories.guidance=2", "sampler.guidance=2"]),
    ("digits", [DROPS, *ECD, "post.teacher_guidance=2", "post.label_dropout=0.1"]),
    ("digits", [DROPS, "mid.label_dropout=0.1"]),
    ("digits-mf", [DROPS, MF % "omega: 3"]),  # roughly kept by mid, which drops none
    ("digits-mf", [MF % "omega: 3", "post.label_dropout=0.1"]),
    ("digits-mf", [*FROM_NOTHING, MF % "omega: 3", "post.label_dropout=0.1"]),
    ("digits-mf", [MF % "omega: 0.2, kappa: 0.8"]),  # the null class has no weight
    ("digits", [*SCD, "post.autoguidance={network: not/here/pre}"]),  # asked when it is there
]


@pytest.mark.parametrize("name, overrides, words", REFUSED, ids=lambda v: "")
def test_what_means_nothing_is_one_line(name: str, overrides: list[str], words: list[str], tmp_path: Path) -> None:
    """NVlabs/Sana#188 and mlfoundations/open-diffusion#6: training that drops no condition, sampled with guidance."""
    run = loading.load(name, overrides) if name == "gmm" else tiny(name, *overrides)
    with pytest.raises(ConfigError) as error:
        Workspace(run, tmp_path / "run")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name, overrides", TAKEN, ids=lambda v: "")
def test_what_means_something_is_taken(name: str, overrides: list[str], tmp_path: Path) -> None:
    Workspace(tiny(name, *overrides), tmp_path / "run")


def test_the_commands_say_it_before_anything_runs(tmp_path: Path, capsys) -> None:
    tree = loading.dump(tiny("digits", "sampler.guidance=2"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    mine, out = str(tmp_path / "mine.yaml"), ["--out", str(tmp_path / "run")]
    for command in (
        ["train", mine, *out],
        ["train", mine, "--dry-run", *out],
        ["recipes", "validate", mine],
        ["tune-teacher", mine, *out],
        ["trajectories", mine, "--from", str(tmp_path / "run"), "--cache", str(tmp_path / "store"), "--n", "8"],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "sampler.guidance: 2.0 guides pre, whose null class is not trained" in line
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


# ------------------------------------------------------------------------------------------ stages that stand already


def weights(run, folder: Path, scale: float = 1.0, parent: dict | None = None, stage: str = "pre") -> Path:
    """A finished stage of weights that no training made, in a run's folder: no gate of theirs is shut."""
    work = Workspace(run, folder, reading=True)
    work.claim()
    dice = torch.Generator().manual_seed(0)
    state = {k: scale * (v + 0.05 * torch.randn(v.shape, generator=dice)) for k, v in work.build().state_dict().items()}
    about = {"stage": stage, "nimg": 0, "done": True, "config": "0" * 64, "parent": parent}
    checkpoint.save(folder / stage, 0, {"model": state, "ema-0": state}, about)
    return folder


def test_a_solver_is_not_guided_by_what_was_not_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    """Of a run that is there already: its few-step samples are drawn as ever, guidance is no part of them."""
    monkeypatch.chdir(tmp_path)
    small = ["eval.n=20", "eval.batch=20", "sampler.guidance=2"]
    for name, drops in (("without", 0.0), ("with", 0.1)):
        weights(tiny("digits", *small, f"pre.label_dropout={drops}"), Path(name))
    for command in (
        ["sample", "without/pre", "--n", "4", "--out", "without.npz"],
        ["eval", "without/pre", "--steps", "1", "--n", "20"],
    ):
        assert main(command) == 0
        capsys.readouterr()
        assert main([*command, "--solver"]) == 2
        line = capsys.readouterr().err
        assert (
            line.startswith("cmt: sampler.guidance: 2.0 guides pre, whose null class is not trained")
            and line.count("\n") == 1
        )
        assert main([c.replace("without", "with") for c in command] + ["--solver"]) == 0
    for call in (api.sample, api.evaluate):
        with pytest.raises(ConfigError, match="sampler.guidance: 2.0 guides pre, whose null class is not trained"):
            call("without/pre", solver=True)


def test_few_step_samples_are_not_guided_a_second_time(tmp_path: Path) -> None:
    """caitree/scfm#4: guidance of the teacher, and of what learnt from it, compounds. Here the solver alone is guided."""
    found = {}
    for scale in (1.0, 2.0):
        weights(tiny("digits", f"sampler.guidance={scale}", DROPS), tmp_path / f"{scale}")
        found[scale] = [api.sample(tmp_path / f"{scale}/pre", 4, 2, solver=solver)[0] for solver in (False, True)]
    assert torch.equal(found[1.0][0], found[2.0][0]) and not torch.equal(found[1.0][1], found[2.0][1])


def test_one_class_has_nothing_to_be_guided_from() -> None:
    """facebookresearch/DiT#18: unconditional data as one class, with class_dropout_prob 0."""
    for name, keys in (
        ("digits", "sampler.guidance=2"),
        ("digits", "mid.trajectories.guidance=2"),
        ("digits-mf", MF % "omega: 2"),
    ):
        place = guidance.Place(tiny(name, keys, DROPS))
        guidance.check(place, 2)
        with pytest.raises(ConfigError, match=r"\.(guidance|omega): 2.0 guides nothing where the data has one class"):
            guidance.check(place, 1)
    guidance.check(guidance.Place(tiny("digits", DROPS)), 1)


@pytest.mark.parametrize("known, drops, taken", [
    (True, 0.0, True), (True, 0.1, True), (False, 0.1, False), (False, 0.0, False), (None, 0.1, True), (None, 0.0, False),
    ("absent", 0.1, True), ("absent", 0.0, False),
])  # fmt: skip
def test_an_imported_network_has_what_its_file_says(known, drops: float, taken: bool, tmp_path: Path) -> None:
    """The file's word first; where it says nothing the recipe's, and neither: the line says how to say it."""
    parent = {"stage": "import", "file": "SiT.pt"} | ({} if known == "absent" else {"null_class": known})
    run = tiny("digits-mf", f"pre.label_dropout={drops}", "mid.trajectories.guidance=1.5")
    weights(run, tmp_path / "run", parent=parent)
    if taken:
        Workspace(run, tmp_path / "run")
        return
    with pytest.raises(ConfigError) as error:
        Workspace(run, tmp_path / "run")
    said = "comes of training without dropped labels" if known is False else "import it with pre.label_dropout=0.1"
    assert "SiT.pt" in str(error.value) and said in str(error.value)
    assert ("is not known to be trained" in str(error.value)) == (known is not False)


def test_a_network_of_another_run_has_what_its_run_says(tmp_path: Path) -> None:
    """Its folder's word, not this recipe's: also of a stage that --from takes from elsewhere."""
    for name, drops in (("without", 0.0), ("with", 0.1)):
        weights(tiny("digits", f"pre.label_dropout={drops}"), tmp_path / name)
    mine = lambda name, *more: tiny(
        "digits", f"mid.teacher={tmp_path}/{name}/pre", "mid.trajectories.guidance=2", *more
    )
    Workspace(mine("with"), tmp_path / "run")
    with pytest.raises(
        ConfigError, match="guides .*without/pre, whose null class is not trained: pre.label_dropout is 0"
    ):
        Workspace(mine("without", DROPS), tmp_path / "run")
    here = tiny("digits", DROPS, "mid.trajectories.guidance=2")
    Workspace(here, tmp_path / "run", tmp_path / "with")
    with pytest.raises(ConfigError, match="guides pre, whose null class is not trained"):
        Workspace(here, tmp_path / "run", tmp_path / "without")


def test_training_asks_again_where_a_run_was_opened_to_be_read(tmp_path: Path) -> None:
    folder = weights(tiny("digits", "sampler.guidance=2"), tmp_path / "run")
    work, _ = open_stage(f"{folder}/pre")
    with pytest.raises(ConfigError, match=r"sampler.guidance: 2.0 guides pre"):
        loop.train(work, ["mid"])
    assert not (folder / "mid").exists()


def test_guide_and_teacher_are_two_networks_of_one_space(tmp_path: Path) -> None:
    """The same weights by two names, another scale of the data, and a guide without labels (NVlabs/edm2#12), which may be."""
    run = tiny("digits")
    for name, scale in (("one", 1.0), ("twin", 1.0), ("weak", 0.9)):
        weights(run, tmp_path / name, scale)
    weights(tiny("digits", "sigma_data=0.6"), tmp_path / "other", 0.9)
    weights(tiny("digits", UNREAD), tmp_path / "unread", 0.9)

    def staged(guide: str, *more: str) -> Workspace:
        named = [f"{s}.{key}" for s in ("mid", "post") for key in (f"teacher={tmp_path}/one/pre",)]
        auto = "{network: %s/%s/pre, scale: 2.0, trajectories: true}" % (tmp_path, guide)  # noqa: UP031  braces
        return Workspace(tiny("digits", *named, f"mid.autoguidance={auto}", *more), tmp_path / "run")

    for guide, line in (
        ("twin", "mid.autoguidance.network: has the teacher's own weights"),
        ("other", "its sigma_data is 0.6"),
    ):
        work = staged(guide)
        with pytest.raises(ConfigError, match=line):
            work.external_inputs(work.stage("mid"))
        with pytest.raises(ConfigError, match=line.removeprefix("mid.")):
            work.identity(work.run.mid)
    for guide in ("weak", "unread"):
        work = staged(guide)
        assert set(work.external_inputs(work.stage("mid"))) == {"teacher", "autoguidance.network"}
        assert isinstance(source_of(work, "mid").pool.teacher, Autoguided)


# ------------------------------------------------------------------------------------------ what is trained


def test_a_teacher_is_told_that_a_label_is_dropped(tmp_path: Path) -> None:
    """In ECD a dropped row's step is the unconditional teacher's, and guided nowhere."""
    run = tiny("digits", DROPS, *ECD, "post.teacher_guidance=2", "post.label_dropout=0.4")
    folder = weights(run, tmp_path / "run")
    work = Workspace(run, folder)
    work.network = lambda name, **_: work.build().requires_grad_(False).eval()  # type: ignore[method-assign]
    source = source_of(work, "post")
    drawn = source.draw(0).own
    assert isinstance(source.teacher, Guided)
    assert torch.equal(drawn.labels == 10, drawn.drop) and 0 < int(drawn.drop.sum()) < len(drawn.drop)
    x, t = drawn.x_t, drawn.t
    null = source.teacher.network(x, t, t, drawn.labels.clamp(max=9), drawn.drop)
    assert torch.equal(source.teacher(x, t, t, drawn.labels)[drawn.drop], null[drawn.drop])


NETWORKS = {"dit": {"kind": "dit", "width": 16, "depth": 1, "heads": 2}, "sit": {"kind": "dit", "embeddings": "dit", "width": 16,
            "depth": 1, "heads": 2}}  # fmt: skip


@pytest.mark.parametrize("stage", ["pre", "mid", "post"])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("path", ["ve", "linear"])
def test_an_imported_null_row_is_kept_and_trained_where_labels_are_dropped(
    kind: str, stage: str, path: str, tmp_path: Path
) -> None:
    """Bit for bit the file's row after a stage that drops none; moved by one that does. Class rows move in both."""
    file = recipe(tmp_path, NETWORKS[kind], path)
    imported = {"stage": "import", "file": "x.pt", "null_class": True}
    for drops in (0.0, 0.5):
        length = [f"{s}.{k}" for s in ("pre", "mid", "post") for k in ("images_nimg=32", "batch=8")]
        run = loading.load(str(file), [*length, f"{stage}.label_dropout={drops}", "mid.trajectories.pool_steps=4"])
        folder = weights(run, tmp_path / f"{drops}", parent=imported)
        before = checkpoint.complete(folder / "pre").tensors("ema-0")["net.label.table"]
        if stage == "pre":  # goes on from the imported weights
            work = Workspace(run, tmp_path / f"{drops}-on")
            source = source_of(work, "pre")
            engine = LocalEngine(work.build(), run.pre, work.device)
            engine.start_from(Workspace(run, folder).weights("pre")[0])
            for step in range(4):
                engine.backward(source.loss(engine, step)[0])
                engine.step(1e-3)
            states = [engine.state()[k]["net.label.table"] for k in ("model", "ema-0")]
        else:
            loop.train(Workspace(run, folder), ["mid"] if stage == "mid" else ["mid", "post"])
            done = checkpoint.complete(folder / stage)
            states = [done.tensors(k)["net.label.table"] for k in ("model", "ema-0")]
        for after in states:
            assert torch.equal(after[-1], before[-1]) == (drops == 0.0)
            assert not torch.equal(after[0], before[0])


def test_the_null_class_of_every_network_is_the_label_after_the_last(tmp_path: Path) -> None:
    """The row after the classes of a DiT (huggingface/diffusers#13616 takes 1000, whatever their number), zeros of EDM's."""
    for kind, model in {**RECIPES, "dit": "model={kind: dit, width: 16, depth: 1, heads: 2}"}.items():
        net = Workspace(tiny("digits", model, DROPS), tmp_path).build().eval()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
            x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
            none = net(x, t, None, torch.full((4,), 10))
            assert torch.equal(net(x, t, None, labels, torch.ones(4, dtype=torch.bool)), none), kind
            assert not torch.equal(net(x, t, None, labels), none)
            assert kind == "dit" or torch.equal(net(x, t, None, None), none)  # a DiT is always told


# ------------------------------------------------------------------------------------------ the fact


def test_the_null_class_comes_with_the_network_that_a_stage_starts_from(tmp_path: Path) -> None:
    place = lambda *more: guidance.Place(tiny("digits", *more))
    known = lambda name, *more: guidance.null_class(place(*more), name).trained
    assert [known(s) for s in ("pre", "mid", "post", "control")] == [False] * 4
    assert [known(s, DROPS) for s in ("pre", "mid", "post", "control")] == [True] * 4
    assert [known(s, "control.label_dropout=0.1") for s in ("pre", "post", "control")] == [False, False, True]
    assert known("mid", DROPS, "mid.start=null") is False  # its teacher's is not its own
    assert known("mid", DROPS, "mid.start=null", "mid.label_dropout=0.1") is True
    assert guidance.null_class(place(), f"{tmp_path}/nowhere/pre") is None


def test_a_stored_run_that_moved_keeps_its_word(tmp_path: Path) -> None:
    folder = weights(tiny("digits", DROPS), tmp_path / "run")
    shutil.move(folder, tmp_path / "moved")
    about = json.loads((tmp_path / "moved" / RUN_FILE).read_text())
    assert about["run"]["pre"]["label_dropout"] == 0.1
    found = guidance.null_class(guidance.Place(tiny("digits")), f"{tmp_path}/moved/pre")
    assert found and found.trained and found.why == "pre.label_dropout is 0.1"


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    place = SimpleNamespace(run=SimpleNamespace(sampler=SimpleNamespace(guidance=scale)))
    with pytest.raises(ConfigError, match=f"--guidance: {scale} is not a number"):
        guidance.check_asked(place, "pre", solver=True, classes=10)
