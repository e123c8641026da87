"""`cmt eval`: figures of a trained stage, and the reference statistics that they are taken against."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import NamedTuple

from cmt_fast.cli.parser import checked
from cmt_fast.config import loading, recipes
from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import intervals, judges, references
from cmt_fast.objectives import check_steps
from cmt_fast.report import scales as scales_
from cmt_fast.report import verdict
from cmt_fast.report.figures import plain
from cmt_fast.run import folder, telling, workspace
from cmt_fast.runtime import distributed, machine, progress
from cmt_fast.storage import checkpoint


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=evaluate)
    p.add_argument(
        "stage",
        metavar="RUN/STAGE",
        help="a stage of a run, such as runs/digits/post; with --make-reference also a recipe",
    )
    p.add_argument("--steps", default="1,2", help="comma-separated numbers of network calls (default: 1,2)")
    text = "samples (default: the recipe's); with --make-reference rows (default: all)"
    p.add_argument("-n", "--samples", "--n", dest="n", type=int, help=text)
    p.add_argument("--seed", type=int, help="seed of the noise (default: the recipe's)")
    p.add_argument("--solver", action="store_true", help="integrate the ODE, as a diffusion model is sampled")
    p.add_argument(
        "--guidance",
        metavar="W[,V...]",
        help="scales, each judged: of the solver, or what a network with model.guided is told; kept for the report",
    )
    p.add_argument("--metric", help="frechet, fid or fd_dinov2 (default: the recipe's, as for all below)")
    p.add_argument("--reference", help="statistics: own .npz or .safetensors, ADM's or EDM's .npz, EDM2's .pkl")
    p.add_argument("--weights", help="file of the extractor's weights: .pth, .pt or .safetensors")
    p.add_argument("--vae", metavar="FOLDER_OR_ID", help="the autoencoder (default: the one that the store names)")
    p.add_argument("--labels", help="law of the samples' labels: data, uniform, or a .npy or .npz of labels or counts")
    p.add_argument("--batch", type=int, help="samples at a time")
    p.add_argument(
        "--precision-recall", action="store_true", help="refuse to go without them; else given where they can be had"
    )
    p.add_argument("--make-reference", type=Path, metavar="FILE", help="write the data set's statistics and stop")
    p.add_argument(
        "--features", type=int, default=10_000, help="--make-reference: features kept for precision and recall"
    )
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


def evaluate(args: argparse.Namespace) -> None:
    try:
        steps = tuple(int(s) for s in args.steps.split(","))
    except ValueError:
        raise ConfigError(f"--steps: {args.steps!r} is not a list of numbers like 1,2") from None
    if args.n is not None and args.n < 2:
        raise ConfigError(f"--n: {args.n} is not at least 2")
    keys = ("metric", "reference", "weights", "vae", "labels", "batch")
    given = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    if args.make_reference:
        return _make_reference(args, given)
    distributed.start(machine.device("auto"))
    work, stage = workspace.open_stage(args.stage, given)
    work.setting.check_steps(steps, args.solver, "--steps")
    scales = telling.scales(args.guidance) if args.guidance is not None else ()
    settings = [telling.asked(work, stage, args.solver, w) for w in scales or (None,)]
    if not args.solver:
        check_steps(work.run.stages[stage].objective, steps, "--steps")
    net, n = work.network(stage, together=True), args.n or work.run.eval.n
    judge = checked(lambda: work.judging.open_judge(args.precision_recall, samples=n))
    with work.judging.going_on(stage, work.finished(stage).manifest):
        one = lambda how: work.judging.at(how).evaluate(net, steps, n, args.solver, args.seed, judge)
        found = [checked(functools.partial(one, how)) for how in settings]
        floor = checked(lambda: work.judging.floor(judge, n))
        if distributed.rank() == 0:
            shown = Shown(args, work, judge, dict(zip(scales, found)))
            if scales:
                ema = checkpoint.ema_sum(work.finished(stage).manifest)
                scales_.keep(work.stage_dir(stage), stage, ema, [_set(shown, w) for w in scales])
            _say(shown, found[0], floor)


class Shown(NamedTuple):
    """What was judged: figures by scale of guidance, where scales were asked for."""

    args: argparse.Namespace
    work: workspace.Workspace
    judge: judges.Judge
    scales: dict[float, dict]

    @property
    def n(self) -> int:
        """Samples of each."""
        return self.args.n or self.work.run.eval.n


def _set(shown: Shown, scale: float) -> dict:
    """The figures at a scale, as `report/scales.py` keeps them."""
    args, work, judge, figures = *shown[:3], shown.scales[scale]
    assert judge.kept is not None
    seed = work.run.eval.seed if args.seed is None else args.seed
    interval = None if args.solver else list(work.setting.config.told_guidance[1:])
    return {
        "scale": scale, "interval": interval, "solver": args.solver, "n": shown.n, "seed": seed, "metric": judge.title(shown.n),
        "extractor": judge.name, "second": judge.kept.about["second"], "reference": judge.reference.source,
        "labels": work.judging.about(shown.n, judge)["labels"], **_figures(figures),
    }  # fmt: skip


def _figures(figures: dict) -> dict[str, dict]:
    """Plain numbers and intervals, by number of steps."""
    return {
        "steps": {k: plain(row) for k, row in figures.items()},
        "intervals": {k: _intervals(row) for k, row in figures.items()},
    }


def _say(shown: Shown, figures: dict, floor: dict | None) -> None:
    """The figures of each number of steps, at each scale that was asked for, and of real rows."""
    args, work, judge, n = *shown[:3], shown.n
    against, about = judge.reference, work.judging.about(n, judge)
    assert judge.kept is not None
    told = {f"{w:g}": {key: _set(shown, w)[key] for key in ("interval", *scales_.FIGURES)} for w in shown.scales}
    if shown.scales:
        about.pop("told_guidance", None)  # the recipe's, which nothing here is of
    out = {
        "stage": args.stage,
        "n": n,
        "metric": judge.title(n),
        "extractor": judge.name,
        "second": judge.kept.about["second"],
        "reference": {"source": against.source, "n": against.n, "file": work.run.eval.reference},
        "solver": args.solver,
        **about,
        **({"guidance": told} if told else _figures(figures)),
        "floor": floor and plain(floor),
        "real": {"sharpness": judge.kept.sharpness},
    }
    if args.json:
        print(json.dumps(out, indent=1))
        return
    count = f", {against.n:,} images" if against.n else ""  # public files do not say
    print(f"{args.stage}: features {judge.name}; against {against.source}{count}; second space {out['second']}")
    print(f"labels: {about['labels']}{_protocol(work, judge)}")
    if "told_guidance" in about and not args.solver:
        print(f"told guidance: {about['told_guidance']}")
    if "note" in about:
        print(f"note: {about['note']}")
    for scale, of in shown.scales.items() or [(None, figures)]:
        if scale is not None:
            at = "" if args.solver or scale == 1 else " in [{:g}, {:g}]".format(*work.setting.config.told_guidance[1:])
            print(f"at guidance {scale:g}{at}")
        for k, row in of.items():
            print(f"{k:>4} step{'s' if int(k) > 1 else ' '}  {_line(row, judge.title(n))}")
    if floor:
        print(f"{'floor':>10}  {_line(floor, judge.title(n))}")
    print("in brackets: 95 %, over other samples of the same network; floor: as many real rows")


NAMES = {"frechet_2": "second", "precision_2": "precision (second)", "recall_2": "recall (second)"}


def _line(row: dict, title: str) -> str:
    """Figures of one set of samples, the distances first."""
    first = [key for key in ("frechet", "frechet_2") if key in row]
    rest = [key for key in plain(row) if key not in first]
    parts = []
    for key in first + rest:
        value = verdict.distance(row, key) if key in first else row[key]
        parts.append(f"{title if key == 'frechet' else NAMES.get(key, key)} {verdict.text(value, '.4f')}")
    return "  ".join(parts)


def _intervals(row: dict) -> dict[str, list[float]]:
    """The ends of 95 % intervals, of what has one."""
    found = {key: intervals.interval(row[key], out) for key, out in row["left_out"].items()}
    return {key: [of.low, of.high] for key, of in found.items() if of}


def _protocol(work: workspace.Workspace, judge: judges.Judge) -> str:
    """What to know of labels where the reference is a public file: ADM, EDM and EDM2 draw them uniformly."""
    law, file = work.setting.law, judge.reference
    if judge.file is None or file.labels or not len(law.counts) or law.even:
        return ""
    return "; the reference does not say its own, published figures of classes are of uniform labels (--labels uniform)"


def _make_reference(args: argparse.Namespace, given: dict) -> None:
    file: Path = args.make_reference
    if file.suffix not in (".npz", ".safetensors") or not file.parent.is_dir():
        raise ConfigError(
            f"--make-reference: {str(file)!r} must be an .npz or .safetensors file in a folder that exists"
        )
    if args.features < 0 or given.get("batch", 1) < 1:
        raise ConfigError("--features and --batch: must be at least 0 and 1")
    distributed.start(machine.device("auto"))
    if args.stage in recipes.recipes() or args.stage.endswith((".yaml", ".yml")):
        work = workspace.Workspace(folder.judged_by(loading.load(args.stage), given), file.parent)
        if work.run.eval.metric == "frechet":
            raise ConfigError("--metric: frechet's features belong to a run; name RUN/STAGE, or take fid or fd_dinov2")
    else:
        work, _ = workspace.open_stage(args.stage, given)
    with progress.counting("reference", args.n or work.data.n, None) as advance:
        made = checked(
            lambda: judges.make_reference(work.judging.judge, args.n, work.run.eval.batch, args.features, advance)
        )
    if distributed.rank() == 0:
        references.write(file, made)
        print(f"{file}: {made.n:,} images, features {made.extractor}")
