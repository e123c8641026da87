"""What a tangent costs: the dual forward and the MeanFlow step beside the plain forward, flow matching and torch.func.jvp.

Every call is timed in turns within one run, and a ratio is taken turn by turn. A step is loss and backward, no
optimizer. The dual forward is checked first: its value bitwise against the plain forward, its tangent against
torch.func.jvp in float64; a wrong one gets no number.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import Dual, table
from cmt_kernels.cases import allowed, error
from torch import Tensor

from bench.harness.results_file import ROOT, about, save
from bench.harness.timing import quantiles, turns
from bench.training.networks import (
    average_velocity,
    batch_of,
    flow_loss,
    func_jvp,
    meanflow_loss,
    one_pass_loss,
    saved_bytes,
)

# ratio -> (call, over call, bound, target); "bytes" compares what is saved for backward
TARGETS = {
    "dual forward, k = B / forward": ("dual, k = B", "forward", "at most", 2.3),
    "func.jvp / dual forward, k = B": ("func.jvp", "dual, k = B", "at least", 1.45),
    "MeanFlow step / flow step": ("MeanFlow step", "flow step", "at most", 1.2),
    "func.jvp step / MeanFlow step": ("func.jvp step", "MeanFlow step", "at least", 1.4),
    "MeanFlow bytes / flow bytes": ("MeanFlow step", "flow step", "at most", 1.05),
    "dual forward, k = B/4 / forward": ("dual, k = B/4", "forward", "", None),
    "func.jvp / forward": ("func.jvp", "forward", "", None),
    "func.jvp step / flow step": ("func.jvp step", "flow step", "", None),
    "func.jvp bytes / flow bytes": ("func.jvp step", "flow step", "", None),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*PRECISIONS, "both"], default="both", help="bf16: autocast, as in training")
    parser.add_argument("--seconds", type=float, default=300.0, help="for each dtype; at least 5 turns")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--least", type=int, default=5, help="turns at least")
    parser.add_argument("--json", type=Path, help="where to write; default bench/results/<device>/dual.json")


class Timed:
    """The calls of one dtype, over one network and one batch."""

    def __init__(self, arguments: argparse.Namespace, dtype: str) -> None:
        a, self.device = arguments, arguments.device
        self.autocast = dtype == "bf16"
        self.net = average_velocity(a.width, a.depth, a.tokens).to(a.device)
        self.batch = batch_of(a.batch, a.tokens, a.device)
        g = torch.Generator().manual_seed(3)
        self.z, self.v = (torch.randn(self.batch.x_0.shape, generator=g).to(a.device) for _ in range(2))
        self.t = torch.rand(a.batch, generator=g).to(a.device)
        self.r = self.t / 2

    def call(self, *xs: Any) -> Any:
        """The network in this dtype, as the engine calls it."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.net(*xs)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.call(self.z, self.t, self.r, self.batch.labels, self.batch.drop)

    @torch.no_grad()
    def dual(self, k: int) -> Dual:
        x, t, r = Dual(self.z, self.v[:k]), Dual(self.t, torch.ones_like(self.t[:k])), Dual(self.r, 0 * self.r[:k])
        return self.call(x, t, r, self.batch.labels, self.batch.drop)

    @torch.no_grad()
    def jvp(self) -> tuple[Tensor, Tensor]:
        return func_jvp(self.call, self.z, self.t, self.r, self.v, self.batch)

    def step(self, loss: Callable[[Callable, Any], Tensor]) -> Tensor:
        self.net.zero_grad(set_to_none=True)
        y = loss(self.call, self.batch)
        y.backward()
        return y.detach()

    def calls(self) -> dict[str, Callable[[], Any]]:
        b = len(self.t)
        return {
            "forward": self.forward,
            "dual, k = B": lambda: self.dual(b),
            "dual, k = B/4": lambda: self.dual(b // 4),
            "func.jvp": self.jvp,
            "flow step": lambda: self.step(flow_loss),
            "MeanFlow step": lambda: self.step(meanflow_loss),
            "func.jvp step": lambda: self.step(one_pass_loss),
        }

    def wrong(self) -> str:
        """What is wrong with the dual forward: "" if nothing is."""
        value, plain = self.forward(), self.jvp()
        exact, rows = copy.deepcopy(self.net).double(), min(2, len(self.t))
        few = type(self.batch)(*(x[:rows] for x in self.batch))
        with torch.no_grad():
            _, truth = func_jvp(exact, *(x[:rows].double() for x in (self.z, self.t, self.r, self.v)), few)
        for k in (len(self.t), len(self.t) // 4):
            y = self.dual(k)
            if not torch.equal(y.value, value):
                return f"k = {k}: the value is not the plain forward's"
            n = min(k, rows)
            e, limit = error(y.tangent[:n], truth[:n]), allowed(plain[1][:n], truth[:n])
            if not e <= limit:
                return f"k = {k}: the tangent errs by {e:.1e}, more than {limit:.1e}"
        return ""


def measure(arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Times, saved bytes and ratios of one dtype; only `wrong` where the dual is."""
    timed = Timed(arguments, dtype)
    wrong = timed.wrong()
    if wrong:
        return {"wrong": wrong}
    losses = {"flow step": flow_loss, "MeanFlow step": meanflow_loss, "func.jvp step": one_pass_loss}
    saved = {name: saved_bytes(lambda f=f: f(timed.call, timed.batch), timed.net) for name, f in losses.items()}
    times = turns(timed.calls(), arguments.device, arguments.seconds, least=arguments.least)
    ratios = {}
    for name, (over, under, bound, target) in TARGETS.items():
        if "bytes" in name:
            p20 = p50 = p80 = saved[over] / saved[under]
        else:
            p20, p50, p80 = quantiles([a / b for a, b in zip(times[over], times[under])])
        met = None if target is None else p50 <= target if bound == "at most" else p50 >= target
        ratios[name] = {"p20": p20, "p50": p50, "p80": p80, "bound": bound, "target": target, "met": met}
    ms = {name: dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(t))) for name, t in times.items()}
    return {"wrong": None, "turns": len(times["forward"]), "times": ms, "saved_bytes": saved, "ratios": ratios}


def show(dtype: str, result: dict[str, Any]) -> None:
    """The table of one dtype."""
    if result["wrong"]:
        print(f"{dtype}: no numbers: {result['wrong']}")
        return
    print(f"{dtype}, {result['turns']} turns{'p20 ms':>30} {'p50 ms':>10} {'p80 ms':>10} {'saved MB':>10}")
    for name, t in result["times"].items():
        mb = result["saved_bytes"].get(name)
        print(
            f"  {name:34} {t['p20_ms']:10.1f} {t['p50_ms']:10.1f} {t['p80_ms']:10.1f} "
            + (f"{mb / 1e6:10.1f}" if mb is not None else "")
        )
    for name, r in result["ratios"].items():
        verdict = "" if r["met"] is None else f"{r['bound']} {r['target']}: {'met' if r['met'] else 'MISSED'}"
        print(f"  {name:34} {r['p20']:10.2f} {r['p50']:10.2f} {r['p80']:10.2f} {verdict}")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, write the JSON; 1 if the dual is wrong. A missed target is printed, not an error."""
    shape = {key: getattr(arguments, key) for key in ("width", "depth", "tokens", "batch")}
    results: dict[str, Any] = about(arguments.device) | {"shape": shape, "ops": table(), "dtypes": {}}
    print(f"{results['device']}, torch {results['torch']}, commit {results['commit']}, {results['date']}")
    for dtype in PRECISIONS if arguments.dtype == "both" else [arguments.dtype]:
        results["dtypes"][dtype] = measure(arguments, dtype)
        show(dtype, results["dtypes"][dtype])
    fixed = ROOT / "bench" / "results" / "cpu" / "dual.json" if arguments.device == "cpu" else None
    print("written to", save("dual", arguments.device, results, arguments.json or fixed))
    missed = [
        f"{dtype} {name}"
        for dtype, result in results["dtypes"].items()
        for name, r in result.get("ratios", {}).items()
        if r["met"] is False
    ]
    print("missed:", "; ".join(missed) or "none")
    return int(any(result["wrong"] for result in results["dtypes"].values()))
