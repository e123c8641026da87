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
from cmt_fast.cost import estimate, flops, plan
from cmt_fast.cost.estimate import Rows
from cmt_fast.cost.hardware import RESULTS, Card, card
from cmt_fast.engine.sharding import gb
from cmt_fast.run import validation
from cmt_fast.run.resolved import ResolvedStage, resolve


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_estimate)
    p.add_argument("recipe", help="name or YAML file")
    add_overrides(p)
    p.add_argument(
        "--gpu", default="h100", metavar="NAME", help="h100, h200, a100, or cpu for this processor (default: h100)"
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
    trained = [found[name] for name in plan.TRAINED]
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
            "stages": list(plan.TRAINED),
            **total,
            "mark": " and ".join(sorted({s["mark"] for s in trained})),
            **_energy(total["gpu_hours"], at, price),
        },
        "classifier": plan.classifier(run, rows, at),
        "savings": plan.savings(run, rows, at, gpus),
    }


def _stage(resolved: ResolvedStage, rows: Rows, at: Card, gpus: int, price: float | None) -> dict[str, Any]:
    name, stage = resolved.name, resolved.config
    bill, choice, known = estimate.stage_bill(resolved, rows, at, gpus)
    _, notes = estimate.networks(resolved, rows)
    t = stage.trajectories
    if t and t.nfe == "auto":
        notes.append(f"{name}: nfe auto is counted as {t.calls} until `cmt tune-teacher` has chosen it")
    kept = estimate.activation_bytes(resolved, known["student"], gpus)
    memory = choice.state_bytes + choice.teacher_bytes + (kept or 0)
    if memory > at.memory:
        notes.append(f"{name}: {gb(int(memory))} a process are more than the {gb(int(at.memory))} of a card")
    work = flops.terms(resolved)
    peak = at.peak["bf16" if stage.half else stage.products]
    return {
        "networks": {of: n._asdict() for of, n in known.items()},
        **bill._asdict(),
        "flops": bill.flops_image * bill.images,
        "precision": stage.precision,
        "batch": stage.batch,
        "mfu_datasheet": bill.flops_image / peak / (bill.step_us / stage.batch * gpus) * 1e6,
        "engine": choice.lines(known["student"].parameters, gpus),
        "memory_bytes": memory,
        "activations_bytes": kept,
        "checkpoints_bytes": 3 * known["student"].parameters * (12 + 4 * len(stage.ema)),
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
        apart = "" if name in plan.TRAINED else "  apart"
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
        out.append(
            f"classifier behind latent_lpips: {c['epochs']} epochs, one card, fp32: {hours} ({c['mark']}), not in the total"
        )
    out.append("")
    for name, s in found["stages"].items():
        kept = f"; activations {gb(int(s['activations_bytes']))} more" if s["activations_bytes"] else ""
        out += [f"{name:8} {line}{kept if line.startswith('memory') else ''}" for line in s["engine"]]
        out.append(f"{name:8} disk: three checkpoints {gb(s['checkpoints_bytes'])}")
    return out + ["", *savings_table(found)]


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
        if line["bills"] and line["what"] != plan.RECIPE:
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
