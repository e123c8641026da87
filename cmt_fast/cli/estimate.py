"""`cmt estimate`: what a recipe will cost on given cards, and what each idea saves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.cost import disk, estimate, flops, rounded, savings
from cmt_fast.cost.estimate import Rows
from cmt_fast.cost.hardware import NAMES, RESULTS, Card, card, rate_of
from cmt_fast.engine.sharding import gb
from cmt_fast.run import validation
from cmt_fast.run.resolved import ResolvedStage, resolve


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_estimate)
    p.add_argument("recipe", help="name or YAML file")
    add_overrides(p)
    p.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"{', '.join(NAMES)}; cpu is this processor (default: h100)"
    )
    p.add_argument("--gpus", type=int, default=1, help="number of cards, eight in a machine (default: 1)")
    p.add_argument("--price", type=float, help="price of a GPU-hour, in any currency")
    p.add_argument(
        "--results",
        type=Path,
        help=f"folder of measurements by `python -m bench` of a clone (default: {RESULTS} if it exists)",
    )
    p.add_argument("--explain", action="store_true", help="the formulas with their numbers, for each stage")
    p.add_argument("--json", action="store_true", help="print all figures and the arithmetic as JSON")


def run_estimate(args: argparse.Namespace) -> None:
    if args.gpus < 1:
        raise ConfigError(f"--gpus: {args.gpus} is not valid; it is 1 or more")
    if args.price is not None and not 0 <= args.price < float("inf"):
        raise ConfigError(f"--price: {args.price} is not valid; it is 0 or more")
    if args.results and not args.results.is_dir():
        raise ConfigError(f"--results: {str(args.results)!r} is not a folder")
    run = loading.load(args.recipe, args.overrides)
    at = card(args.gpu, args.results or (RESULTS if RESULTS.is_dir() else None))
    found = figures(run, at, args.gpus, args.price)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for line in [*text(found), *(explained(found) if args.explain else [])]:
        print(line)


def figures(run: Run, at: Card, gpus: int, price: float | None = None) -> dict[str, Any]:
    """All that is printed, as plain data. Raises ConfigError where the run makes no sense or does not divide."""
    rows = estimate.rows_of(run)
    try:
        validation.check(run, rows.shape, rows.classes)
        found = {name: _stage(resolve(run, name), rows, at, gpus, price) for name in run.stages}
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    trained = [found[name] for name in savings.TRAINED]
    total = {key: sum(s[key] for s in trained) for key in ("images", "hours", "gpu_hours", "flops")}
    return {
        "recipe": run.name,
        "gpu": at.name,
        "gpus": gpus,
        "watts": at.watts,
        "rates": _rates(at),
        "store": {"bytes": rows.store_bytes, "note": rows.note},
        "notes": sorted({note for s in found.values() for note in s.pop("notes")}),
        "stages": found,
        "total": {
            "stages": list(savings.TRAINED),
            **total,
            "mark": " and ".join(sorted({s["mark"] for s in trained})),
            **_energy(total["gpu_hours"], at, price),
        },
        "final": estimate.judged_once(
            run, flops.network(run.model, run.path, tuple(rows.shape), rows.classes), at, gpus
        ),
        "classifier": savings.classifier(run, rows, at),
        "savings": savings.savings(run, rows, at, gpus),
    }


def _stage(resolved: ResolvedStage, rows: Rows, at: Card, gpus: int, price: float | None) -> dict[str, Any]:
    name, stage = resolved.name, resolved.config
    bill, choice, known = estimate.stage_bill(resolved, rows, at, gpus, flops.AS_IT_RUNS)
    _, notes = estimate.networks(resolved, rows)
    t = stage.trajectories
    if t and t.nfe == "auto":
        notes.append(f"{name}: nfe auto is counted as {t.calls} until `cmt tune-teacher` has chosen it")
    notes += filter(None, [rounded.note(resolved, gpus)])
    on_card, shape = estimate.held(resolved, rows, known, choice, at, gpus), tuple(rows.shape)
    if not on_card.fits:
        most, usable = gb(int(on_card.most)), gb(int(on_card.limit))
        notes.append(
            f"{name}: {most} a process are more than the {usable} of a card that are usable; `cmt plan` says what fits"
        )
    stored, judged = disk.cache(resolved, shape), disk.judging(resolved)
    work = flops.terms(resolved)
    peak = at.peak[rate_of(stage)]
    return {
        "networks": {of: {k: v for k, v in n._asdict().items() if k != "model"} for of, n in known.items()},
        **bill._asdict(),
        "flops": bill.flops_image * bill.images,
        "precision": stage.precision,
        "batch": stage.batch,
        "mfu_datasheet": bill.flops_image / peak / (bill.step_us / stage.batch * gpus) * 1e6,
        "engine": choice.lines(known["student"].parameters, gpus),
        "memory": {"bytes": on_card.most, "limit": on_card.limit, "fits": on_card.fits, "line": on_card.line(),
                   "parts": [part._asdict() for part in on_card.parts]},
        "disk_line": disk.line(resolved, shape, known["student"].parameters),
        "checkpoints_bytes": disk.checkpoints(resolved, known["student"].parameters),
        "cache": stored._asdict() if stored else None,
        "judging": {**judged._asdict(), "hours": estimate.judging_hours(judged, known["student"], at, gpus)},
        "work": [term._asdict() for term in work],
        **_energy(bill.gpu_hours, at, price),
        "notes": notes,
    }  # fmt: skip


def _energy(gpu_hours: float, at: Card, price: float | None) -> dict[str, float | None]:
    return {"kwh": estimate.energy_kwh(gpu_hours, at), "price": None if price is None else price * gpu_hours}


def _rates(at: Card) -> dict[str, Any]:
    rates = {f"matmul {p}": (rate / 1e12, "TFLOP/s") for p, rate in at.matmul.items()} | {
        "copy": (at.copy / 1e12, "TB/s")
    }
    return {
        key: {"value": value, "unit": unit, "from": at.measured.get(key, "predicted from the datasheet")}
        for key, (value, unit) in rates.items()
    }


def text(found: dict[str, Any]) -> list[str]:
    """The tables, without the arithmetic."""
    rates = ", ".join(
        f"{key} {r['value']:.3g} {r['unit']} ({'measured ' if key_measured(r) else ''}{r['from']})"
        for key, r in found["rates"].items()
    )
    cards = f"{found['gpus']} x {found['gpu']}"
    out = [
        f"{found['recipe']} on {cards}. Hours, kWh and FLOP/s are PREDICTED unless marked measured.",
        f"rates: {rates}",
    ]
    store = found["store"]
    out.append(f"store: {gb(int(store['bytes'])) if store['bytes'] else 'unknown'} ({store['note']})")
    seen: dict[str, dict] = {}
    for s in found["stages"].values():
        seen |= {n["name"]: n for n in s["networks"].values()}
    for n in seen.values():
        out.append(
            f"network {n['name']}: {n['parameters']:,} parameters, {n['flops'] / 1e9:,.4g} GFLOP a forward (counted)"
        )
    out += [f"note: {note}" for note in found["notes"]]
    head = f"{'stage':8} {'images':>8} {'GFLOP/image':>12} {'EFLOP':>8} {'us/image':>9} {'of peak':>7} "
    out += ["", head + f"{'hours':>8} {'GPU-hours':>10} {'kWh':>8} {'price':>9}  mark"]
    for name, s in found["stages"].items():
        apart = "" if name in savings.TRAINED else "  apart"
        each = 1e3 * s["flops_image"] / 1e12
        out.append(
            f"{name:8} {s['images'] / 1e6:7,.4g}M {each:12,.4g} {s['flops'] / 1e18:8,.3g} {s['work_us']:9,.0f} "
            f"{s['mfu_datasheet']:7.0%} {s['hours']:8,.3g} {s['gpu_hours']:10,.4g} {_of(s['kwh'], 8)} {_of(s['price'], 9)}"
            f"  {s['mark']}{apart}"
        )
    t = found["total"]
    out.append(
        f"{' + '.join(t['stages']):8} {t['images'] / 1e6:6,.4g}M {'':12} {t['flops'] / 1e18:8,.3g} {'':17} {t['hours']:8,.3g} "
        f"{t['gpu_hours']:10,.4g} {_of(t['kwh'], 8)} {_of(t['price'], 9)}  {t['mark']}"
    )
    if "pre" in found["stages"]:
        out.append("pre is trained once or imported; it is not in the total or in the savings below")
    out.append("evaluation, checkpoints and waiting for data are not included")
    if found["watts"]:
        out.append(f"kWh: GPU-hours x {found['watts']:.0f} W x {estimate.POWER}, the cards alone")
    if any(not n["depth"] for n in seen.values() if "VGG" not in n["name"]):
        out.append(
            "time of networks other than a DiT: a fixed fraction of the datasheet's rate; savings by kernels are not predicted"
        )
    if found["classifier"]:
        c = found["classifier"]
        hours = "unknown" if c["gpu_hours"] is None else f"{c['gpu_hours']:,.3g} h"
        how = f"{c['epochs']} epochs, {c['precision']}"
        out.append(f"classifier behind latent_lpips: {how}: {hours} in all ({c['mark']}), not in the total")
    out.append(judged_line(found["final"]))
    out.append("")
    for name, s in found["stages"].items():
        out += [f"{name:8} {line}" for line in [*s["engine"], s["memory"]["line"], *disk_lines(s)]]
    return out + ["", *savings_table(found)]


def judged_line(final: dict[str, Any]) -> str:
    """What judging a finished stage takes."""
    kept = f", {gb(int(final['features_bytes']))} of features kept by each process" if final["features_bytes"] else ""
    took = f"{final['samples']:,} samples, {final['forwards']:,} forwards in fp32, {final['hours']:,.3g} h (predicted)"
    return f"`cmt eval` of a stage: {took}{kept}; decoding and the judge's network are not counted; not in the total"


def disk_lines(stage: dict[str, Any]) -> list[str]:
    """What a stage writes, what a cache of its trajectories would be, and what judging it takes."""
    judged, out = stage["judging"], [stage["disk_line"]]
    if judged["samples"]:
        kept = f", {gb(judged['features_bytes'])} of features kept by each process" if judged["features_bytes"] else ""
        out.append(f"judging: {judged['samples']:,} samples, {judged['hours']:,.3g} h more (predicted){kept}")
    return out


def savings_table(found: dict[str, Any]) -> list[str]:
    """Published budgets, this recipe and what each idea saves."""
    out = [f"mid and post on {found['gpus']} x {found['gpu']}; all PREDICTED except what is marked reported"]
    out.append(f"{'':58} {'images':>8} {'GFLOP/image':>12} {'GPU-hours':>10} {'ratio':>6}  FID in 1 / 2 steps; source")
    for line in found["savings"]:
        images = f"{line['images'] / 1e6:,.4g}M" if line["images"] else "-"
        each = f"{line['flops_image'] / 1e9:,.4g}" if line["flops_image"] else "-"
        hours = line["gpu_hours"] if line["gpu_hours"] is not None else line["reported_hours"]
        about = [str(line[key]) for key in ("fid", "source") if line.get(key)]
        if line.get("reported_hours"):
            about.append(f"reported {line['reported_hours']:,.0f} h")
        if line.get("assumed"):
            about.append(f"assumed: {line['assumed']}")
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.2f}"
        out.append(f"{line['what']:58} {images:>8} {each:>12} {hours:10,.4g} {ratio:>6}  {'; '.join(about)}".rstrip())
    return out


def explained(found: dict[str, Any]) -> list[str]:
    """The formulas with their numbers."""
    out = ["", "the cost model's formulas with their numbers: for an image, then for a step on all cards"]
    for name, s in found["stages"].items():
        out += ["", f"{name} ({s['precision']})", *(f"  {line}" for line in s["lines"])]
    own = {name: s["lines"] for name, s in found["stages"].items()}
    for line in found["savings"]:
        if line["bills"] and line["what"] != savings.RECIPE:
            out += ["", line["what"]]
            for name, lines in line["bills"].items():
                same = own.get(name) == lines
                out += [f"  {name}: as above"] if same else [f"  {name}:", *(f"    {text}" for text in lines)]
    return out


def key_measured(rate: dict[str, Any]) -> bool:
    """Whether a rate was measured, here or before."""
    return not rate["from"].startswith("predicted")


def _of(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width},.4g}"
