"""The step as one CUDA graph, proven without a GPU: on a tape that refuses what a capture refuses, replays are eager steps
to the bit for every objective, and what a graph would get wrong is refused before it is used."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.training.networks import perturb
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Run
from cmt_fast.engine import LocalEngine, compile, graph
from cmt_fast.engine.graph import StepGraph
from cmt_fast.models.vgg import LatentVgg
from cmt_fast.perceptual.distance import save_latent_network
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import batches, loop
from cmt_fast.train import steps as taking
from tests.engine.step_graph_cases import CASES
from tests.fixtures.tape import REFUSED, Tape, tape
from tests.fixtures.tiny import tiny

STEPS = 4
__all__ = ["tape"]
PROVEN = "the step is one CUDA graph, equal to the eager one on two batches"


class Training:
    """A stage of a small network with open gates, taught by one that was not trained."""

    def __init__(
        self, case: str, file: Path | None = None, *more: str, device: str = "cpu", lends: bool | None = None
    ) -> None:
        recipe, name, keys = CASES[case]
        tracks = f"{name}.ema=[{{kind: constant, beta: 0.99}}, {{kind: power, sigma_rel: 0.1}}]"
        keys = [k.replace("FILE", str(file)) for k in (tracks, *keys, *more)]
        self.work = Workspace(run_of(recipe, *keys, f"device={device}"), Path("nowhere"))
        torch.manual_seed(0)
        net, teacher = (perturb(self.work.build()).to(device) for _ in range(2))
        teacher.requires_grad_(False).eval()
        own = self.work.stage(name)
        self.engine = LocalEngine(net, own.config, self.work.device, own.grad_accum_steps(1), lends)
        self.source = batches.BatchProvider(own, self.engine, self.work.data, self.work.device, lambda _: teacher)
        self.sums, self.lines, self.count = taking.Sums(None), list[str](), itertools.count()

    def loss(self, drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.source.loss_of(self.engine, drawn)

    def graph(self, loss: Callable | None = None, **more: Any) -> StepGraph:
        return StepGraph(self.engine, loss or self.loss, "post", self.lines.append, **more)

    def eager(self, drawn: Any) -> dict[str, Tensor]:
        return graph.eager(self.engine, self.loss, drawn)

    def take(self, gradient: Callable[[Any], dict[str, Tensor]], steps: int = STEPS) -> None:
        """What the loop does at each step: gradients and sums of all parts, then the optimizer."""
        parts = self.engine.grad_accum_steps
        for step in range(steps):
            for part in range(parts):
                self.sums.add(gradient(self.source.draw(step, part)), parts)
            self.sums.add({"grad_norm": self.engine.step(1e-3)})

    def numbers(self) -> dict[str, Tensor]:
        """Weights, both EMA, moments, and the sums that metrics are made of."""
        e = self.engine
        tracks = {f"ema {i}": x for i, x in enumerate(e.emas)}
        return {"p": e.p, "m": e.m, "v": e.v, **tracks, **self.sums.sums}


def run_of(recipe: str, *keys: str) -> Run:
    """The recipe with a small network."""
    plane = ["data.n=500", "model.width=16", "model.depth=1", "pre.batch=32"]
    return loading.load(recipe, [*plane, *keys]) if recipe == "gmm" else tiny(recipe, *keys)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """A file of features of the digits, not trained."""
    file = tmp_path_factory.mktemp("features") / "latent_vgg.safetensors"
    torch.manual_seed(3)
    save_latent_network(LatentVgg(1, 10, 4), file, {"normalisation": None})
    return file


def differing(one: Training, other: Training) -> list[str]:
    """What two trainings differ in; their numbers are all finite."""
    a, b = one.numbers(), other.numbers()
    assert a.keys() == b.keys() and all(torch.isfinite(x).all() for x in a.values())
    return [k for k in a if not torch.equal(a[k], b[k])]


# ------------------------------------------------------------------------------------------ every objective


@pytest.mark.parametrize("precision, lends", [("fp32", False), ("bf16", False), ("bf16-stream", True)])
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_eager_steps_to_the_bit(
    case: str, precision: str, lends: bool, tape: Tape, features: Path
) -> None:
    key = f"{CASES[case][1]}.precision={precision}"
    ours, plain = (Training(case, features, key, lends=lends) for _ in range(2))
    ours.take(ours.graph())
    plain.take(plain.eager)
    assert ours.lines == [f"    post {PROVEN}"]
    assert differing(ours, plain) == []
    passes = STEPS * ours.engine.grad_accum_steps
    assert tape.captures == 2 and tape.replays == 2 + 1 + passes - 1  # in both proofs, then all but the first pass


def test_every_objective_is_among_the_cases() -> None:
    kinds = {run_of(recipe, *keys).stages[name].objective.kind for recipe, name, keys in CASES.values()}
    assert kinds == set(batches.OBJECTIVES)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_is_called_within_the_graph(backend: str, tape: Tape) -> None:
    torch._dynamo.reset()
    ours, plain = (Training("meanflow, anchor") for _ in range(2))
    for one in (ours, plain):
        one.engine.forward = compile.compile_network(one.engine.net, backend)
    ours.take(ours.graph())
    plain.take(plain.eager)
    assert ours.lines == [f"    post {PROVEN}"] and differing(ours, plain) == [] and tape.replays == 2 + 1 + STEPS - 1
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ what a graph gets wrong


Loss = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


def on(change: Callable[[Training, Tensor, Any], Tensor]) -> Callable[[Training], Loss]:
    """The stage's loss, changed."""

    def make(t: Training) -> Loss:
        def loss(drawn: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, scalars = t.loss(drawn)
            return change(t, value, drawn), scalars

        return loss

    return make


def beside(t: Training, value: Tensor, drawn: Any) -> Tensor:
    """Reads the rows where the provider keeps them, not as they were drawn: nobody copies them to the graph."""
    return value * (1 + t.source._rows[0].square().mean())


HOST, AFAR = f"{REFUSED}: ", "its loss is [0-9.e+-]+ from the eager one's"
FAULTS = {
    "a number read": (on(lambda t, v, d: v * (1.0 if v.item() > 0 else 2.0)), HOST + "the host waits for what aten._local_sca"),
    "a branch on data": (on(lambda t, v, d: v if v > 0 else 2 * v), HOST + "the host waits for what aten._local_scalar_dense"),
    "a copy to the host": (on(lambda t, v, d: v * v.detach().cpu()), HOST + "cpu reads a tensor on the host"),
    "a move to the host": (on(lambda t, v, d: v * v.detach().to("cpu")), HOST + "to reads a tensor on the host"),
    "a boolean index": (on(lambda t, v, d: v + d.own.t[d.own.t > 1].sum()), HOST + "the host waits for what aten.index.Tensor"),
    "what is true": (on(lambda t, v, d: v + len(d.own.t.nonzero())), HOST + "the host waits for what aten.nonzero"),
    "a tensor of numbers": (on(lambda t, v, d: v * torch.tensor(2.0, device=v.device)), HOST + "a tensor of the host.s numbers"),
    "a tensor of the host": (on(lambda t, v, d: v + torch.zeros(3).sum()), HOST + "torch.zeros makes a tensor on the host"),
    "a number to choose": (on(lambda t, v, d: torch.where(v > 0, v, 0.0)), HOST + "torch.where copies a number of the host"),
    "the step's number": (on(lambda t, v, d: v * (1 + 0.01 * t.engine.step_count)), AFAR),
    "a host's count": (on(lambda t, v, d: v * (1 + next(t.count))), AFAR),
    "rows beside the draw": (on(beside), AFAR),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_would_get_wrong_is_said_and_not_used(fault: str, tape: Tape) -> None:
    """The steps are eager ones to the bit, the first too, and a stage that asked for a graph does not go on."""
    make, why = FAULTS[fault]
    ours, plain = Training("denoise"), Training("denoise")
    ours.take(ours.graph(make(ours)))
    plain.take(lambda drawn: graph.eager(plain.engine, make(plain), drawn))
    if fault != "a host's count":  # which an eager pass that is made again does not repeat
        assert differing(ours, plain) == []
    assert re.fullmatch(f"    post no CUDA graph of the step: {why}.*", ours.lines[-1])
    assert ours.lines[:-1] == ([f"    post {PROVEN}"] if fault in ("the step's number", "rows beside the draw") else [])
    asking = Training("denoise", None, "pre.cuda_graph=true")
    with pytest.raises(ConfigError, match=f"post.cuda_graph: the step cannot be a CUDA graph: {why}"):
        asking.take(asking.graph(make(asking)))


def test_an_input_that_is_not_copied_in_is_found(tape: Tape, monkeypatch) -> None:
    tensors = graph._tensors
    for i in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(graph, "_tensors", lambda drawn, i=i: [x for j, x in enumerate(tensors(drawn)) if j != i])
            ours, plain = Training("denoise"), Training("denoise")
            ours.take(ours.graph())
        plain.take(plain.eager)
        assert (
            len(ours.lines) == 1 and "no CUDA graph of the step: its " in ours.lines[0] and differing(ours, plain) == []
        )


def test_without_the_proof_a_wrong_graph_is_another_training(tape: Tape, monkeypatch) -> None:
    """So the comparison of the cases above can fail."""
    monkeypatch.setattr(graph._Proof, "_beyond", lambda *_: None)
    make = FAULTS["the step's number"][0]
    ours, plain = Training("denoise"), Training("denoise")
    ours.take(ours.graph(make(ours)))
    plain.take(lambda drawn: graph.eager(plain.engine, make(plain), drawn))
    assert {"p", "m", "v", "ema 0", "ema 1", "loss"} <= set(differing(ours, plain))


@pytest.mark.parametrize("wrong, agrees", [(0.0, True), (1e-3, False)])
def test_where_eager_passes_differ_a_replay_may_as_much(wrong: float, agrees: bool, tape: Tape) -> None:
    """Noise of 1e-6 in the loss, as of sums in another order; and a graph that is wrong by more."""

    def noisy(t: Training, value: Tensor, drawn: Any) -> Tensor:
        calls = next(t.count)  # two batches of four passes, then the recording
        return value * (1 + 1e-6 * torch.randn((), device=value.device) + (wrong if calls == 9 else 0.0))

    ours = Training("denoise")
    ours.take(ours.graph(on(noisy)(ours)), 2)
    assert (
        ours.lines == [f"    post {PROVEN}"]
        if agrees
        else "from the eager one's (eager ones from each" in ours.lines[0]
    )


def test_numbers_among_what_is_drawn_are_refused(tape: Tape) -> None:
    t = Training("denoise")
    with pytest.raises(AssertionError, match="0.5 in a drawn batch would be a constant"):
        t.graph()(t.source.draw(0)._replace(seeds=0.5))


# ------------------------------------------------------------------------------------------ shapes, memory, profiles


def test_batches_of_other_shapes_have_graphs_of_their_own_up_to_a_limit(tape: Tape) -> None:
    ours, plain = Training("denoise"), Training("denoise")
    step = ours.graph()
    cut = lambda t, n: t.source.draw(0)._replace(own=type(t.source.draw(0).own)(*(x[:n] for x in t.source.draw(0).own)))
    for n in (8, 16, 8, 16, 8, 16, 9, 9, 10, 10):
        step(cut(ours, n)), plain.eager(cut(plain, n))
        assert torch.equal(ours.engine.g, plain.engine.g)
    assert len(step.shapes) == graph.MOST == tape.captures and ours.lines == 4 * [f"    post {PROVEN}"]
    step(cut(ours, 11))
    assert (
        ours.lines[-1] == "    post no CUDA graph of the step: its batches have more than 4 shapes" and not step.shapes
    )


def test_a_part_of_the_schedule_with_other_rows_in_fp32_takes_the_place_of_the_one_before(tape: Tape) -> None:
    """Five counts of rows in fp32 are more than there may be shapes, and each graph would hold its activations."""
    ours, plain = Training("ect", None, "post.precision=bf16"), Training("ect", None, "post.precision=bf16")
    step = ours.graph()
    for wide in map(str, (0, 2, 4, 6, 8)):
        for i in range(3):
            step(ours.source.draw(i)._replace(wide=wide)), plain.eager(plain.source.draw(i)._replace(wide=wide))
            assert torch.equal(ours.engine.g, plain.engine.g)
        assert [list(s.key.others[-2:]) for s in step.shapes] == [[wide, None]] and step.shapes[0].replay
    assert tape.captures == 5 and ours.lines == 5 * [f"    post {PROVEN}"]


def test_memory_is_given_back_and_the_next_pass_records_anew(tape: Tape) -> None:
    ours, plain = Training("ect, anchor"), Training("ect, anchor")
    step = ours.graph()

    def released(drawn: Any) -> dict[str, Tensor]:
        step.release()
        assert all(s.replay is None and not s.outputs for s in step.shapes)
        return step(drawn)

    ours.take(released)
    plain.take(plain.eager)
    assert differing(ours, plain) == [] and tape.captures == STEPS - 1 and ours.lines == [f"    post {PROVEN}"]


def test_a_capture_computes_nothing_and_a_replay_reads_what_is_there() -> None:
    """Of the tape itself."""
    x, w, out = torch.ones(3), torch.ones(3), {}
    replay = Tape().capture(lambda: out.update(y=w.add_(x).square()))
    assert torch.equal(w, torch.ones(3)) and out["y"].isnan().all()
    for i in (1, 2, 3):
        x.fill_(i)
        replay()
    assert torch.equal(w, torch.full((3,), 7.0)) and torch.equal(out["y"], torch.full((3,), 49.0))


# ------------------------------------------------------------------------------------------ on a GPU

# a version of torch may let these be: a number of the host's own tensor as a constant, a copy of one that it keeps; and what
# no eager pass repeats
TAPE_ALONE = ("a tensor of the host", "a tensor of numbers", "a host's count")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_replayed_steps_are_eager_steps(case: str, precision: str, features: Path) -> None:
    """To the bit where eager steps are; the proof holds the replay to what eager passes differ by in any case."""
    stage = CASES[case][1]
    keys = (f"{stage}.precision={precision}", f"{stage}.cuda_graph=true")
    ours, plain, again = (Training(case, features, *keys, device="cuda") for _ in range(3))
    step = ours.graph()
    ours.take(step)
    for one in (plain, again):
        one.take(one.eager)
    assert ours.lines == [f"    post {PROVEN}"] and step.shapes[0].replay is not None and step.shapes[0].proofs == 2
    assert set(differing(ours, plain)) <= set(differing(again, plain))


@pytest.mark.gpu
@pytest.mark.parametrize("fault", [f for f in FAULTS if f not in TAPE_ALONE])
def test_on_a_gpu_what_a_graph_would_get_wrong_is_said(fault: str) -> None:
    """The tape refuses what the card does: and after a capture that failed, eager steps go on."""
    ours = Training("denoise", device="cuda")
    ours.take(ours.graph(FAULTS[fault][0](ours)))
    assert "no CUDA graph of the step" in ours.lines[-1]
    assert all(torch.isfinite(x).all() for x in ours.numbers().values())


def test_a_loss_that_has_diverged_is_no_fault_of_the_graph(tape: Tape) -> None:
    t = Training("flow")
    t.take(t.graph(lambda drawn: (t.loss(drawn)[0] * float("nan"), {})))
    assert t.lines == [f"    post {PROVEN}"] and t.sums.sums["loss"].isnan() and tape.replays


def test_a_draw_that_finds_no_memory_is_made_again_without_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def draw(step: int, part: int) -> str:
        asked.append("draw")
        if asked.count("draw") == 1:
            raise torch.OutOfMemoryError("no memory")
        return f"{step}.{part}"

    steps = SimpleNamespace(
        source=SimpleNamespace(draw=draw), gradient=SimpleNamespace(release=lambda: asked.append("release"))
    )
    assert taking.Steps._drawn(steps, 3, 1) == "3.1" and asked == ["draw", "release", "draw"]
    monkeypatch.setattr(loop.distributed, "size", lambda: 2)
    asked.clear()
    with pytest.raises(torch.OutOfMemoryError):
        taking.Steps._drawn(steps, 3, 1)
    assert asked == ["draw"]
