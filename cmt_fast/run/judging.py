"""How samples of a run are judged: features, distances and figures, over all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from cmt_fast.config.schema import Run
from cmt_fast.data.rows import Rows
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.evaluation import features, judges
from cmt_fast.run.decoding import Decoding
from cmt_fast.runtime import distributed, progress

Tallies = dict[int, judges.Tally | None]  # of each number of steps; None: its samples are not finite


class Judging:
    """Of one run's samples. folder: the run's, whose heart beats; features are kept there, or in `parents` while it is not."""

    def __init__(self, run: Run, data: Rows, setting: Sampler, decoding: Decoding, folder: Path, parents: Path) -> None:
        self.run, self.data, self.setting, self.decoding = run, data, setting, decoding
        self.folder, self.parents = folder, parents

    @functools.cached_property
    def space(self) -> features.Extractor:
        """The features that distances are of."""
        return features.extractor(self.data, self.folder if self.folder.is_dir() else self.parents)

    @functools.cached_property
    def judge(self) -> judges.Judge:
        """What `eval` asks for, opened once."""
        return self.open_judge()

    def open_judge(self, rows: bool = False) -> judges.Judge:
        """What `eval` asks for; rows: with precision and recall. Raises ConfigError naming the key that is missing."""
        decode = (lambda: self.decoding.codec(self.run.eval.vae).decode) if self.decoding.latents else None
        law = self.setting.law
        return judges.open_judge(self.data, self.run.eval, lambda: self.space, self.setting.device, decode, rows, law)

    def about(self, n: int, judge: judges.Judge | None = None) -> dict[str, str]:
        """What a record says beside the figures of n samples: the law of their labels, and what is to be known of n."""
        note = (judge or self.judge).caution(n)
        steered = getattr(self.run.model, "conditional", True)
        labels = self.setting.law.text() if steered else "the network takes none"
        return {"labels": labels, **({"note": note} if note else {})}

    def evaluate(
        self, net: Callable, steps: tuple[int, ...], n: int, solver: bool = False, seed: int | None = None,
        judge: judges.Judge | None = None, quiet: bool = False,
    ) -> dict:  # fmt: skip
        """{steps: {"frechet", "sliced_wasserstein", "accuracy", ...}} of n samples each; every rank must call it.

        Batches go round the ranks, so the world's size changes the order of sums and nothing else. Raises
        FloatingPointError, on every rank, when samples are not finite.
        """
        judge = judge or self.judge
        # what precision and recall keep of every sample is held for one number of steps at a time
        out: dict[str, dict] = {}
        for together in [(k,) for k in steps] if judge.rows else [steps]:
            for k, of in self.figures(net, together, (n,), solver, seed, judge, quiet).items():
                figures = of[n]
                if figures is None:
                    raise FloatingPointError(f"samples of {k} steps are not finite")
                out[str(k)] = figures
        return out

    def figures(
        self, net: Callable, steps: tuple[int, ...], counts: tuple[int, ...], solver: bool = False,
        seed: int | None = None, judge: judges.Judge | None = None, quiet: bool = False,
    ) -> dict[int, dict[int, dict | None]]:  # fmt: skip
        """{steps: {count: figures}}, each bit for bit what `evaluate` gives alone; None where samples are not finite.

        What is common is computed once: the first call of every consistency model's samples, and the batches that smaller
        counts share with the largest. A batch that a smaller count cuts is drawn for it again, as it is cut. One tally for
        each number of steps is held at once. Every rank must call it.
        """
        e, judge, n = self.run.eval, judge or self.judge, max(counts)
        seed = e.seed if seed is None else seed
        tallies: Tallies = {k: judge.tally() for k in steps}
        out: dict[int, dict[int, dict | None]] = {k: {} for k in steps}

        def take(tallies: Tallies, index: torch.Tensor) -> None:
            sound = tuple(k for k, tally in tallies.items() if tally)
            for k, samples in self.setting.draw_each(net, sound, seed, index, solver) if sound else ():
                tally = tallies[k]
                if tally and bool(torch.isfinite(samples).all()):
                    tally.add(samples, self.setting.labels(index))
                else:
                    tallies[k] = None

        title = f"judging at {' and '.join(map(str, steps))} step{'s' * (max(steps) > 1)}"
        with progress.counting(title, n, self.folder, quiet) as advance:
            for i, index in enumerate(torch.arange(n).split(e.batch)):
                first, mine = int(index[0]), i % distributed.size() == distributed.rank()
                for count in sorted(c for c in set(counts) if first <= c < first + len(index)):
                    cut = tallies
                    if count > first and mine:
                        cut = {k: tally and tally.copy() for k, tally in tallies.items()}
                        take(cut, index[: count - first])
                    _close(cut, count, out)
                if mine:
                    take(tallies, index)
                advance(len(index))
            _close(tallies, n, out)
        return out


def _close(tallies: Tallies, count: int, out: dict[int, dict[int, dict | None]]) -> None:
    """The figures of `count` samples, None where any rank's were not finite; every rank must call it."""
    for k, tally in tallies.items():
        broken = distributed.largest(int(tally is None))
        out[k][count] = None if broken or tally is None else tally.figures()
