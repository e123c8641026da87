"""`python -m bench report`: writes the tables of the README and the other pages, between their `<!-- table: NAME -->` marks.

With `--picture RUN` it draws the recipe's pictures in docs/ too, from a finished run of it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from bench.harness import gpu_tables
from bench.harness.pages import (
    at_size,
    gallery,
    grid_tables,
    inputs,
    judging,
    keys,
    launches,
    licences,
    nodes,
    picture,
    plans,
    promises,
    published,
    recipe_tables,
    restarts,
    safety,
    seed_tables,
    sizing,
    worth,
)
from cmt_fast.speedrun import records, tracks

PAGES = (
    Path("README.md"),
    Path("bench/README.md"),
    Path("docs/gallery.md"),
    Path("docs/grid.md"),
    Path("docs/ideas.md"),
    Path("docs/inputs.md"),
    Path("docs/keys.md"),
    Path("docs/licences.md"),
    Path("docs/multi-node.md"),
    Path("docs/performance.md"),
    Path("docs/promises.md"),
    Path("docs/published-settings.md"),
    Path("docs/results.md"),
    Path("docs/safety.md"),
    Path("docs/speedrun.md"),
    Path("docs/watching.md"),
)
RESULTS = Path("bench/results/cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The marks in the pages say which tables; pictures are drawn only from runs that are named."""
    parser.add_argument("--picture", type=Path, nargs="*", default=[], metavar="RUN", help="draw docs/RECIPE.png too")


def run(args: argparse.Namespace) -> int:
    """Rewrite the tables in place."""
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
    for folder in getattr(args, "picture", []):
        print(*picture.draw(folder, RESULTS, Path("docs")), sep="\n")
    return 0


def filled(text: str) -> str:
    """A page with every table made anew. Raises ValueError for a mark without an end: it would take what follows."""
    marks = re.findall(r"<!-- (table|end)\b", text)
    if marks != ["table", "end"] * (len(marks) // 2):
        raise ValueError("each <!-- table: NAME --> needs an <!-- end --> before the next one")
    for name in re.findall(r"<!-- table: ([\w-]+) -->", text):
        kind, _, recipe = name.partition("-")
        on_card = kind in gpu_tables.CARDS
        body = gpu_tables.table(RESULTS.parent, kind, recipe) if on_card else TABLES[kind](recipe)
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.S)
    return text


def speedrun(track: str) -> str:
    """The records of a track; in the README, `speedrun-digits-short`, those that count."""
    name, _, short = track.partition("-")
    return records.table(tracks.load(name), Path("records"), short=bool(short)) + "\n"


def span(values: list[float], digits: int = 2) -> str:
    """All seeds of one cell."""
    return " / ".join(f"{v:.{digits}f}" for v in values)


def search(recipe: str) -> str:
    """One search, best product of distances first."""
    file = RESULTS / f"{recipe}-search.json"
    if not file.is_file():
        return f"Not measured yet: `cmt search {recipe}`, with `--record {file}`.\n\n"
    data = json.loads(file.read_text())
    done = sorted(
        (t for t in data["trials"] if "steps" in t),
        key=lambda t: t["steps"]["1"]["frechet"] * t["steps"]["2"]["frechet"],
    )
    title = f"{data['recipe']}: settings of {data['stage']} (seed {data['seed']})"
    lines = [
        f"| {title} | Fréchet, 1 step | accuracy | Fréchet, 2 steps | accuracy |",
        "|---|---|---|---|---|",
    ]
    for t in done:
        one, two = t["steps"]["1"], t["steps"]["2"]
        name = " ".join(s.removeprefix(f"{data['stage']}.").removeprefix("objective.") for s in t["set"])
        lines.append(
            f"| {name} | {one['frechet']:.2f} | {one['accuracy']:.3f} | {two['frechet']:.2f} | {two['accuracy']:.3f} |"
        )
    lines += [f"| {' '.join(t['set'])} | {t['failed']} | | | |" for t in data["trials"] if "failed" in t]
    return "\n".join(lines) + "\n"


def dual(_: str) -> str:
    """What a tangent costs: the ratios of `python -m bench dual`, each dtype a column."""
    data = json.loads((RESULTS / "dual.json").read_text())
    kinds = {dtype: result for dtype, result in data["dtypes"].items() if not result["wrong"]}
    lines = [f"| ratio | {' | '.join(kinds)} | target |", "|---|" + "---|" * len(kinds) + "---|"]
    for name, first in next(iter(kinds.values()))["ratios"].items():
        cells = []
        for result in kinds.values():
            r = result["ratios"][name]
            spread = "" if "bytes" in name else f" ({r['p20']:.2f} to {r['p80']:.2f})"
            cells.append(f"{r['p50']:.2f}{spread}{'' if r['met'] is None else ', met' if r['met'] else ', **missed**'}")
        target = "" if first["target"] is None else f"{first['bound']} {first['target']}"
        lines.append(f"| {name} | {' | '.join(cells)} | {target} |")
    shape, turns = data["shape"], ", ".join(f"{r['turns']} turns in {dtype}" for dtype, r in kinds.items())
    lines.append(
        f"\nDiT of width {shape['width']}, depth {shape['depth']}, T = {shape['tokens']}, batch {shape['batch']}; medians "
        f"(p20 to p80) of ratios turn by turn, {turns}; {data['device']}, {data['threads']} threads, torch {data['torch']}; "
        f"commit {data['commit']}, {data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"


def ops(_: str) -> str:
    """Each op and case: time of plain torch, of torch.compile and of ours, and who is fastest."""
    data = json.loads((RESULTS / "ops.json").read_text())
    lines = ["| op, case | reference, ms | compiled | native | fastest |", "|---|---|---|---|---|"]
    cases: dict[tuple, dict] = {}
    for row in data["rows"]:
        cases.setdefault((row["op"], row["case"], row["dtype"]), {})[row["backend"]] = row
    for (op, case, dtype), rows in cases.items():
        if "native" not in rows:
            continue
        timed = {name: row["p50_ms"] for name, row in rows.items() if not row["wrong"]}
        cells = [f"{timed[n]:.3f}" if n in timed else "no time" for n in ("reference", "compiled", "native")]
        lines.append(f"| {op} {case} {dtype} | {' | '.join(cells)} | {min(timed, key=timed.__getitem__)} |")
    lines.append(
        f"\n{data['device']}, {data['threads']} threads, torch {data['torch']}; commit {data['commit']}, {data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"


def native(_: str) -> str:
    """Of each op and dtype, over its cases: what plain torch and torch.compile take, in units of ours."""
    data = json.loads((RESULTS / "ops.json").read_text())
    times: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in data["rows"]:
        if not row["wrong"]:
            times.setdefault((row["op"], row["dtype"]), {}).setdefault(row["case"], {})[row["backend"]] = row["p50_ms"]
    lines = ["| op | dtype | plain torch / ours | torch.compile / ours |", "|---|---|---|---|"]
    for (op, dtype), cases in times.items():
        cells = []
        for other in ("reference", "compiled"):
            ratios = sorted(t[other] / t["native"] for t in cases.values() if {other, "native"} <= t.keys())
            cells.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "")
        if any(cells):
            lines.append(f"| {op} | {dtype} | {' | '.join(cells)} |")
    lines.append(f"\n{data['device']}, {data['threads']} threads; commit {data['commit']}, {data['date'][:10]}.\n")
    return "\n".join(lines) + "\n"


def predicted(which: str) -> str:
    """The least time that a GPU's ceilings allow the ops that have kernels of ours, or the steps' cost model."""
    if which == "steps":
        return predicted_steps()
    data = json.loads((RESULTS.parent / "predicted" / "ops.json").read_text())
    cards = list(data["ceilings"])
    lines = [
        f"| op, case | {' | '.join(f'{card}, at least us (predicted)' for card in cards)} | roof |",
        "|---|" + "---|" * (len(cards) + 1),
    ]
    for row in data["rows"]:
        if row["op"] in ("attention", "modulated_norm", "gated_residual", "qk_norm", "gelu", "adamw_ema"):
            cells = " | ".join(f"{row[card]['us']:.1f}" for card in cards)
            lines.append(f"| {row['op']} {row['case']} {row['dtype']} | {cells} | {row[cards[0]]['roof']} |")
    return "\n".join(lines) + "\n"


def zero(_: str) -> str:
    """Losses and squared errors of every engine, ZeRO stage and number of processes beside the local engine on one."""
    data = json.loads((RESULTS / "zero.json").read_text())
    settings = list(next(iter(data["curves"].values())))
    lines = [f"| {data['steps']} steps | {' | '.join(settings)} |", "|---|" + "---|" * len(settings)]
    for case, row in data["curves"].items():
        for key in ("loss", "mse"):
            lines.append(f"| {case}, {key} | {' | '.join(f'{row[s][key]:.1e}' for s in settings)} |")
    lines.append(
        f"\nENGINE-PROCESSES; zero0 to zero3 are DeepSpeed's stages. DiT on digits, batch {data['batch']}; {data['device']}, "
        f"torch {data['torch']}; commit {data['commit']}, {data['date'][:10]}.\n"
    )
    return "\n".join(lines) + "\n"


def predicted_steps() -> str:
    """Microseconds a student image by the cost model of `python -m bench predict`, bare and scaled by measured steps."""
    data = json.loads((RESULTS.parent / "predicted" / "steps.json").read_text())
    cards = list(data["ceilings"])
    heads = "us an image (predicted): compiled, with kernels, the latter scaled by measured steps"
    lines = [
        f"| step, bf16, batch 64 | {' | '.join(f'{card}, {heads}' for card in cards)} |",
        "|---|" + "---|" * len(cards),
    ]
    for row in data["rows"]:
        cells = []
        for card in cards:
            of = row[card]
            mark = "" if "another" in str(of["mark"]) else "*"
            scaled = "not measured" if of["scaled"] is None else f"{of['scaled']:,.0f}{mark}"
            cells.append(f"{of['compile']:,.0f}, {of['fused']:,.0f}, {scaled}")
        lines.append(f"| {row['model']} {row['objective']} | {' | '.join(cells)} |")
    return (
        "\n".join(lines) + "\n\n\\* by steps of this very network; the others by those of the networks with a star.\n"
    )


def footer(data: dict) -> str:
    """Where and when."""
    threads = f", {data['threads']} threads" if data.get("threads") else ""
    return f"{data['device']}{threads}, torch {data['torch']}; commit {data['commit']}, {data['date'][:10]}."


def step(_: str) -> str:
    """Each model and objective: the peer's step, ours, and their ratios."""
    data = json.loads((RESULTS / "step.json").read_text())
    cases: dict[tuple, list[dict]] = {}
    for row in data["rows"]:
        cases.setdefault((row["model"], row["objective"], row["batch"]), []).append(row)
    heads = ("step", "peer, ms", "ours, ms: eager, compiled, bf16", "peer / ours, fp32: eager, compiled",
             "shipped: images a core-hour, of the matmul rate, peer / it", "MB saved: peer, ours")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * 5]
    for (model, objective, batch), rows in cases.items():
        by = {(r["how"], r["precision"]): r for r in rows if "p50_ms" in r}
        theirs = by["peer", "fp32"]
        keys = [k for k in (("eager", "fp32"), ("compiled", "fp32"), ("eager", "bf16")) if k in by]
        equal = ", ".join(gpu_tables.spread(by[k]["over_peer"]["fp32"]) for k in keys if k[1] == "fp32")
        best = next(r for r in rows if r.get("shipped"))
        ours = ", ".join(format(by[k]["p50_ms"], ".1f") for k in keys)
        shipped = f"{best['how']} {best['precision']}: {best['images_per_core_hour']:,.0f}, {best['mfu_measured']:.0%}"
        lines.append(
            f"| {model} {objective} B{batch} | {theirs['p50_ms']:.1f} | {ours} | {equal} "
            f"| {shipped}, {gpu_tables.spread(best['over_peer']['fp32'])} | {theirs['saved_mb']:.0f}, {best['saved_mb']:.0f} |"
        )
        own = next((r for r in rows if "recipe" in r["how"] and "p50_ms" in r), None)
        if own:
            text = f"| {model} {objective} B{batch}, {own['teacher_forwards']:.0f} teacher forwards a row, the recipe's"
            lines.append(
                f"{text} | | {own['p50_ms']:.1f} | {gpu_tables.spread(own['over_peer']['fp32'])} (peer: 1 forward a row) | | |"
            )
    return "\n".join(lines) + f"\n\n{footer(data)}\n\n"


def trajectories(_: str) -> str:
    """Teacher milliseconds a student image by trajectories at once."""
    data = json.loads((RESULTS / "trajectories.json").read_text())
    return gpu_tables.rollout_lines(data["rows"]) + f"\n{footer(data)}\n\n"


def pipeline(_: str) -> str:
    """What the loop loses, stage by stage."""
    data = json.loads((RESULTS / "pipeline.json").read_text())
    return gpu_tables.loop_lines(data["rows"]) + f"\n{footer(data)}\n\n"


def loader(_: str) -> str:
    """Rows a second that training gets, by loader and size."""
    data = json.loads((RESULTS / "loader.json").read_text())
    sizes = sorted({r["pixels"] for r in data["rows"]})
    speeds: dict[str, dict[int, float]] = {}
    for r in data["rows"]:
        if r["gives"] != "bytes":
            speeds.setdefault(r["loader"].removesuffix(": rows"), {})[r["pixels"]] = r["p50"]
    lines = [
        f"| loader, rows/s as training gets them | {' | '.join(f'{s} pixels' for s in sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for name, by in speeds.items():
        lines.append(f"| {name} | {' | '.join(f'{by[s]:,.0f}' if s in by else '' for s in sizes)} |")
    return "\n".join(lines) + f"\n\n{footer(data)}\n\n"


def modes(recipe: str) -> str:
    """Mid-training from trajectories in each mode, over seeds, beside paper mode."""
    data = json.loads((RESULTS / f"{recipe}-modes.json").read_text())
    steps = list(data["summary"][0]["frechet"])
    lines = [
        f"| {recipe}: trajectories | {' | '.join(f'Fréchet, {k} step' + 's' * (k != '1') for k in steps)} | ms a student image |",
        "|---|" + "---|" * (len(steps) + 1),
    ]
    for r in data["summary"]:
        cells = [span(r["frechet"][k]["each"]) for k in steps] + [span(r["ms_per_image"]["each"])]
        lines.append(f"| {MODES[r['mode']]} | {' | '.join(cells)} |")
    e, seeds = data["environment"], ", ".join(str(n) for n in sorted({r["seed"] for r in data["rows"]}))
    images = ", ".join(f"{n:,} images of {name}-training" for name, n in data["images"].items())
    lines.append(
        f"\nSeeds {seeds}; {images}; {data['samples']:,} samples; {e['cpu']}, {e['threads']} threads, torch {e['torch']}; "
        f"commit {data['commit']}, {data['date']}.\n"
    )
    return "\n".join(lines) + "\n"


MODES = {
    "paper": "`mode: paper`, all points",
    "pool-all": "`mode: pool`, all points, as many teacher calls",
    "pool": "`mode: pool`, the recipe's points",
    "cache": "the same from a cache, no teacher",
}


def tune(recipe: str) -> str:
    """The solver that was chosen by measurement beside the recipe's and a coarse one."""
    data = json.loads((RESULTS / f"{recipe}-tune.json").read_text())
    steps = list(data["arms"]["auto"]["figures"])
    heads = "".join(f" Fréchet, {k} step{'s' * (k != '1')} |" for k in steps)
    lines = [
        f"| {recipe} | solver | images | forwards | its error, estimated | student's error |{heads}",
        "|---|---|---|---|---|---|" + "---|" * len(steps),
    ]
    for name, r in data["arms"].items():
        cells = " | ".join(f"{r['figures'][k]['frechet']:.3f}" for k in steps)
        length = f"{r['images']:,} | {r['forwards']:,}" if "images" in r else f"{data['images']:,} | -"
        lines.append(
            f"| {name} | {r['solver']} | {length} | {r['solver_error']:.3g} | {r['student_error']:.3g} | {cells} |"
        )
    e = data["environment"]
    lines.append(
        f"\nSeed {data['seed']}, {data['samples']:,} samples; errors are RMS per dimension; "
        f"settled in {data['settling_s']:.0f} s; {e['cpu']}, {data['threads']} threads; commit {data['commit']}, "
        f"{data['date']}.\n"
    )
    return "\n".join(lines) + "\n"


TABLES = {
    "gallery": lambda recipe: gallery.table(RESULTS, recipe),
    "grid": lambda which: grid_tables.table(RESULTS, which),
    "inputs": inputs.table,
    "judging": lambda _: judging.table(RESULTS),
    "keys": keys.table,
    "launches": lambda which: launches.unets(RESULTS) if which == "edm2" else launches.table(RESULTS),
    "licences": licences.table,
    "plan": lambda which: plans.table(RESULTS, which),
    "nodes": lambda _: nodes.lives(RESULTS),
    "ranks": lambda _: nodes.ranks(),
    "promises": promises.table,
    "published": recipe_tables.published,
    "sources": published.table,
    "recipes": recipe_tables.settings,
    "stages": lambda recipe: seed_tables.short(RESULTS, recipe),
    "metrics": lambda _: at_size.metrics(RESULTS),
    "modes": modes,
    "rounding": lambda _: at_size.rounding(RESULTS),
    "tune": tune,
    "seeds": lambda recipe: seed_tables.full(RESULTS, recipe),
    "sizing": lambda _: sizing.table(RESULTS),
    "speedrun": speedrun,
    "safety": safety.table,
    "restart": lambda _: restarts.table(RESULTS, footer),
    "search": search,
    "dual": dual,
    "native": native,
    "ops": ops,
    "predicted": predicted,
    "worth": lambda _: worth.table(RESULTS),
    "zero": zero,
    "step": step,
    "trajectories": trajectories,
    "pipeline": pipeline,
    "loader": loader,
}
