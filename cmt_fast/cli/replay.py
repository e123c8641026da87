"""`cmt replay`: one step of a stage once more, beside what was recorded of it."""

from __future__ import annotations

import argparse

from cmt_fast.run import workspace
from cmt_fast.runtime import distributed, machine
from cmt_fast.runtime.progress import say
from cmt_fast.train import checks, nonfinite, replay

NAMES = {"loss": "loss", "gradient": "gradient", "parameters": "parameters after it"}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare its arguments."""
    p.set_defaults(call=once_more)
    p.add_argument("stage", metavar="RUN/STAGE", help="a stage of a run, such as runs/digits/post")
    p.add_argument(
        "--step", type=int, required=True, metavar="N",
        help="the step, from 1 as rows of metrics count; taken from the newest checkpoint before it. Under torchrun with the "
        "run's number of processes, hashes can be compared",
    )  # fmt: skip


def once_more(args: argparse.Namespace) -> None:
    """Print its hashes and what they are compared with. Raises NotFinite (exit code 65) where it is not finite, Differs (1)
    where it is not what was recorded, ConfigError for what cannot be replayed."""
    work, name = workspace.open_stage(args.stage)
    distributed.start(machine.device("auto"), work.run.timeout_s)
    _told(args.stage, replay.replay(work, name, args.step))


def _told(stage: str, r: replay.Replayed) -> None:
    say(f"step {r.step:,} of {stage}, from {f'the checkpoint of step {r.start:,}' if r.start else 'its start'}")
    lines = r.alike
    for key in checks.KEYS:
        beside = ", ".join(
            dict.fromkeys("equal" if line[key] == r.found[key] else f"recorded {line[key]}" for line in lines)
        )
        if key == "parameters" and r.saved:
            beside += f"{', ' * bool(beside)}checkpoint {'equal' if r.saved == r.found[key] else r.saved}"
        say(f"{NAMES[key]:>20}  {r.found[key]}  {beside or 'not recorded'}")
    others = sorted({line["processes"] for line in r.recorded} - {distributed.size()})
    if others:
        say(f"recorded on {others[0]} processes: hashes are comparable under torchrun --nproc-per-node {others[0]}")
    elif unlike := [line for line in r.recorded if line not in lines]:
        was = unlike[-1].get(checks.LAYOUT) or "unknown"
        before = f"as {was}, not {r.layout}" if was != r.layout else "after steps that were laid out otherwise"
        say(f"recorded {before}: that rounds otherwise, and is not compared")
    if any(r.found[key] != value for key, value in r.again.items()):
        say(f"two passes of the same step differ here: loss {r.again['loss']} and {r.found['loss']}")
    if r.dump:
        say(f"recorded when it was trained: not finite, {r.dump.get('where')}")
    place = f"{stage}: step {r.step:,}"
    if r.traced:
        raise nonfinite.NotFinite(f"{place} is not finite: {nonfinite.told(r.traced)}")
    if r.worst:
        layer, apart = r.worst
        raise replay.Differs(
            f"{place}: {layer} is {apart:.1e} from the same ops in plain torch; a kernel is wrong here (CMT_KERNELS=reference "
            "trains without them)"
        )
    if r.differs:
        raise replay.Differs(
            f"{place}: {', '.join(r.differs)} not as recorded; a bit was flipped, or this machine or its kernels are not those"
        )
    if not r.sound:
        raise replay.Differs(f"{place}: two passes of the same rows differ on this machine")
    say("finite, near plain torch" + ", as recorded" * bool(lines or r.saved))
