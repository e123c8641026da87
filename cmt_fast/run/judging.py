"""How samples of a run are judged: features, distances and figures, over all ranks.

Evaluations in training take the distance alone; `cmt report` and `cmt eval` all that evaluation/measures.py says. What either
needs of the real data is kept in the run, so it is judged where the data are not. What is done of a long evaluation is kept until
it ends (unfinished.py), inside `going_on`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.data.rows import Rows, opened
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.evaluation import features, judges, keeping, kept, measures, references
from cmt_fast.evaluation.roots import Roots
from cmt_fast.evaluation.tallies import Tally
from cmt_fast.run import unfinished
from cmt_fast.run.decoding import Decoding
from cmt_fast.run.unfinished import Unfinished
from cmt_fast.runtime import distributed, machine, progress, signals
from cmt_fast.storage import checkpoint, files

Tallies = dict[int, Tally | None]  # of each number of steps; None: its samples are not finite
ELSEWHERE = "another process could not judge, its output says why"
ALL = "all"  # of a ledger: every figure of a set


class Judging:
    """Of one run's samples. folder: the run's; features are kept there, or in `parents` while it is not.

    alive: whose heart beats while samples are judged; None for a run that is only read, which is no sign of its life.
    """

    def __init__(self, run: Run, data: Rows, setting: Sampler, decoding: Decoding, folder: Path, parents: Path) -> None:
        self.run, self.data, self.setting, self.decoding = run, data, setting, decoding
        self.folder, self.parents = folder, parents
        self.alive: Path | None = folder
        self.roots = Roots(folder / kept.FOLDER)
        self._going: _Going | None = None

    @functools.cached_property
    def space(self) -> features.Extractor:
        """The features that distances are of."""
        return features.extractor(self.data, self.folder if self.folder.is_dir() else self.parents)

    @functools.cached_property
    def judge(self) -> judges.Judge:
        """What `eval` asks for, opened once."""
        return self.open_judge()

    @functools.cached_property
    def thorough(self) -> judges.Judge:
        """The same with every measure, of `eval.n` samples. Opened by every rank."""
        return self.open_judge(samples=self.run.eval.n)

    def open_judge(self, rows: bool = False, samples: int = 0) -> judges.Judge:
        """What `eval` asks for; rows: with precision and recall; samples: how many will come, for every measure there is,
        then every rank must call it. Raises ConfigError naming the key that is missing.
        """
        decode = (lambda: self.decoding.codec(self.run.eval.vae).decode) if self.decoding.latents else None
        law, device = self.setting.law, self.setting.device
        judge = judges.open_judge(self.data, self.run.eval, lambda: self.space, device, decode, rows, law)
        judge.kept, judge.roots = self._found(judge), self.roots
        if samples:
            self._keep(judge)
            judge.expected = samples
        return judge

    def rehearse(self) -> None:
        """Open what judges samples and see that two of them pass: weights, statistics, decoder, widths. Of distances in the
        run's own features nothing: they are of the data, which are open.

        Raises ConfigError naming the key of `eval`. What is opened stays open for the first evaluation.
        """
        metric, file = self.run.eval.metric, self.run.eval.reference
        if metric == "frechet":
            if file is not None:
                references.read(Path(file), metric, file.endswith(".safetensors"))
            return
        judge = self.judge
        width = len(judge.reference.moments.mean)
        x = torch.zeros(2, *self.data.shape, device=self.setting.device)
        try:
            found = judge.space.features(judge.look(x)).shape[1]
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"eval.metric: {judge.metric} cannot look at samples of {tuple(x.shape[1:])} ({text})"
            ) from None
        if found != width:
            raise ConfigError(f"eval.reference: has {width} features, and {judge.name} has {found}; make the file anew")

    def at(self, setting: Sampler) -> Judging:
        """The same judge of samples that are drawn otherwise; inside `going_on` what is done of either is kept."""
        other = copy.copy(self)
        other.setting = setting
        return other

    # ------------------------------------------------------------------------------------------ what is kept of real data

    def keep(self) -> kept.Kept:
        """What judging needs of the real data as files of the run, unless they are there; every rank must call it.

        Raises ConfigError where neither the data nor those files are here.
        """
        return self._keep(self.judge)

    def _keep(self, judge: judges.Judge) -> kept.Kept:
        found = judge.kept
        # all have looked before one writes, and a shared disk may show the files to some of them alone
        if not distributed.smallest(int(found is not None)):
            found = None
        if found is None:
            taken: list[kept.Kept] = []
            try:
                distributed.agreed(lambda: taken.append(keeping.take(judge, self._key(judge))), Exception, ELSEWHERE)
            except ConfigError as error:
                wrong = kept.wrong(self.folder)
                raise ConfigError(f"{error}; {wrong}, which would do in their place" if wrong else str(error)) from None
            self._write(found := taken[0])
        if distributed.size() > 1:  # the floor may have come onto it between two looks
            found.about["floor"] = json.loads(distributed.text_of_first(json.dumps(found.about["floor"])))
        judge.kept = found
        return found

    def _write(self, found: kept.Kept) -> None:
        """Where the run's folder is a folder that can be written to: else they are taken again next time."""
        if distributed.rank() == 0 and self.folder.is_dir():
            with files.unless_refused():
                kept.write(self.folder, found)

    def _found(self, judge: judges.Judge) -> kept.Kept | None:
        """What is kept for this judge; of rows that are not here also what was taken under other settings of theirs."""
        for whole in (True, False):
            key = {**self._key(judge), **({} if whole else {"data": None})}
            found = next((k for f in dict.fromkeys((self.folder, self.parents)) if (k := kept.read(f, key))), None)
            if found is not None or judge.here:
                return found
        return None

    def of_real(self, extractor: str | None, n: int) -> tuple[dict[str, Any] | None, float | None]:
        """The floor of n rows and the sharpness of real rows as files keep them: nothing is computed, no judge is opened."""
        key = {"extractor": extractor, "labels": self.setting.law.text()}
        found = next((k for f in (self.folder, self.parents) if (k := kept.read(f, key))), None)
        return (found.about["floor"].get(str(n)), found.sharpness) if found is not None else (None, None)

    def _key(self, judge: judges.Judge) -> dict[str, Any]:
        """What the kept files must be of. Where the reference is not here, what is kept stands for it."""
        settings = {k: v for k, v in loading.dump(self.run)["data"].items() if k != "path"}
        key = {
            "rows": self.data.facts,
            "metric": judge.metric,
            "extractor": judge.name,
            "labels": self.setting.law.text(),
        }
        reference: dict[str, str | None] = {"name": "", "xxh3_128": ""}
        file = judge.file
        if file is not None:
            reference = {"name": file.name, "xxh3_128": files.checksum(file) if file.is_file() else None}
        return {**key, "reference": reference, "data": settings}

    def floor(self, judge: judges.Judge, n: int) -> dict[str, Any] | None:
        """Figures of n real rows, drawn again and again with the labels that samples have, as though a network had made them:
        what one that knows the data by heart would get. "unseen": {distance: what a perfect generator of new rows would},
        where two halves of the data say it. None where the data are not here and nobody asked before, or where samples are of
        classes that the data do not have. On every rank.

        judge: one of every measure, as `thorough` is.
        """
        found = self._keep(judge)
        known = found.about["floor"].get(str(n))
        chosen = self._drawn(n) if known is None and judge.here else None
        if chosen is None:
            return known
        tally, index, data = Tally(judge, n), torch.arange(n), opened(self.data)
        with unfinished.opened(self.folder, "floor", {**self._of(judge), "n": n}) as store:
            for i, part in enumerate(index.split(self.run.eval.batch)):
                if i % distributed.size() == distributed.rank():
                    seen = store.block("real", part)
                    if seen is None:
                        rows = data.rows(chosen[part], torch.zeros_like(part))[0]
                        seen = tally.look(rows.to(self.setting.device), self.setting.labels(part), part)
                        store.put("real", seen)
                    tally.take(seen)
            known = {**tally.figures(store.ledger("real")), "unseen": self._unseen(found, n)}
            found.about["floor"][str(n)] = known
            self._write(found)
            distributed.barrier()
        return known

    def _drawn(self, n: int) -> torch.Tensor | None:
        """Rows that stand for n samples, of the labels that those have. (n,); None where a label has no rows."""
        u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        of, labels = self.setting.labels(torch.arange(n)), opened(self.data).labels
        if of is None or labels is None:
            return (u * self.data.n).long()
        order, counts = labels.cpu().argsort(stable=True), torch.bincount(labels.cpu(), minlength=int(of.max()) + 1)
        if not bool(counts[of].all()):
            return None
        return order[(counts.cumsum(0) - counts)[of] + (u * counts[of]).long()]

    def _unseen(self, found: kept.Kept, n: int) -> dict[str, float]:
        halves = {"frechet": ("features", 1), "frechet_2": ("features_2", len(found.moments_2.mean))}
        rows, out = (found.about["n"], found.about["rows"]), {}
        for (key, (name, per)), against in zip(halves.items(), rows):
            features = found.tensors.get(name)
            far = None if features is None else measures.apart(features, n, against)
            if far is not None:
                out[key] = far / per
        return out

    def about(self, n: int, judge: judges.Judge | None = None) -> dict[str, str]:
        """What a record says beside the figures of n samples: the law of their labels, the guidance that a network of few steps
        is told, and what is to be known of n."""
        note = (judge or self.judge).caution(n)
        steered = getattr(self.run.model, "conditional", True)
        labels = self.setting.law.text() if steered else "the network takes none"
        omega, low, high = self.setting.config.told_guidance
        told = {} if omega == 1 else {"told_guidance": f"{omega:g} in [{low:g}, {high:g}]"}
        return {"labels": labels, **told, **({"note": note} if note else {})}

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

        Long: it holds what is done to every batch, in order.

        What is common is computed once: the first call of every consistency model's samples, and the batches that smaller
        counts share with the largest. A batch that a smaller count cuts is drawn for it again, as it is cut. One tally for
        each number of steps is held at once. Every rank must call it.
        """
        judge, n = judge or self.judge, max(counts)
        seed = self.run.eval.seed if seed is None else seed
        store = self._store(judge, seed, solver)
        named = lambda k, count: store.ledger(f"{k} steps, {count} of {judge.expected or n} samples")
        out = {k: {c: named(k, c).known(ALL) for c in counts if ALL in named(k, c).own} for k in steps}
        tallies: Tallies = {k: Tally(judge) for k in steps if len(out[k]) < len(set(counts))}
        failed: list[Exception] = []  # of this rank, which goes on making the calls that all make

        def take(tallies: Tallies, index: torch.Tensor) -> None:
            """As `add`; an error of one rank of several is raised on all by `close`."""
            if failed:
                return
            try:
                add(tallies, index)
            except Exception as error:
                failed.append(error)

        def add(tallies: Tallies, index: torch.Tensor) -> None:
            """What is taken of these samples is added up: as it was kept or, where it was not, as they are drawn."""
            sound = {k: tally for k, tally in tallies.items() if tally}
            known = {k: store.block(str(k), index) for k in sound}
            for k, seen in known.items():
                if seen is not None:
                    sound[k].take(seen)
            todo = tuple(k for k, seen in known.items() if seen is None)
            for k, samples in self.setting.draw_each(net, todo, seed, index, solver) if todo else ():
                if bool(torch.isfinite(samples).all()):
                    seen = sound[k].look(samples, self.setting.labels(index), index)
                    store.put(str(k), seen)
                    sound[k].take(seen)
                else:
                    tallies[k] = None

        def close(tallies: Tallies, count: int) -> None:
            """The figures of `count` samples, None where any rank's were not finite; every rank must call it."""
            if distributed.largest(int(bool(failed))):
                raise failed[0] if failed else RuntimeError(ELSEWHERE)
            for k, tally in tallies.items():
                ledger = named(k, count)
                broken = distributed.largest(int(tally is None))
                out[k][count] = ledger.put(ALL, None if broken or tally is None else tally.figures(ledger))

        title = f"judging at {' and '.join(map(str, steps))} step{'s' * (max(steps) > 1)}"
        with progress.counting(title, n, self.alive, quiet) as advance:
            for i, index in enumerate(torch.arange(n).split(self.run.eval.batch)) if tallies else ():
                if i % distributed.size() == 0:  # every rank has had as many
                    signals.look()
                first, mine = int(index[0]), i % distributed.size() == distributed.rank()
                for count in sorted(c for c in set(counts) if first <= c < first + len(index)):
                    cut = tallies
                    if count > first and mine and not failed:
                        cut = {k: tally and tally.copy() for k, tally in tallies.items()}
                        take(cut, index[: count - first])
                    close(cut, count)
                if mine:
                    take(tallies, index)
                advance(len(index))
            close(tallies, n)
        for k in tallies:
            store.drop(str(k))
        return out

    # ------------------------------------------------------------------------------------------ what is done so far

    @contextlib.contextmanager
    def going_on(self, stage: str, manifest: Mapping[str, Any]) -> Iterator[None]:
        """Inside, what is done of judging one network's samples is kept, and what an earlier command did of it is taken from
        there; when it is left without an error, all of it is gone. manifest: of its checkpoint. Every rank must call it.
        """
        with contextlib.ExitStack() as ending:
            self._going = _Going(ending, stage, checkpoint.ema_sum(manifest), {})
            try:
                yield
            finally:
                self._going = None

    def _store(self, judge: judges.Judge, seed: int, solver: bool) -> Unfinished:
        """Where it is kept; nowhere outside `going_on`."""
        if self._going is None:
            return Unfinished()
        ending, stage, weights, stores = self._going
        of = {"stage": stage, "weights": weights, "seed": seed, "solver": solver}
        sampler = dataclasses.asdict(self.setting.config)  # type: ignore[call-overload]
        key = {**of, "sampler": sampler, **self._of(judge)}
        if (name := repr(key)) not in stores:
            stores[name] = ending.enter_context(unfinished.opened(self.folder, stage, key))
        return stores[name]

    def _of(self, judge: judges.Judge) -> dict[str, Any]:
        """On what it depends what is taken of samples, and their figures, beside the network and the seed."""
        latents = self.decoding.latents
        sums = lambda tensors: [xxhash.xxh3_128(v.cpu().contiguous().numpy().tobytes()).hexdigest() for v in tensors]
        return {
            "judge": self._key(judge),
            "against": sums(judge.reference.moments),
            "second": sums(v for _, v in sorted(judge.kept.second.fitted.items())) if judge.kept else None,
            "all": [judge.expected, judge.rows, judge.file is None],
            "law": sums([self.setting.law.counts]),
            "vae": [self.run.eval.vae, *latents[:2]] if latents else None,
            "batch": self.run.eval.batch,
            "device": machine.rounds(self.setting.device),
        }


class _Going(NamedTuple):
    """What `going_on` is about: what ends with it, the stage, its weights, and where each kind of its samples is kept."""

    ending: contextlib.ExitStack
    stage: str
    weights: str
    stores: dict[str, Unfinished]
