"""Mid-training's own questions, asked of the same machine: one objective a path, from `mid`, at the grid's images and rates.

An arm is a few keys that differ from the grid's cell; the arm that differs in none is that cell itself, and the one that others
are compared with. The answer is the distance over that arm's, seed by seed, right after mid-training and after post-training.
Forwards are not equal where a question is about the teacher's work: they stand beside.

An early teacher is a pre-training of its own in OUT/shared, a quarter as long, and teaches a student that begins from the whole
one. Guidance needs a teacher that knows what there is without a label, so both arms of `guided` are of a pre-training with label
dropout, and the student of both begins from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.grid import tuning
from bench.grid.cells import SUITES, Cell, base, run_of
from bench.grid.judged import labelled
from bench.grid.machine import Machine
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.cost import advice

KINDS = {"ve": "ect", "linear": "meanflow"}
LENGTH = "mid.images_nimg"
DROPOUT = ("pre.label_dropout=0.1",)
Arms = dict[str, tuple[str, ...]]


class Question(NamedTuple):
    """asks: in words; key: what an arm's name is a value of; arms: of a suite and a path, one without keys the grid's cell."""

    asks: str
    key: str
    arms: Callable[[str, str], Arms]

    def values(self, suite: str, path: str) -> tuple[str, dict[str, Any]]:
        """The key of a recipe that its arms are values of and the value of each, as `cmt plan` reads them; none where an arm is
        more than a key of mid-training."""
        arms = list(self.arms(suite, path))
        if self.key == LENGTH:
            return advice.SHARE, {arm: int(arm.replace(",", "")) / SUITES[suite].total for arm in arms}
        if self.key.endswith(".order"):
            if path == "ve":
                return self.key, {arm: int(arm.split()[1]) for arm in arms}
            return "mid.trajectories.solver", {arm: arm for arm in arms}
        if self.key.endswith(".t_min"):
            ends = "mid.trajectories.t_max,mid.trajectories.t_min"
            if path == "ve":
                return ends, {arm: [float(t) for t in arm.split(" to ")] for arm in arms}
            return "mid.trajectories.shift", dict(zip(arms, (0.5, 1.0, 2.0), strict=True))
        if self.key.endswith(".guidance"):
            return self.key, {arm: float(arm) for arm in arms}
        plain = {arm: int(arm) for arm in arms if arm.isdigit()}
        return self.key, plain if len(plain) == len(arms) else {}


def _points(suite: str, path: str) -> Arms:
    trajectories = base(suite, path).mid.trajectories
    own = trajectories.per_trajectory if trajectories else 0
    return {str(n): (f"mid.trajectories.per_trajectory={n}",) * (n != own) for n in (1, 2, 4, 8, 16) if _pairs(path, n)}


def _pairs(path: str, n: int) -> bool:
    """A flow map's trajectory of eight Heun steps has pairs enough for all of these."""
    return path == "ve" or n <= 8


def _pool(suite: str, path: str) -> Arms:
    return {str(n): (f"mid.trajectories.pool_steps={n}",) * (n != 10) for n in (2, 10, 50)}


def _solver(suite: str, path: str) -> Arms:
    if path == "ve":
        return {f"dpmpp {k}": (f"mid.trajectories.order={k}",) * (k != 3) for k in (1, 2, 3)}
    euler = ("mid.trajectories.solver=euler",)
    return {"euler": euler, "heun": ()}


def _calls(suite: str, path: str) -> Arms:
    return {str(n): (f"mid.trajectories.nfe={n}",) * (n != 16) for n in (8, 16, 32)}


def _end(suite: str, path: str) -> Arms:
    """On VE trajectories that stop short at an end; on linear flow the same nodes moved."""
    if path == "ve":
        return {
            "80 to 0.002": (),
            "80 to 0.2": ("mid.trajectories.t_min=0.2",),
            "20 to 0.002": ("mid.trajectories.t_max=20.0",),
        }
    return {
        "towards data": ("mid.trajectories.shift=0.5",),
        "even": (),
        "towards noise": ("mid.trajectories.shift=2.0",),
    }


def _length(suite: str, path: str) -> Arms:
    lengths = SUITES[suite]
    whole = lengths.batch * 10
    parts = sorted({max(1, round(lengths.total * f / whole)) * whole for f in (0.05, 0.125, 0.25, 0.5, 0.75)})
    changed = lambda n: (f"mid.images_nimg={n}", f"mid.warmup_nimg={n // 5}")
    return {f"{n:,}": changed(n) if n != lengths.mid else () for n in parts}


def _guided(suite: str, path: str) -> Arms:
    return {"1": DROPOUT, "1.5": (*DROPOUT, "mid.trajectories.guidance=1.5")}


def _teacher(suite: str, path: str) -> Arms:
    return {"whole": (), "quarter": ("mid.teacher={early}",)}


QUESTIONS = {
    "points": Question("How many points of each trajectory?", "mid.trajectories.per_trajectory", _points),
    "pool": Question("How many steps from one round of trajectories?", "mid.trajectories.pool_steps", _pool),
    "solver": Question("Which solver, at 16 calls?", "mid.trajectories.order", _solver),
    "calls": Question("How many calls a trajectory?", "mid.trajectories.nfe", _calls),
    "end": Question("Which end of time?", "mid.trajectories.t_min", _end),
    "length": Question("How long before post-training, at equal images?", LENGTH, _length),
    "teacher": Question("How good a teacher?", "pre.images_nimg", _teacher),
    "guided": Question("A guided teacher?", "mid.trajectories.guidance", _guided),
}


def named(name: str) -> list[str]:
    """The questions that are asked. Raises ConfigError for another word."""
    if name == "all":
        return list(QUESTIONS)
    if name not in QUESTIONS:
        raise ConfigError(
            f"--question: {name!r} is none; valid are all, {', '.join(QUESTIONS)}{nearest(name, QUESTIONS)}"
        )
    return [name]


def paths(kinds: Sequence[str]) -> list[str]:
    """Those whose objective is asked for; all without a word. Raises ConfigError for another objective."""
    if wrong := [kind for kind in kinds if kind not in KINDS.values()]:
        valid = list(KINDS.values())
        raise ConfigError(
            f"--kinds: {wrong[0]!r} answers no question; valid are {', '.join(valid)}{nearest(wrong[0], valid)}"
        )
    return [path for path, kind in KINDS.items() if not kinds or kind in kinds]


def cells_of(
    machine: Machine, suite: str, name: str, seeds: Sequence[int], asked: Sequence[str] = tuple(KINDS)
) -> list[Cell]:
    """The cells of a question, those of the grid that serve it among them. asked: paths. Trains the teachers that it needs."""
    out = []
    for path in asked:
        kind = KINDS[path]
        lr = tuning.tuned(machine, suite, kind, path, "mid")["lr"]
        for seed in seeds:
            for arm, more in QUESTIONS[name].arms(suite, path).items():
                cell = Cell(suite, kind, path, "mid", "images", seed, lr)
                if more:
                    found = tuple(text.format(early=early(machine, cell)) if "{" in text else text for text in more)
                    cell = cell._replace(arm=labelled(name, arm), more=found)
                out.append(cell)
    return out


def early(machine: Machine, cell: Cell) -> str:
    """RUN/pre of a pre-training a quarter as long, trained where it is not there."""
    short = cell._replace(arm="early", more=(f"pre.images_nimg={SUITES[cell.suite].pre // 4}",))
    folder = machine.shared(short, run_of(short), "pre")
    return str(folder / "pre")
