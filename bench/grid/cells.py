"""What a cell of the grid is, and the run that it stands for.

A cell is (objective, start, equal in what, seed), and it is a run like any other: the recipe's networks, data and judge, with the
post stage in the place of the recipe's. Its starts:

    scratch    random weights
    pre        the pre-trained diffusion model, which is the control
    mid        the same after mid-training, by the loss that `objectives.mid.prepares` gives for the objective
    anchored   as mid, and post-training keeps the recipe's share of its rows on the mid-training loss

Equal in images: `total` student images, those of mid-training among them. Equal in forwards: as many forwards of student and
teacher (a backward counts as two, a tangent as one) as the cell from `mid` makes, rollouts among them; so `mid` is the same
cell in both, and the others get more images or fewer. What scratch saves by having no pre-training is given to nobody.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from cmt_fast.config import fingerprint, loading
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.overrides import apply as override
from cmt_fast.config.schema import DIFFUSION, Run
from cmt_fast.cost import flops
from cmt_fast.objectives import OBJECTIVES, taught
from cmt_fast.objectives.mid import prepares
from cmt_fast.run.resolved import ResolvedStage, resolve

STARTS = ("scratch", "pre", "mid", "anchored")
EQUAL = ("images", "forwards")
ALONE = "cmt"  # in the place of an objective: mid-training alone, for all the images
POOL_STEPS = 10  # of every pool: lengths are whole rounds, so that what is rolled out is what is counted
WARMUP_STEPS = 10
WORTH = {"forward": 1, "backward": 2, "tangent": 1}


class Suite(NamedTuple):
    """A data set of the grid: the recipe of each path, and lengths in student images. n: samples of a distance."""

    recipes: dict[str, str]
    batch: int
    pre: int
    mid: int
    total: int
    n: int = 2000


SUITES = {
    "digits": Suite({"ve": "digits", "linear": "digits-mf"}, 64, pre=51_200, mid=3_200, total=12_800),
    "photos": Suite({"ve": "photos", "linear": "photos"}, 32, pre=24_000, mid=960, total=3_840),
}
# settings of objectives that differ from the schema's: those that the recipes' controls were tuned to, alike for all starts
_ECT = {"q": 16.0, "b": 1.0, "k": 8.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "ect": _ECT,
    "ecd": _ECT,
    "meanflow": {"ratio": 0.75},
}
WARMING = ("sct", "scd")  # whose tangents' share grows over a quarter of the images
SETS = ("drift",)  # whose sets are as many rows as an anchored cell leaves it, a quarter of a batch


class Variant(NamedTuple):
    """An objective with other settings than its row of the shelf, and what it changes of the whole run, its network say."""

    kind: str
    settings: dict[str, Any]
    more: tuple[str, ...] = ()

    def fits(self, run: Run) -> bool:
        """Whether the run's network has the keys that this changes."""
        keys = [text.partition("=")[0].removeprefix("model.") for text in self.more if text.startswith("model.")]
        return all(hasattr(run.model, key) for key in keys)


# rows beside the shelf's own, where the schema has them
_HEAD = ("model.log_variance=true",)  # of a network, and so of a pre-training, of its own
VARIANTS = {
    "lagrangian-taught": Variant("lagrangian", {"velocity": "teacher"}),
    "sct-learned": Variant("sct", {"uncertainty": True}, _HEAD),
    "scd-learned": Variant("scd", {"uncertainty": True}, _HEAD),
    "imeanflow-head": Variant("imeanflow", {"head": True}, ("model.velocity_head=1",)),
}


class Cell(NamedTuple):
    """One run of the grid. arm: of a question, with what it changes of the run as `a.b=value` overrides."""

    suite: str
    kind: str
    path: str
    start: str
    equal: str
    seed: int
    lr: float
    arm: str = ""
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file and its folder."""
        arm = f"{self.arm}-" if self.arm else ""
        return f"{arm}{self.kind}-{self.path}-{self.start}-{self.equal}-{self.seed}-lr{self.lr:g}"


def objectives(asked: Sequence[str] = (), suite: str = "digits") -> list[tuple[str, str]]:
    """(kind, path) of what the grid is over; asked: kinds, or KIND@PATH. Raises ConfigError for what is no such kind. A variant
    whose network the suite does not have is not in it."""
    shelf = [
        (name, path)
        for name in (*OBJECTIVES, *VARIANTS)
        if (spec := OBJECTIVES.get(kind_of(name))) and kind_of(name) not in DIFFUSION and spec.draws == "data"
        for path in ("ve", "linear")
        if spec.on(path) and (name not in VARIANTS or VARIANTS[name].fits(base(suite, path)))
    ]
    if not asked:
        return shelf
    found = []
    for name in asked:
        kind, _, path = name.partition("@")
        own = [(k, p) for k, p in shelf if k == kind and path in ("", p)]
        if not own:
            valid = list(dict.fromkeys(k for k, _ in shelf))
            raise ConfigError(
                f"--kinds: {name!r} is not in the grid of {suite}; valid are {', '.join(valid)}{nearest(kind, valid)}"
            )
        found += own
    return found


def of_kind(suite: str, kind: str, path: str, seed: int, rates: dict[str, float], starts: Sequence[str]) -> list[Cell]:
    """The cells of one objective and seed. rates: of each start."""
    return [
        Cell(suite, kind, path, start, equal, seed, rates[start])
        for start in starts
        for equal in EQUAL
        if (start, equal) != ("mid", "forwards")  # which is the same cell
    ]


def run_of(cell: Cell) -> Run:
    """The run of a cell, its lengths among it. Raises ConfigError for an objective that the schema does not have."""
    run, lengths = _run(cell, None), SUITES[cell.suite]
    if cell.equal == "images" or cell.kind == ALONE:
        return run
    mid = _run(cell._replace(start="mid", equal="images"), None)
    wanted = sum(sum(work(resolve(mid, name)).values()) for name in ("mid", "post"))
    wanted -= sum(work(resolve(run, "mid")).values()) if run.post.start == "mid" else 0
    each = sum(per_image(resolve(run, "post")).values())
    whole = lengths.batch * (POOL_STEPS if resolve(run, "post").trajectory_rows else 1)
    return _run(cell, max(1, round(wanted / each / whole)) * whole)


def _run(cell: Cell, images: int | None) -> Run:
    """images: of post-training, None: what mid-training leaves of the total."""
    suite, run = SUITES[cell.suite], base(cell.suite, cell.path)
    tree = {**loading.dump(run), "seed": cell.seed}
    quiet = {"eval_every_nimg": None, "grid_every_nimg": None, "checkpoint_every_s": 120.0}
    tree["pre"] |= {**quiet, "images_nimg": suite.pre, "batch": suite.batch}
    tree["mid"] |= {**quiet, "batch": suite.batch, "images_nimg": suite.mid, "warmup_nimg": suite.mid // 5}
    tree["mid"]["trajectories"] |= {"pool_steps": POOL_STEPS}
    tree["eval"] |= {"n": suite.n, "steps": [1, 2]}
    if cell.kind == ALONE:
        tree["mid"] |= {"images_nimg": suite.total, "warmup_nimg": suite.total // 5}
        override(tree, list(cell.more))
        return loading.build(tree)
    objective = {**settings(cell.kind, run, suite), "kind": kind_of(cell.kind)}
    start = {"scratch": None, "pre": "pre"}.get(cell.start, "mid")
    rolled = {**tree["post"]["trajectories"], "pool_steps": POOL_STEPS} if cell.start == "anchored" else None
    tree["post"] |= {
        **quiet, "objective": objective, "start": start, "lr": cell.lr, "batch": suite.batch, "trajectories": rolled,
        "anchor": tree["post"]["anchor"] if cell.start == "anchored" else None,
        "warmup_nimg": WARMUP_STEPS * suite.batch, "ema": [{"kind": "constant"}],
    }  # fmt: skip
    override(tree, [*VARIANTS[cell.kind].more, *cell.more] if cell.kind in VARIANTS else list(cell.more))
    # after what a question changes: it may be the length of mid-training
    left = suite.total - (int(tree["mid"]["images_nimg"]) if start == "mid" else 0)
    tree["post"]["images_nimg"] = left if images is None else images
    built = loading.build(tree)
    keys = {} if rolled or taught(built.post.objective) else {"teacher": None}
    built = dataclasses.replace(built, post=dataclasses.replace(built.post, **keys))
    assert prepares(built.post.objective, built.path).kind == built.mid.objective.kind
    return built


@functools.lru_cache(maxsize=8)
def base(suite: str, path: str) -> Run:
    """The recipe that cells of a path are made from. A suite that has it for the other path alone takes the stages' objectives,
    trajectories and sampler of this path from digits."""
    run = loading.load(SUITES[suite].recipes[path])
    if run.path != path:
        other, tree = loading.dump(loading.load(SUITES["digits"].recipes[path])), loading.dump(run)
        tree |= {"path": path, "sampler": other["sampler"]}
        for name in ("pre", "mid", "post"):
            for key in ("objective", "trajectories", "anchor"):
                tree[name][key] = other[name][key]
        run = loading.build({**tree, "control": None})
    return dataclasses.replace(run, control=None)


def kind_of(name: str) -> str:
    """The objective's kind, of a variant that of the objective that it is one of."""
    return VARIANTS[name].kind if name in VARIANTS else name


def settings(name: str, run: Run, suite: Suite) -> dict[str, Any]:
    """Of an objective: SETTINGS, and the constant of a distance as the recipe's own post-training has it."""
    own, kind = dataclasses.asdict(run.post.objective), kind_of(name)  # type: ignore[call-overload]
    found = {"c": own["c"]} if "distance" in own and kind in ("ect", "ecd") else {}
    found |= {"warmup_nimg": suite.total // 4} if kind in WARMING else {}
    found |= {"group": suite.batch // 4} if kind in SETS else {}
    return {**found, **SETTINGS.get(kind, {}), **(VARIANTS[name].settings if name in VARIANTS else {})}


def per_image(stage: ResolvedStage) -> dict[str, float]:
    """Forwards for one student image, of student and teacher: a backward is two, a tangent one."""
    out = {"student": 0.0, "teacher": 0.0}
    for term in flops.terms(stage):
        if term.of in out:
            out[term.of] += term.times * WORTH.get(term.kind, 0)
    return out


def work(stage: ResolvedStage) -> dict[str, float]:
    """Forwards of a whole stage, of student and teacher."""
    plan = stage.schedule
    return {of: each * plan.total * plan.batch for of, each in per_image(stage).items()}


def spent(cell: Cell, run: Run) -> dict[str, Any]:
    """Images and forwards of a cell's stages: {"images": {stage: n}, "forwards": {"student", "teacher"}}."""
    names = ["mid"] if cell.kind == ALONE else ["mid", "post"] if run.post.start == "mid" else ["post"]
    stages = [resolve(run, name) for name in names]
    both = [work(stage) for stage in stages]
    return {
        "images": {s.name: s.schedule.total * s.schedule.batch for s in stages},
        "forwards": {of: round(sum(w[of] for w in both)) for of in ("student", "teacher")},
    }


def digest(run: Run) -> str:
    """Of all that a cell's figures depend on but the code."""
    return fingerprint.digest(run)
