"""A clock and an energy counter of the tests' own, and an account under them."""

from __future__ import annotations

import json

from cmt_fast.accounting import Meter
from cmt_fast.bill import Account, Bill


class World:
    """Time that passes when it is told to, and a GPU that draws `watts` meanwhile."""

    def __init__(self, watts: float = 0.0) -> None:
        self.t, self.mj, self.watts, self.works = 1000.0, 5_000_000, watts, True
        self.reason = ""

    def spend(self, seconds: float) -> None:
        self.t += seconds
        self.mj += int(1000 * self.watts * seconds)

    def now(self) -> float:
        return self.t

    def read(self) -> int | None:
        return self.mj if self.works else None

    def meter(self, unit: str = "gpu", held: int = 1) -> Meter:
        return Meter(unit, held, self, self.now, self.now)


def account(folder, meter, manifest=None, write=True) -> Account:
    folder.mkdir(exist_ok=True)
    return Account(folder, meter, manifest, write, pulse_s=0)


def manifest(account: Account, step: int, nimg: int = 0) -> dict:
    """What the checkpoint of `step` says, as JSON gives it back."""
    return json.loads(json.dumps({"step": step, "nimg": nimg, "bill": account.add()}))


def amounts(bill: Bill, unit: str = "gpu") -> dict[str, tuple]:
    return {phase: tuple(a) for phase, a in bill.amounts[unit].items()}
