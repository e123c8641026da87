"""The energy of a machine's processors, where its kernel lets it be read: RAPL's counters under /sys/class/powercap.

Each package of cores counts its own microjoules and starts from zero at the end of its range, after minutes to hours. What is
counted is the whole machine's processors, with all other programs on them, without memory and disks. Since Linux 5.10 only
root may read it, and most virtual machines have none: then there is no figure, and `reason` says why.
"""

from __future__ import annotations

import re
from pathlib import Path

ZONES = Path("/sys/class/powercap")


class Packages:
    """All packages of this machine as one counter, as `meters.Counter` is one of a GPU. reason: why there is none."""

    def __init__(self, zones: Path = ZONES) -> None:
        self.reason, self._files, self._ranges = "", list[Path](), list[int]()
        self._last, self._sum = list[int](), 0
        try:
            found = [zone for zone in sorted(zones.iterdir()) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
            found = [zone for zone in found if _text(zone / "name").startswith("package")]
            self._ranges = [int(_text(zone / "max_energy_range_uj")) for zone in found]
            self._files = [zone / "energy_uj" for zone in found]
            self._last = [int(_text(file)) for file in self._files]
        except PermissionError as error:
            self.reason = f"{error.filename} can be read by root alone"
        except (OSError, ValueError):
            pass
        if not self._last:
            self._files = []
            self.reason = self.reason or f"this machine shows no energy of its processors (no package in {zones})"

    def read(self) -> int | None:
        """mJ since this counter was made; None where it cannot be read."""
        if not self._files:
            return None
        try:
            now = [int(_text(file)) for file in self._files]
        except (OSError, ValueError) as error:
            self.reason = f"the counter failed at times: {error}"
            return None
        for before, after, range_uj in zip(self._last, now, self._ranges):
            self._sum += after - before + (range_uj if after < before else 0)
        self._last = now
        return self._sum // 1000


def _text(file: Path) -> str:
    return file.read_text("ascii").strip()
