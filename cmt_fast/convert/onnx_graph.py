"""A few-step generator as one ONNX graph, checked in onnxruntime before it is left on disk.

    noise   (B, ...) float32    unit normal, in the place of a seed
    labels  (B,) int64          classes; not there for a network without labels
    renoise (B, ...) float32    unit normal, added between two steps; on path "ve" alone
    guidance (B, 3) float32     scale and interval of times that a network is told (sampler.told_guidance); 1, 0, 1 is none
    steps   (1,) int64          1, or 2, any other is an error; not there where the recipe's sampler has no second step
    x       (B, ...) float32    samples in data units, [-1, 1] for images

B is free. `steps` is the condition of an If, so that one step costs one network call and both share the weights. The graph is
traced through the ops' references, in fp32. Few-step samples are guided in training, or by what the network is told. Weights
stand in the file, or beside it (FILE.data) where they are beyond what a protobuf holds.

torch.onnx, onnx, onnxscript and onnxruntime are imported here alone, when a graph is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import use
from torch import Tensor, nn

from cmt_fast.config import paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import DIFFUSION
from cmt_fast.convert.exporting import Export, claim
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.diffusion.solvers import table
from cmt_fast.models.precond import NoiseDenoiser
from cmt_fast.run import guidance
from cmt_fast.runtime import words
from cmt_fast.storage import files as files_

INSIDE = 3 << 29  # bytes of weights up to which they stand in the file; a protobuf ends at 2 GiB
ROWS = (1, 5)  # batches that are compared; the graph was traced with another


class _Graph(nn.Module):
    """Noise to samples by one or two calls of a network."""

    def __init__(self, net: nn.Module, setting: Sampler, told: bool = False) -> None:
        super().__init__()
        self.told = told
        self.net, self.linear, self.t_max = net, setting.path.name == "linear", setting.config.t_max
        self.mid = () if self.linear else setting.config.mid_times.get(2, ())
        self.two = self.linear or len(self.mid) == 1
        self.register_buffer("second", torch.tensor([False, True]), persistent=False)  # of 1 step, of 2
        self.ddpm: dict[
            float, tuple[float, float, float]
        ] = {}  # time -> step, c_out, c_in of DDPM's table, looked up here
        if isinstance(net, NoiseDenoiser):
            for t in (self.t_max, *self.mid):
                at = torch.tensor([t])
                _, c_out, c_in = map(float, net.scalings(at))
                self.ddpm[t] = float(net.step_of(at)), c_out, c_in

    @property
    def inputs(self) -> list[str]:
        """Names of what it takes."""
        labels = ["labels"] if self.takes_labels else []
        labels += ["guidance"] if self.told else []
        return ["noise", *labels, *(["renoise"] if self.mid else []), *(["steps"] if self.two else [])]

    @property
    def takes_labels(self) -> bool:
        """Whether the network reads labels."""
        return getattr(self.net.net, "label", None) is not None

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> Tensor:
        """Those of `inputs` in their order: what traces it knows arguments by name alone."""
        named = dict(zip(self.inputs, (a, b, c, d)))
        noise, labels = named["noise"], named.get("labels")
        extra = tuple(a for a in (labels, named.get("guidance")) if a is not None)
        if not self.two:
            return self._denoised(noise * self.t_max, self.t_max, *extra)
        more = self._more(named["steps"])
        if self.linear:
            one = lambda z, *y: self._jumps(z, 1, *y)
            two = lambda z, *y: self._jumps(z, 2, *y)
            return torch.cond(more, two, one, (noise, *extra))
        (t,) = self.mid
        x = self._denoised(noise * self.t_max, self.t_max, *extra)
        again = lambda x, z, *y: self._denoised(x + t * z, t, *y)
        return torch.cond(more, again, lambda x, z, *y: x.clone(), (x, named["renoise"], *extra))

    def _more(self, steps: Tensor) -> Tensor:
        """Whether there are two steps: (1,) -> (). Of other numbers than 1 and 2 the place is beyond a table of two, an error."""
        place = (steps - 1) * (7 - 3 * steps)  # 0 and 1; else below -2
        return self.second.index_select(0, place)[0]

    def _denoised(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        if t not in self.ddpm:
            times = x.new_full((x.shape[0],), t)
            return self.net(x, times, times, labels)
        n, c_out, c_in = self.ddpm[t]
        return x + c_out * self.net.net(c_in * x, x.new_full((x.shape[0],), n), None, labels, None)

    def _jumps(self, z: Tensor, steps: int, labels: Tensor | None = None, guide: Tensor | None = None) -> Tensor:
        told = () if guide is None else (None, None, False, guide)
        for row in table(ProbabilityPath("linear"), "jump", steps, 1.0, 0.0).rows:
            t, r = (z.new_full((z.shape[0],), u) for u in (row.t, row.r))
            z = z + row.coefficients[1] * self.net(z, t, r, labels, *told)
        return z


def to_onnx(export: Export, out: Path) -> str:
    """Write the graph; what it takes and how it compares, as lines. Raises ConfigError for a stage that draws in many steps.

    Raises FloatingPointError, and leaves no file, where onnxruntime's samples agree with float64 to less than half of the digits
    of fp32, and less well than twice torch's own error, root of mean squares.
    """
    work, stage = export.work, export.stage
    kind = work.run.stages[stage].objective.kind
    if kind in DIFFUSION:
        raise ConfigError(
            f"--format: onnx is of one or two steps, and {stage} is a diffusion model ({kind}); take a later stage"
        )
    claim(out, ".onnx")
    claim(out.with_name(f"{out.name}.data"))
    _libraries()
    net = work.build()
    net.load_state_dict(export.weights)
    most = guidance.told_most(work.place, stage)
    graph = _Graph(net.requires_grad_(False).eval(), work.setting, most > 1)
    setting = work.setting.told(1.0, most**0.5, most) if graph.told else work.setting
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        opset = _write(graph, export, setting, temporary / out.name)
        compared = _compare(graph, setting, temporary / out.name)
        written = sorted(temporary.iterdir(), key=lambda p: p.name == out.name)  # the graph after its weights
        for file in written:
            files_.sync(file)
            os.replace(file, out.with_name(file.name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    beside = "".join(f", weights in {f.name}" for f in written[:-1])
    steps = "steps 1 or 2" if graph.two else "one step (sampler.mid_times has none for 2)"
    return f"{out}: inputs {', '.join(graph.inputs)}; {steps}; opset {opset}{beside}\n{compared}"


def _libraries() -> None:
    """Raises ConfigError where one is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--format: onnx needs {error.name}, which is not installed: pip install 'cmt-fast[onnx]'"
        ) from None


def _write(graph: _Graph, export: Export, setting: Sampler, file: Path) -> int:
    """Trace and save; returns the opset."""
    given = _given(graph, setting, 3, 2)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    shapes = {name: {} if of == "steps" else {0: batch} for name, of in zip("abcd", graph.inputs)}
    with use("reference"), torch.no_grad(), _quietly():
        program = torch.onnx.export(
            graph,
            given,
            dynamo=True,
            input_names=graph.inputs,
            output_names=["x"],
            dynamic_shapes=shapes,
            verbose=False,
        )
    model = program.model
    model.producer_name, model.producer_version = "cmt-fast", export.about["version"]
    model.doc_string = " ".join((__doc__ or "").partition("torch.onnx,")[0].split())
    about = {**export.about, "run": paths.unplaced(export.about["run"])}
    model.metadata_props["cmt-fast"] = json.dumps(about, sort_keys=True)
    for node in model.graph.all_nodes():  # where in our files each was called, with the paths of this machine
        node.metadata_props.clear()
    size = sum(t.numel() * t.element_size() for t in export.weights.values())
    with _quietly():
        program.save(str(file), external_data=size > INSIDE)
    return int(model.opset_imports[""])


def _given(graph: _Graph, setting: Sampler, rows: int, steps: int) -> tuple[Tensor, ...]:
    """What the graph takes for the first samples of seed 0."""
    index = torch.arange(rows, device=setting.device)
    make: dict[str, Any] = {
        "noise": lambda: setting.noise(0, index),
        "labels": lambda: setting.labels(index),
        "guidance": lambda: setting.guide(index).float(),
        "renoise": lambda: setting.between(0, 1, index),
        "steps": lambda: torch.tensor([steps]),
    }
    return tuple(make[name]().cpu() for name in graph.inputs)


@torch.no_grad()
def _compare(graph: _Graph, setting: Sampler, file: Path) -> str:
    """onnxruntime's samples, and torch's, against float64: a line for each number of steps. Raises FloatingPointError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    cases = [(rows, steps) for steps in ((1, 2) if graph.two else (1,)) for rows in ROWS]
    given = {case: _given(graph, setting, *case) for case in cases}
    with use("reference"):
        ours = {case: _torch(graph.net, setting, *case, torch.float32) for case in cases}
        graph.net.double()
        exact = {case: _torch(graph.net, setting, *case, torch.float64) for case in cases}
    lines = []
    for steps in dict.fromkeys(steps for _, steps in cases):
        mine = [case for case in cases if case[1] == steps]
        theirs = [session.run(None, dict(zip(graph.inputs, (v.numpy() for v in given[case]))))[0] for case in mine]
        got, want, here = (
            torch.cat([x.double().flatten() for x in parts])
            for parts in (map(torch.from_numpy, theirs), (exact[c] for c in mine), (ours[c] for c in mine))
        )
        rms = lambda x: float(x.square().mean().sqrt())
        bound = max(2 * rms(here - want), torch.finfo(torch.float32).eps ** 0.5 * rms(want))
        text = (
            f"{words.steps(steps)}: onnxruntime errs by {float((got - want).abs().max()):.2e} at most against float64 "
            f"(rms {rms(got - want):.2e}), torch by {float((here - want).abs().max()):.2e} (rms {rms(here - want):.2e})"
        )
        if not rms(got - want) <= bound:  # so that NaN is refused
            raise FloatingPointError(f"the graph does not give the trainer's samples, and is not kept: {text}")
        lines.append(text)
    return "\n".join(lines)


def _torch(net: nn.Module, setting: Sampler, rows: int, steps: int, dtype: torch.dtype) -> Tensor:
    """What `cmt sample` draws, on the CPU in a dtype."""
    index = torch.arange(rows, device=setting.device)
    labels, noise = setting.labels(index), setting.noise(0, index).to("cpu", dtype)
    here = setting.starting(noise, None if labels is None else labels.cpu(), index.cpu())
    return here.few_steps(net, steps, 0, torch.arange(rows))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of libraries that are not there and of names that it gives."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
