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
        return judges.open_judge(self.data, self.run.eval, lambda: self.space, self.setting.device, decode, rows)

    def evaluate(
        self, net: Callable, steps: tuple[int, ...], n: int, solver: bool = False, seed: int | None = None,
        judge: judges.Judge | None = None, quiet: bool = False,
    ) -> dict:  # fmt: skip
        """{steps: {"frechet", "sliced_wasserstein", "accuracy", ...}} of n samples each; every rank must call it.

        Batches go round the ranks, so the world's size changes the order of sums and nothing else. Raises
        FloatingPointError, on every rank, when samples are not finite.
        """
        e, out, judge = self.run.eval, {}, judge or self.judge
        seed = e.seed if seed is None else seed
        for k in steps:
            tally, broken = judge.tally(), False
            with progress.counting(f"{k} step{'s' * (k > 1)}", n, self.folder, quiet) as advance:
                for i, index in enumerate(torch.arange(n).split(e.batch)):
                    if i % distributed.size() == distributed.rank() and not broken:
                        samples = self.setting.draw(net, k, seed, index, solver)
                        broken = not bool(torch.isfinite(samples).all())
                        if not broken:
                            tally.add(samples, self.setting.labels(index))
                    advance(len(index))
            if distributed.largest(int(broken)):
                raise FloatingPointError(f"samples of {k} steps are not finite")
            out[str(k)] = tally.figures()
        return out
