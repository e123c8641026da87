"""Tables of what `python -m bench gpu` measured on a card, at marks such as `<!-- table: h100-step -->`.

Made from bench/results/<card>/ alone. Where nothing has been measured, the table says so and how to measure it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.timing import quantiles

CARDS = ("h100", "h200", "a100")
STAGES = {"pre": "pre-training", "mid": "mid-training", "post": "post-training", "control": "control"}


def table(results: Path, card: str, name: str) -> str:
    """The table called `name` (of TABLES) of one card; results: the folder of all devices. Raises KeyError for another name."""
    make, files = TABLES[name]
    found = [
        json.loads(file.read_text("utf-8")) for pattern in files for file in sorted((results / card).glob(pattern))
    ]
    if not any(data.get("rows") for data in found):
        return f"Not measured yet; on such a card: `python -m bench gpu {files[0].partition('.')[0]}`.\n"
    return make(found, results) + "\n"


def footer(found: list[dict[str, Any]]) -> str:
    """Where and when, and what is missing."""
    data = found[0]
    commits = ", ".join(dict.fromkeys(str(d["commit"]) for d in found))
    text = f"\n{data['device']}, torch {data['torch']}, CUDA {data['cuda']}; commit {commits}, {data['date'][:10]}."
    lacking = [
        name for d in found for name in d["not_measured"] if not any(_is_there(name, d, other) for other in found)
    ]
    return f"{text} Not measured: {'; '.join(lacking)}.\n" if lacking else f"{text}\n"


def _is_there(name: str, lacking: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether another file of the table has an op's case that this one did not come to."""
    return other is not lacking and name in (f"{r.get('op')} {r.get('case')} {r.get('dtype')}" for r in other["rows"])


def some(value: float | None, form: str) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else format(value, form)


def step(found: list[dict[str, Any]], _: Path) -> str:
    """Each step: speed, share of the datasheet's rate, the prediction's error, and the published step's time over it."""
    lines = [
        "| step | batch | ms | images/s | MFU, datasheet | of a matmul here | host ms | peak GB | compiling, s "
        "| predicted images/s | measured / predicted time | published step / it, per image |",
        "|---|" + "---|" * 11,
    ]
    for r in (row for data in found for row in data["rows"]):
        label = (
            f"| {r['model']} {r['objective']} {'published way' if r['how'] == 'peer' else r['how']} {r['precision']} "
        )
        if "cannot" in r:
            lines.append(f"{label}| {r['batch']} | {r['cannot'][:60]} |" + " |" * 9)
            continue
        over = next(iter(r["over_peer"].values()), None)
        equal = "alternating" in r.get("over_peer_by", "")
        guess = r["predicted_us"]
        cells = (
            f"{r['batch']}", f"{r['p50_ms']:.1f}", f"{r['images_per_s']:,.0f}", some(r["mfu_datasheet"], ".1%"),
            f"{r['mfu_measured']:.1%}", some(r["host_ms"], ".0f"), some(r["peak_gb"], ".1f"), some(r["compile_s"], ".0f"),
            f"{1e6 / guess:,.0f}" if guess else "", some(r["measured_over_predicted"], ".2f"),
            f"{over['p50']:.2f}{', equal batch' if equal else ''}" if over else "",
        )  # fmt: skip
        lines.append(f"{label}| {' | '.join(cells)} |")
    note = (
        "\nEach in a process of its own, medians. At equal batch the ratio is of alternating rounds, else of one process after "
        "the other.\n"
    )
    return "\n".join(lines) + "\n" + note + footer(found)


def sweep(found: list[dict[str, Any]], _: Path) -> str:
    """Attention: how many shapes are right, the largest error of each kind, and every shape that is not."""
    data = found[0]
    own = [r for r in data["rows"] if "under" not in r]
    lines = [
        f"| attention ({data['backend']}) | shapes | T, d | right | wrong | crashed | value | tangent | gradient |",
        "|---|" + "---|" * 8,
    ]
    for dtype in dict.fromkeys(r["dtype"] for r in own):
        rows = [r for r in own if r["dtype"] == dtype]
        good = [r for r in rows if r.get("wrong") == []]
        wrong, crashed = [r for r in rows if r.get("wrong")], [r for r in rows if "crash" in r]
        spans = ", ".join(f"{min(r[k] for r in rows)} to {max(r[k] for r in rows)}" for k in ("T", "d"))
        largest = [f"{max(r['error'][n] for r in good):.1e}" if good else "" for n in ("value", "tangent", "gradient")]
        lines.append(
            f"| {dtype} | {len(rows)} | {spans} | {len(good)} | {len(wrong)} | {len(crashed)} | {' | '.join(largest)} |"
        )
    lines += [
        f"\n**{r['dtype']} T {r['T']}, d {r['d']}**: {r['crash'] if 'crash' in r else 'wrong ' + ', '.join(r['wrong'])}"
        for r in own
        if r.get("wrong") or "crash" in r
    ]
    tool = data["sanitizer"]
    if tool:
        lines.append(f"\ncompute-sanitizer (memcheck): {tool['shapes']} shapes, {tool['errors']} errors.")
    proofs = sorted(r["proof_ms"] for r in own if r.get("proof_ms") is not None)
    if proofs:
        lines.append(
            "\nProof at first use while many processes share the card, the dearest launch of each "
            f"of {len(proofs)} shapes: {quantiles(proofs)[1]:.0f} ms in the median, {proofs[-1]:.0f} at most, compiling left out."
        )
    note = "\nErrors against float64 plain torch, as shares of its norm; the largest of the shapes that are right.\n"
    return "\n".join(lines) + "\n" + note + footer(found)


def proofs(found: list[dict[str, Any]], _: Path) -> str:
    """Milliseconds to prove the launches of a network's attention: value, tangent and gradient."""
    rows = [r for data in found for r in data["rows"]]
    lines = [
        "| attention of | all launches, ms | first shape of a new process, ms | the linear layer before it, ms |",
        "|---|" + "---|" * 3,
    ]
    first = next((r for r in rows if r["process"] == "shared"), None)  # of its process, as those of new ones are
    for key in dict.fromkeys((r["network"], r["dtype"]) for r in rows):
        by = {r["process"]: r for r in rows if (r["network"], r["dtype"]) == key and r is not first}
        ms = map(_all_launches, (by.get("shared"), by.get("new")))
        lines.append(f"| {' '.join(key)} | {' | '.join(ms)} | {some(by.get('new', {}).get('start_ms'), '.0f')} |")
    return "\n".join(lines) + "\n" + footer(found)


def _all_launches(row: dict[str, Any] | None) -> str:
    """Milliseconds of a row's proofs together."""
    if row is None:
        return ""
    return "crashed" if "crash" in row else f"{sum(row['ms'].values()):.0f}"


def ops(found: list[dict[str, Any]], _: Path) -> str:
    """Each op and case: ours, the compiled reference and the best library, and what the ceilings allow."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in (r for data in found for r in data["rows"]):
        cases.setdefault((row["op"], row["case"], row["dtype"]), {})[row["backend"]] = row
    lines = [
        "| op, case | CUDA, ms | Triton, ms | plain torch | compiled | best library | fastest | predicted least | ours / it "
        "| host ms: CUDA, Triton |",
        "|---|" + "---|" * 9,
    ]
    for (op, case, dtype), rows in cases.items():
        timed = {name: row["p50_ms"] for name, row in rows.items() if row.get("p50_ms")}
        mine = min((n for n in ("native", "triton") if n in timed), key=timed.__getitem__, default=None)
        others = timed.keys() - {"native", "triton", "reference", "compiled"}
        library = min(others, key=timed.__getitem__, default=None)
        if not timed:
            continue
        own = rows[mine] if mine else {}
        cells = (
            some(timed.get("native"), ".4f"), some(timed.get("triton"), ".4f"),
            some(timed.get("reference"), ".4f"),
            some(timed.get("compiled"), ".4f"), f"{timed[library]:.4f} ({library})" if library else "",
            min(timed, key=timed.__getitem__), some(own.get("predicted_ms"), ".4f"),
            some(own.get("measured_over_predicted"), ".2f"),
            ", ".join(some(rows.get(n, {}).get("host_ms"), ".3f") or "-" for n in ("native", "triton")),
        )  # fmt: skip
        lines.append(f"| {op} {case} {dtype} | {' | '.join(cells)} |")
    median = found[0].get("spread_median")
    spread = f" Median of the spreads (p80 - p20) / p50: {median:.1%}." if median is not None else ""
    note = (
        f"\nTimes of kernels alone, from a cold L2 cache; what the host takes to issue a call stands apart.{spread}\n"
    )
    return "\n".join(lines) + "\n" + note + footer(found)


def spread(r: dict) -> str:
    """A median and its p20 to p80."""
    return f"{r['p50']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})"


def rollout_lines(rows: list[dict[str, Any]]) -> str:
    """Teacher milliseconds a student image by trajectories at once."""
    lines = [
        "| rollout | at once | trajectories/s | teacher, ms a student image | mode paper / it |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} {r['mode']} {r['how']} {r['precision']} | {r['at_once']} | {r['trajectories_per_s']:.1f} "
            f"| {r['p50_ms_image']:.2f} | {spread(r['paper_over'])} |"
        )
    return "\n".join(lines) + "\n"


def loop_lines(rows: list[dict[str, Any]]) -> str:
    """What the loop of `cmt train` loses beside bare steps, stage by stage."""
    lines = [
        "| run, stage | bare steps, images/s | `cmt train`'s loop | lost | seconds around it |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['run']}, {r['stage']} | {r['bare_images_per_s']:,.0f} | {r['loop_images_per_s']:,.0f} "
            f"| {r['loses']:.0%} | {r['around_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def trajectories(found: list[dict[str, Any]], _: Path) -> str:
    """Rollouts of the teacher on the card."""
    return rollout_lines([r for data in found for r in data["rows"]]) + footer(found)


def pipeline(found: list[dict[str, Any]], _: Path) -> str:
    """What the loop loses on the card."""
    return loop_lines([r for data in found for r in data["rows"]]) + footer(found)


def train(found: list[dict[str, Any]], results: Path) -> str:
    """Distances of every stage on the card beside those of a processor's seeds."""
    lines = ["| recipe, weights | steps | Fréchet, this card | Fréchet, CPU (all seeds) |", "|---|---|---|---|"]
    ends = []
    for row in (r for data in found for r in data["rows"]):
        file = results / "cpu" / f"{row['recipe']}-seeds.json"
        seeds = json.loads(file.read_text("utf-8"))["seeds"] if file.is_file() else []
        for stage, figures in row["figures"].items():
            for k, figure in figures.items():
                there = [s["stages"].get(stage, {}).get(k) for s in seeds]
                cpu = " / ".join(f"{f['frechet']:.2f}" for f in there if f)
                lines.append(f"| {row['recipe']}, {STAGES.get(stage, stage)} | {k} | {figure['frechet']:.2f} | {cpu} |")
        done = "to its report" if row["report"] and row["exit"] == 0 else f"not to its report (exit {row['exit']})"
        ends.append(f"{row['recipe']} {done} in {row['seconds']:.0f} s")
    return "\n".join(lines) + f"\n\n{'; '.join(ends)}, side by side.\n" + footer(found)


TABLES = {
    "step": (step, ("step.json", "step-*.json")),
    "sweep": (sweep, ("sweep.json",)),
    "proofs": (proofs, ("proofs.json",)),
    "ops": (ops, ("ops.json", "ops-*.json")),
    "train": (train, ("train.json",)),
    "trajectories": (trajectories, ("trajectories.json",)),
    "pipeline": (pipeline, ("pipeline.json",)),
}
