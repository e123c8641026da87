"""`cmt plan`: one dial. What of a recipe fits a budget on given cards, as a command line to train it by."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from cmt_fast.cli.parser import add_overrides
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError, nearest
from cmt_fast.config.schema import Run
from cmt_fast.cost import advice, disk, estimate, gap, host, levers, plan, rounded, savings, step_time
from cmt_fast.cost.hardware import CARDS, NAMES, RESULTS, Card, card
from cmt_fast.cost.levers import Change
from cmt_fast.cost.plan import Machine, Plan, StagePlan
from cmt_fast.engine.sharding import gb
from cmt_fast.run import validation
from cmt_fast.run.resolved import resolve


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=run_plan)
    p.add_argument("recipe", help="name or YAML file")
    add_overrides(p)
    dial = p.add_mutually_exclusive_group(required=True)
    dial.add_argument("--hours", type=float, metavar="N", help="hours on the clock of all cards together")
    dial.add_argument("--gpu-hours", type=float, metavar="N", help="hours of a card, added over the cards")
    dial.add_argument("--dollars", type=float, metavar="D", help="money, in the currency of --price")
    p.add_argument("--price", type=float, help="price of a GPU-hour")
    p.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"{', '.join(NAMES)}; cpu is this processor (default: h100)"
    )
    p.add_argument("--gpus", type=int, default=1, help="number of cards (default: 1)")
    p.add_argument(
        "--stages", default="mid,post", help="comma-separated stages that the budget pays for (default: mid,post)"
    )
    p.add_argument(
        "--results", type=Path, help=f"folder of measurements by `python -m bench` (default: {RESULTS} if it exists)"
    )
    p.add_argument("--json", action="store_true", help="print all figures as JSON")


def run_plan(args: argparse.Namespace) -> None:
    if args.gpus < 1:
        raise ConfigError(f"--gpus: {args.gpus} is not valid; it is 1 or more")
    if args.results and not args.results.is_dir():
        raise ConfigError(f"--results: {str(args.results)!r} is not a folder")
    run = loading.load(args.recipe, args.overrides)
    at = card(args.gpu, args.results or (RESULTS if RESULTS.is_dir() else None))
    found = figures(run, _stages(run, args.stages), at, args.gpus, _hours(args), args.price)
    found["commands"] = commands(args, found)
    print(json.dumps(found, indent=1) if args.json else "\n".join(text(found)))


def _stages(run: Run, text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in run.stages:
            known = list(run.stages)
            raise ConfigError(
                f"--stages: {name!r} is not valid; this recipe has {', '.join(known)}{nearest(name, known)}"
            )
    return [name for name in run.stages if name in names]


def _hours(args: argparse.Namespace) -> float:
    """The budget in hours on the clock. Raises ConfigError for one that is nothing, and for money without a price."""
    for name in ("hours", "gpu_hours", "dollars", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is not valid; it is above 0")
    if args.hours:
        return args.hours
    if args.gpu_hours:
        return args.gpu_hours / args.gpus
    if not args.price:
        raise ConfigError("--price: is missing; --dollars needs what a GPU-hour costs")
    hours = args.dollars / args.price / args.gpus
    if not 0 < hours < float("inf"):
        raise ConfigError(
            f"--dollars: {args.dollars} at a price of {args.price} are {hours:g} hours, which is no budget"
        )
    return hours


def figures(
    run: Run, names: list[str], at: Card, gpus: int, hours: float, price: float | None = None
) -> dict[str, Any]:
    """All that is printed, as plain data. Raises ConfigError where nothing fits, or the run makes no sense."""
    rows = estimate.rows_of(run)
    try:
        validation.check(run, rows.shape, rows.classes)
        machine = Machine(at, gpus, rows)
        made = plan.plan(run, names, machine, hours)
        open_levers = gap.lines(made, machine)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    stages = {s.name: _stage(s, run, made, gpus) for s in made.layout.stages}
    hours_in_all = made.layout.hours
    return {
        "recipe": run.name,
        "gpu": at.name,
        "gpus": gpus,
        "budget_hours": hours,
        "hours": hours_in_all,
        "gpu_hours": gpus * hours_in_all,
        "price": None if price is None else price * gpus * hours_in_all,
        "kwh": estimate.energy_kwh(gpus * hours_in_all, at),
        "fraction": made.fraction,
        "images": sum(s["images"] for s in stages.values()),
        "needs": {"hours": made.full.hours, "gpu_hours": gpus * made.full.hours},
        "recipe_gpu_hours": None if made.written is None else gpus * made.written,
        "stages": stages,
        "changes": [
            {**c._asdict(), "override": c.override, "measured": advice.price(run.path, c.key, c.was, c.value)}
            for c in made.layout.changes
        ],
        "published": _published(run, names, at, gpus, made),
        "levers": [line._asdict() for line in open_levers],
        **_advised(made.layout.run, rows, "mid" in names),
        "store": {"bytes": rows.store_bytes, "note": rows.note},
        "sources": _sources(at, made, gpus),
    }


def _advised(run: Run, rows: estimate.Rows, asked: bool) -> dict[str, Any]:
    """What was measured of mid-training's settings, question by question, where the plan has a mid-training."""
    if not asked:
        return {"advice": [], "answers": [], "by_measurement": ""}

    def refused(key: str, value: Any) -> str:
        try:
            pairs = [Change(one, v, None, "", True) for one, v in advice.overrides(key, value)]
            validation.check(levers.applied(run, pairs), rows.shape, rows.classes)
        except ValueError as error:
            return str(error)
        return ""

    found = advice.answers(run, refused=refused)
    return {
        "advice": [answer.line._asdict() for answer in found if answer.line],
        "answers": [{key: getattr(answer, key) for key in ("question", "state", "text")} for answer in found],
        "by_measurement": advice.by_measurement(run),
    }


def _stage(s: StagePlan, run: Run, made: Plan, gpus: int) -> dict[str, Any]:
    stage, cost = made.layout.run.stages[s.name], s.cost
    networks_us = stage.batch / gpus * cost.work_us
    parts = {"networks": networks_us, "communication": cost.communication_us, "optimizer": cost.optimizer_us}
    return {
        "images": cost.images,
        "of_images": resolve(run, s.name).config.images_nimg,
        "steps": cost.steps,
        "batch": stage.batch,
        "micro_batch": s.micro_batch,
        "passes": s.passes,
        "precision": stage.precision,
        "zero_stage": s.choice.stage,
        "teacher_sharded": s.choice.teacher_sharded,
        "step_us": cost.step_us,
        "step_parts_us": parts,
        "hours": s.hours,
        "gpu_hours": gpus * s.hours,
        "train_hours": cost.hours,
        "judging_hours": s.judging_hours,
        "writing_hours": s.writing_hours,
        "limits": _limits(parts, cost.step_us, s, gpus),
        "mark": cost.mark,
        "calibration": cost.scale,
        "memory": {"bytes": s.memory.most, "limit": s.memory.limit, "parts": [p._asdict() for p in s.memory.parts]},
        "disk": {"checkpoints": s.checkpoint_bytes, "cache": s.cache._asdict() if s.cache else None,
                 "writes_cache": bool(s.writing_hours)},
    }  # fmt: skip


def _limits(parts: dict[str, float], step_us: float, s: StagePlan, gpus: int) -> str:
    """What a step's time goes to, and whether memory cuts its rows."""
    said = ", ".join(
        f"{name} {us / step_us:.0%}" for name, us in sorted(parts.items(), key=lambda p: -p[1]) if us >= 0.01 * step_us
    )
    wait = s.cost.host_us
    if wait >= step_us:
        said = f"its host, measured at {step_us / 1e3:,.3g} ms a step: the GPU waits"
    cut = f"; memory: {s.passes} passes of {s.micro_batch} rows, whose launches are not counted" if s.passes > 1 else ""
    return said + cut


def _published(run: Run, names: list[str], at: Card, gpus: int, made: Plan) -> list[dict[str, Any]]:
    """The budgets that were published for this recipe, as their code would take them here, and the plan's share of each."""
    if names != list(savings.TRAINED):
        return []
    mine = gpus * made.layout.hours
    found = []
    for line in savings.published_lines(run, at, gpus):
        hours = line["gpu_hours"] if line["gpu_hours"] is not None else line["reported_hours"]
        found.append(
            {key: line[key] for key in ("what", "images", "gpu_hours", "reported_hours", "source", "fid", "assumed")}
        )
        found[-1] |= {"mark": "reported" if line["gpu_hours"] is None else "predicted", "had": mine / hours}
    return found


def _sources(at: Card, made: Plan, gpus: int) -> list[dict[str, str]]:
    """Every figure that a plan stands on, and where it is from."""
    sheet = f"{at.datasheet}" if at.datasheet else "assumed"
    rows = [{"what": f"matmul {p}", "value": f"{rate / 1e12:.4g} TFLOP/s",
             "source": _measured(at, f"matmul {p}", f"{sheet}, times the share that a large call reached on an H100")}
            for p, rate in at.matmul.items()]  # fmt: skip
    rows.append({"what": "copy", "value": f"{at.copy / 1e12:.3g} TB/s",
                 "source": _measured(at, "copy", f"{sheet}, times the share that an H100's copy reached")})  # fmt: skip
    rows.append({"what": "memory", "value": gb(int(at.memory)), "source": sheet})
    rows.append({"what": "links", "value": f"{at.link / 1e9:.3g} GB/s inside, {at.network / 1e9:.3g} GB/s outside a machine",
                 "source": f"{sheet}; none of it hidden: assumed"})  # fmt: skip
    for s in made.layout.stages:
        how = s.cost.mark if s.cost.scale != 1 else "nothing of the kind was measured on this card"
        times = f"{s.cost.scale:.3g}" if s.cost.scale != 1 else "none"
        rows.append({"what": f"{s.name}: measured / predicted time", "value": times, "source": how})
        if s.cost.host_us:
            each = host.call_us(at)
            value = f"{s.cost.host_us / 1e3:,.4g} of {s.cost.step_us / 1e3:,.4g} ms a step"
            how = f"calls counted, {each.us:,.3g} us each as measured: {each.source}" if each else "counted"
            rows.append({"what": f"{s.name}: its host is busy for", "value": value, "source": how})
        kept = next(p for p in s.memory.parts if p.what.startswith("activations"))
        part = rounded.share(resolve(made.layout.run, s.name), gpus)
        if part:
            how = f"predicted by {rounded.SOURCE}; measured when the stage begins"
            rows.append(
                {"what": f"{s.name}: its rows in fp32 beyond rounding_limit", "value": f"{part:.0%}", "source": how}
            )
        rows.append({"what": f"{s.name}: {kept.what}", "value": gb(int(kept.bytes)), "source": kept.source})
    share = ", ".join(f"{p} {v}" for p, v in step_time.SHARE.items())
    rows.append({"what": "networks other than a DiT", "value": f"{share} of the datasheet's rate", "source": "assumed"})
    rows.append(
        {"what": "parameters, FLOPs, bytes of activations", "value": "by network", "source": "counted on shapes"}
    )
    rows.append(
        {"what": "images of the stages", "value": "the recipe's", "source": "its header says which are published"}
    )
    return rows


def _measured(at: Card, key: str, otherwise: str) -> str:
    return f"measured: {at.measured[key]}" if key in at.measured else f"predicted: {otherwise}"


def commands(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """The lines that carry the plan out: caches to be written, the training, and the estimate of the same."""
    given, changes = [args.recipe, *args.overrides], found["changes"]
    settings = shlex.join([*given, *(c["override"] for c in changes)])
    apart = _apart(loading.load(args.recipe, args.overrides), list(found["stages"]))
    teacher = " --from RUN" if apart else ""
    start, rolled = _launcher(args.gpu, args.gpus), []
    for name, s in found["stages"].items():
        if s["disk"]["writes_cache"]:
            where = next(c["value"] for c in changes if c["key"] == f"{name}.trajectories.cache")
            n = s["disk"]["cache"]["trajectories"]
            rolled.append(f"{start} trajectories {shlex.join(given)} --stage {name}{teacher} -n {n} --cache {where}")
    return {
        "overrides": [c["override"] for c in changes],
        "of_run": apart,
        "trajectories": rolled,
        "train": f"{start} train {settings} --stages {','.join(found['stages'])}{teacher}",
        "estimate": f"cmt estimate {settings} --gpu {args.gpu} --gpus {args.gpus}",
    }


def _apart(run: Run, names: list[str]) -> list[str]:
    """Stages of this recipe that the planned ones begin with or are taught by, and that the plan does not train."""
    used = {of for name in names for of in resolve(run, name).called.values() if "/" not in of}
    return [name for name in run.stages if name in used and name not in names]


def _launcher(gpu: str, gpus: int) -> str:
    """How a command is started on so many cards."""
    here = CARDS[gpu].per_machine if gpu in CARDS else 1
    if gpus == 1:
        return "cmt"
    if gpus <= here or gpu not in CARDS:
        return f"torchrun --standalone --nproc-per-node {gpus} -m cmt_fast"
    nodes = next(n for n in range(-(-gpus // here), gpus + 1) if gpus % n == 0)
    meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN_ID"  # as docs/multi-node.md has it
    return f"torchrun --nnodes {nodes} --nproc-per-node {gpus // nodes} {meet} -m cmt_fast"


def text(found: dict[str, Any]) -> list[str]:
    """The tables."""
    cards, needs, all_stages = f"{found['gpus']} x {found['gpu']}", found["needs"], " + ".join(found["stages"])
    paid = f", price {found['price']:,.4g}" if found["price"] is not None else ""
    power = f", {found['kwh']:,.3g} kWh" if found["kwh"] is not None else ""
    budget = f"{found['budget_hours']:,.4g} h, {found['gpus'] * found['budget_hours']:,.4g} GPU-hours"
    head = f"{'stage':8} {'images':>8} {'of':>8} {'rows of a step':>22} {'engine':>14} {'ms/step':>9} {'hours':>8} "
    share = f"{found['fraction']:.1%} of the recipe's images"
    out = [
        f"{found['recipe']}, {all_stages} on {cards} within {budget}. PREDICTED unless marked measured.",
        f"the plan: {found['hours']:,.4g} h, {found['gpu_hours']:,.4g} GPU-hours{paid}{power}; {share}",
        f"all its images would take {needs['hours']:,.4g} h, {needs['gpu_hours']:,.4g} GPU-hours, laid out like this",
        "",
        f"{head}{'GPU-hours':>10}  a step's time; mark",
    ]
    for name, s in found["stages"].items():
        rows = f"{s['batch']} = {found['gpus']} x {s['passes']} x {s['micro_batch']}"
        engine = "local" if s["zero_stage"] is None else f"zero {s['zero_stage']}{' +teacher' * s['teacher_sharded']}"
        images = f"{s['images'] / 1e6:7,.4g}M {s['of_images'] / 1e6:7,.4g}M"
        out.append(
            f"{name:8} {images} {rows:>22} {engine:>14} {s['step_us'] / 1e3:9,.4g} {s['hours']:8,.3g} {s['gpu_hours']:10,.4g}  "
            f"{s['limits']}; {s['mark']}"
        )
    out += [
        "",
        *_memory(found),
        "",
        *_differs(found),
        *advice.as_text(found["answers"], found["by_measurement"]),
        "",
        *_budget(found),
        "",
        "each figure's source",
    ]
    out += [f"  {row['what']:44} {row['value']}; {row['source']}" for row in found["sources"]]
    lines = found["commands"]
    held = " and ".join(f"`{name}`" for name in lines["of_run"])
    need = f"RUN: the run that has {held}, trained or imported by `cmt ckpt import`"
    out += ["", "to train it" + (f" ({need})" if held else "")]
    return [*out, *lines["trajectories"], lines["train"], lines["estimate"]]


def _memory(found: dict[str, Any]) -> list[str]:
    out = ["memory of a process, and disk"]
    for name, s in found["stages"].items():
        m, stored = s["memory"], s["disk"]["cache"]
        out.append(f"  {name}: {gb(int(m['bytes']))} of the {gb(int(m['limit']))} that are usable of a card's")
        for part in sorted(m["parts"], key=lambda part: -part["bytes"]):
            when = "" if part["when"] == "always" else f", {part['when']} only"
            out.append(f"    {gb(int(part['bytes'])):>9} {part['what']} ({part['source']}{when})")
        kept = f"  {name}: on disk {disk.CHECKPOINTS} checkpoints {gb(s['disk']['checkpoints'])}"
        if stored:
            how = (
                "a cache of its trajectories"
                if s["disk"]["writes_cache"]
                else "no cache; one of its trajectories would be"
            )
            kept += f"; {how} {gb(stored['bytes'])}, {stored['trajectories']:,} x {stored['row_bytes']:,} bytes"
        out.append(kept)
    if found["store"]["bytes"]:
        out.append(f"  store: {gb(int(found['store']['bytes']))} ({found['store']['note']})")
    return out


def _differs(found: dict[str, Any]) -> list[str]:
    """What the plan sets otherwise than the recipe."""
    out = []
    for method, head in (
        (False, "laid out otherwise than the recipe says; the method is the same"),
        (True, "METHOD: other than the recipe's"),
    ):
        rows = [c for c in found["changes"] if c["method"] == method]
        out += [head] * bool(rows)
        price = lambda c: f"; {c['measured']}" if c["measured"] else ""
        out += [f"  {c['override']} (the recipe's: {json.dumps(c['was'])}): {c['why']}{price(c)}" for c in rows]
    return out or ["nothing differs from the recipe"]


def _budget(found: dict[str, Any]) -> list[str]:
    """Published budgets, and the levers from the recipe to the budget."""
    out = []
    if found["published"]:
        cards = f"{found['gpus']} x {found['gpu']}"
        out.append(f"published budgets as their code would run on {cards}, and the share of each that this plan has")
    for b in found["published"]:
        hours = b["gpu_hours"] if b["gpu_hours"] is not None else b["reported_hours"]
        images = f"{b['images'] / 1e6:,.4g}M images" if b["images"] else "images not published"
        about = f"had {b['had']:.1%}; FID {b['fid']}; {b['source']}"
        out.append(f"  {b['what']}: {images}, {hours:,.4g} GPU-hours ({b['mark']}); {about}")
    wanted = found["gpus"] * found["budget_hours"]
    head = (
        f"from the recipe to {wanted:,.4g} GPU-hours for all its images, each line on top of those above; all PREDICTED"
    )
    out += [*[""] * bool(out), head]
    for line in found["levers"]:
        hours = "" if line["gpu_hours"] is None else f"{line['gpu_hours']:,.4g}"
        out.append(f"  {line['what']:52} {hours:>9}  {line['state']}: {line['why']}")
    return out
