"""What happened to a run while it trained that its curves do not say: settings that were changed, looks that failed."""

from __future__ import annotations

from cmt_fast.render.templates import Table
from cmt_fast.report.text import TEXT
from cmt_fast.run import changes
from cmt_fast.run.standing import Standing

SHOWN = 20  # of failures, the newest


def table(stands: dict[str, Standing]) -> Table | None:
    """A row for each change of a stage's settings and for each failed look, in order; None where there is nothing to say."""
    rows, left_out = list[list[str]](), 0
    for s in stands.values():
        entries = (s.manifest or {}).get("changes") or ()
        rows += [[s.name, f"{e['step']:,}", f"{e['nimg']:,}", "settings changed", _words(e)] for e in entries]
        failed = s.record.kind("failed") if s.record else []
        left_out += max(0, len(failed) - SHOWN)
        for row in failed[-SHOWN:]:
            what = f"{row.get('what', 'a look')} failed".removeprefix("the ")
            rows.append([s.name, f"{row['step']:,}", f"{row['nimg']:,}", what, str(row.get("error", ""))])
    if not rows:
        return None
    note = f"{left_out} earlier failures are in metrics.jsonl." if left_out else ""
    return Table("Events", ["stage", "after step", "images", "what", "how"], rows, note, left=TEXT)


def _words(entry: changes.Change) -> str:
    return ", ".join(f"{key} {before} -> {after}" for key, (before, after) in entry["keys"].items())
