"""A stage under torch.compile: one block for all, tangents alive, the guard; and blocks that forget their activations."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path

import pytest
import torch
from cmt_kernels import Dual, available, use
from cmt_kernels import graph as graph_passes
from cmt_kernels.gelu import reference as gelu_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

from bench.training.networks import average_velocity, batch_of, meanflow_loss, saved_bytes
from cmt_fast import cli
from cmt_fast.config.schema import Flow, Stage
from cmt_fast.engine import LocalEngine, compile
from cmt_fast.models.dit import Block, DiT
from cmt_fast.models.mlp import Mlp
from cmt_fast.models.precond import AverageVelocity
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import loop
from tests.fixtures.tiny import NO_EVAL, SMALL, source_of, tiny

CPU = torch.device("cpu")
TOKENS, ROWS = 16, 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def engine(backend: str = "aot_eager", precision: str = "fp32", blocks: int = 2, **more) -> LocalEngine:
    """A tiny DiT whose network is compiled by `backend`, and the eager one for ""."""
    e = LocalEngine(
        average_velocity(32, blocks, TOKENS, heads=2, **more), Stage(Flow(), 1000, precision=precision, lr=1e-2), CPU
    )
    e.forward = compile.compile_network(e.net, backend) if backend else e.net
    return e


def step(e: LocalEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a MeanFlow step, and the step."""
    loss = meanflow_loss(e, batch_of(ROWS, TOKENS, "cpu"))
    e.backward(loss)
    gradient = e.g.clone()
    e.step(1e-3)
    return loss.detach(), gradient


def dual_arguments(k: int) -> tuple:
    batch = batch_of(ROWS, TOKENS, "cpu")
    t = torch.linspace(0.1, 0.9, ROWS)
    return (
        Dual(batch.x_0, batch.x_0[:k].cos()),
        Dual(t, torch.ones(k)),
        Dual(t / 2, torch.zeros(k)),
        batch.labels,
        batch.drop,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_meanflow_step_is_one_graph_and_passes_the_guard(precision):
    counter = CompileCounterWithBackend("aot_eager")
    e = engine(counter, precision)
    for _ in range(3):
        step(e)
    assert counter.frame_count == 1  # one graph, and not a second one for later blocks and steps
    compile.guard(e, lambda: meanflow_loss(e, batch_of(ROWS, TOKENS, "cpu")))


def kinds(e: LocalEngine) -> None:
    """Four kinds of call: values with tangents and without, with gradients and without, each twice."""
    plain = [x.value if isinstance(x, Dual) else x for x in dual_arguments(2)]
    for _ in range(2):
        for arguments in (dual_arguments(2), plain):
            y = e(*arguments)
            e.backward((y.value if isinstance(y, Dual) else y).square().sum())
            with torch.no_grad():
                e(*arguments)


@pytest.mark.parametrize("precision, recompute", [("fp32", False), ("bf16", True)])
def test_one_block_is_compiled_whatever_the_depth(precision, recompute):
    """As many graphs of dynamo, and as many and as long ones of values, forward and backward, at two blocks as at four."""
    from torch._dynamo.backends.common import aot_autograd

    found = []
    for depth in (2, 4):
        lengths: dict[str, list[int]] = {"frame": [], "inference": [], "fw": [], "bw": []}

        def keep(kind, graph, inputs, lengths=lengths):
            lengths[kind].append(len(graph.graph.nodes))
            return graph

        compilers = {f"{kind}_compiler": functools.partial(keep, kind) for kind in ("fw", "bw", "inference")}

        inner = aot_autograd(**compilers)

        def backend(graph, inputs, inner=inner, keep=keep):
            return inner(keep("frame", graph, inputs), inputs)

        kinds(engine(backend, precision, depth, checkpoint_activations=recompute))
        found.append(lengths)
    assert found[0] == found[1]
    assert {kind: len(of) for kind, of in found[0].items()} == {"frame": 4, "inference": 2, "fw": 2, "bw": 2}


def test_the_network_itself_stays_eager():
    counter = CompileCounterWithBackend("aot_eager")
    e = engine(counter)
    e(*dual_arguments(2))
    calls = []
    forward, (dit,) = e.forward, [m for m in e.net.modules() if isinstance(m, DiT)]
    dit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    e.eager(*dual_arguments(3))
    assert calls == [False] and counter.frame_count == 1 and "_block" not in vars(dit)
    with pytest.raises(TypeError):
        forward()
    assert "_block" not in vars(dit)


def test_a_kind_beyond_the_limit_raises_and_networks_do_not_share_it():
    """Torch's limit hangs on code, which all blocks of a process share; and at the limit nothing runs eagerly instead."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for k in (2, 3):
            e = engine(blocks=1)
            e(*dual_arguments(k))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            e(*dual_arguments(4))
        with compile.more_kinds(1):
            e(*dual_arguments(4))


def test_a_network_without_blocks_alike_is_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    net = AverageVelocity(Mlp(6, 0, width=16, depth=2, two_times=True))
    x, t = torch.randn(4, 6), torch.rand(4)
    got = compile.compile_network(net, counter)(x, t, t)
    torch.testing.assert_close(got, net(x, t, t))
    placeholders = [n for n in counter.graphs[0].graph.nodes if n.op == "placeholder"]
    assert counter.frame_count == 1 and len(placeholders) >= len(list(net.parameters()))


def test_no_graph_breaks():
    explained = torch._dynamo.explain(engine("").net)(*dual_arguments(2))
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_the_compiled_step_is_the_eager_step(recompute):
    ours, eager = engine(blocks=1, checkpoint_activations=recompute), engine("", blocks=1)
    for _ in range(2):
        (loss, gradient), (want, want_gradient) = step(ours), step(eager)
        assert torch.allclose(loss, want, rtol=1e-5)
        assert compile.distance(gradient, want_gradient) < 1e-5
    assert compile.distance(ours.p, eager.p) < 1e-5


def test_inductor_keeps_value_and_tangent():
    e = engine("inductor", blocks=1)
    compile.guard(e, lambda: e.backward(meanflow_loss(e, batch_of(ROWS, TOKENS, "cpu"))))
    y = e(*dual_arguments(2))
    assert y.tangent.count_nonzero() > 0 and not y.tangent.requires_grad and y.value.requires_grad


def planted(monkeypatch, wrong) -> None:
    """Make gelu wrong where it is compiled, and only there: what a compiler that drops a tangent rule does."""
    honest = gelu_reference.gelu

    def gelu(x, bias=None):
        y = honest(x, bias)
        return wrong(y) if torch.compiler.is_compiling() and isinstance(y, Dual) else y

    monkeypatch.setattr(gelu_reference, "gelu", gelu)
    monkeypatch.setattr(importlib.import_module("cmt_kernels._op"), "_forced", "gelu:reference")
    monkeypatch.setattr(importlib.import_module("cmt_kernels._op"), "_resolved", _unresolved())


def _unresolved() -> dict:
    dispatch = importlib.import_module("cmt_kernels._op")
    return {device: {op: [] for op in dispatch.OPS} for device in dispatch.DEVICES}


@pytest.mark.parametrize(
    "wrong, what",
    [
        (lambda y: Dual(y.value, 0 * y.tangent), "tangent"),
        (lambda y: Dual(y.value, y.tangent * 1.001), "tangent"),
        (lambda y: Dual(y.value * 1.001, y.tangent), "value"),
    ],
    ids=["no tangent", "wrong tangent", "wrong value"],
)
def test_the_guard_catches_what_is_wrong_only_when_compiled(monkeypatch, wrong, what):
    planted(monkeypatch, wrong)
    e = engine(blocks=1)
    before = e.p.clone()
    with pytest.raises(compile.CompileError, match=f"post.compile: the compiled network's {what} errs by"):
        compile.guard(e, lambda: meanflow_loss(e, batch_of(ROWS, TOKENS, "cpu")), "post.compile")
    assert torch.equal(e.p, before) and not e.g.count_nonzero()


def test_what_is_said_by_name_and_what_stands_beside_are_guarded_too():
    """Labels of an augmentation come by name; a log variance or a second head is an output of its own."""

    class Net(torch.nn.Module):
        def forward(self, x, *, augment=None):
            wrong = 1.001 if torch.compiler.is_compiling() else 1.0
            y = x if augment is None else x * augment
            return Dual(y, y[:1].detach()), y * (wrong if self.beside else 1.0) * self.weight

    e, x, given = engine(blocks=1), torch.ones(3, 2), []
    e.net = net = Net()
    net.weight, net.beside = torch.nn.Parameter(torch.ones(2)), False
    e.copy, e.forward = lambda: copy.deepcopy(net), torch.compile(net, backend="eager")
    loss = lambda: given.append(e(x, augment=2 * x)[0].value)
    compile.guard(e, loss)
    assert torch.equal(given[0], 2 * x)
    net.beside = True
    with pytest.raises(compile.CompileError, match="the compiled network's output 2 errs by"):
        compile.guard(e, loss)


def test_the_guard_sees_the_forms_that_a_schedule_comes_to():
    """AlphaFlow begins without tangents and ends with them: a compiler that drops them is found before the first step."""
    alone = ["post.anchor=null", "post.trajectories=null", "post.teacher=null", "post.batch=32"]
    work = Workspace(tiny("digits-mf", *alone, "post.objective={kind: alphaflow}"), Path("nowhere"))
    source, e = source_of(work, "post"), LocalEngine(work.build(), work.run.post, CPU)
    duals = lambda loss: sorted(any(isinstance(x, Dual) for x in given) for _, given, _ in compile._calls(e, loss))
    assert duals(lambda: source.loss(e, 0)) == [False]
    assert duals(lambda: source.every_form(e, 0)) == [False, False, True]
    source.close()


def test_the_guard_names_a_compiler_that_fails(monkeypatch):
    e = engine()

    def broken(graph, inputs):
        raise OSError("no C++ compiler")

    e.forward = compile.compile_network(e.net, broken)
    with pytest.raises(compile.CompileError, match="torch.compile failed: .*no C\\+\\+ compiler"):
        compile.guard(e, lambda: meanflow_loss(e, batch_of(ROWS, TOKENS, "cpu")))


def test_a_run_compiles_the_stages_that_say_so(tmp_path, monkeypatch, capsys):
    built = []

    def compile_network(net):
        built.append(net)
        return torch.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr("cmt_fast.engine.local.compile_network", compile_network)
    work = Workspace(tiny("digits-mf", "pre.compile=true", "pre.images_nimg=96"), tmp_path)
    loop.train(work, ["pre"])
    assert len(built) == 1
    arguments = [
        "train",
        "digits-mf",
        *SMALL,
        *NO_EVAL,
        "--out",
        str(tmp_path / "new"),
        "--dry-run",
        "pre.compile=true",
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "compile: true" in shown and shown.count("(compiled)") == 1
    monkeypatch.setattr(compile, "guard", _refuse)
    assert cli.main(["train", "digits-mf", *SMALL, "pre.compile=true", "--stages=pre", f"--out={tmp_path / 'b'}"]) == 1
    assert capsys.readouterr().err == "cmt: pre.compile: no\n"


def _refuse(engine, loss, name):
    raise compile.CompileError(f"{name}: no")


# ------------------------------------------------------------------------------------ activations computed again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [None, 2, ROWS])
def test_recomputed_blocks_change_no_number(k, precision):
    kept, again = engine("", precision), engine("", precision, checkpoint_activations=True)
    results = []
    for e in (kept, again):
        arguments = dual_arguments(k or 1)
        y = e(*arguments) if k else e(*(x.value if isinstance(x, Dual) else x for x in arguments))
        value, tangent = (y.value, y.tangent) if k else (y, y.detach())
        e.backward(value.square().sum())
        results.append((value.detach(), tangent, e.g.clone()))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)
    assert results[0][2].count_nonzero() > 0


def test_recomputing_runs_values_again_and_tangents_once(monkeypatch):
    counts: dict[str, list[int]] = {}
    for name, recompute in (("kept", False), ("again", True)):
        count = counts.setdefault(name, [0, 0])
        forward = Block.forward

        def counted(self, x, *rest, forward=forward, count=count):
            count[isinstance(x, Dual)] += 1
            return forward(self, x, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Block, "forward", counted)
            step(engine("", checkpoint_activations=recompute))
    assert counts == {"kept": [0, 2], "again": [2, 2]}  # [plain, dual] calls of two blocks


def test_recomputing_saves_memory_and_no_tangent():
    arguments, sizes = dual_arguments(2), {}
    plain = [x.value if isinstance(x, Dual) else x for x in arguments]
    for recompute in (False, True):
        e = engine("", checkpoint_activations=recompute)
        sizes[recompute] = saved_bytes(lambda e=e: e(*arguments), e.net)
        assert sizes[recompute] == saved_bytes(lambda e=e: e(*plain), e.net)
    assert sizes[True] < 0.5 * sizes[False]


def test_without_gradients_nothing_is_kept_to_run_again():
    net = engine("", checkpoint_activations=True).net
    with torch.no_grad():
        assert not net(*dual_arguments(2)).value.requires_grad


def test_compiled_backward_recomputes_no_tangent():
    """The softmax of attention's tangent is in the forward graph alone, where value and tangent are ops of their own."""
    graphs = {}

    def keep(kind):
        def compiler(graph, inputs):
            graphs[kind] = [str(node.target) for node in graph.graph.nodes]
            return graph

        return compiler

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=min_cut_rematerialization_partition
    )
    with use("reference"):
        step(engine(backend, blocks=1, checkpoint_activations=True))
    tangent_only = "aten._softmax.default"
    assert graphs["forward"].count(tangent_only) == 1 and graphs["backward"].count(tangent_only) == 0
    norms = [sum("layer_norm" in node for node in graphs[kind]) for kind in ("forward", "backward")]
    assert norms[1] > 0, "the values of the blocks are computed again"


@pytest.mark.skipif("native" not in available("gelu", "cpu"), reason="the native ops are not built")
def test_compiled_backward_recomputes_no_tangent_of_a_fused_op(monkeypatch):
    """Inductor's graphs after our pass: calls of native ops with a tangent in the forward graph alone; same numbers."""
    seen: list[tuple[int, int]] = []

    def watched(graph, drop=graph_passes.drop_dead_tangents):
        dropped = drop(graph)
        ours = [n for n in graph.nodes if getattr(n.target, "namespace", None) == "cmt" and "backward" not in n.name]
        seen.append((dropped, sum(graph_passes._has_tangent(n) for n in ours)))
        return dropped

    monkeypatch.setattr(graph_passes, "drop_dead_tangents", watched)
    with inductor_config.patch(force_disable_caches=True):  # a graph out of the cache went through the pass before
        again, kept = engine("inductor", checkpoint_activations=True, blocks=1), engine("", blocks=1)
        got, wanted = step(again), step(kept)
    torch.testing.assert_close(got, wanted)
    forward, backward = seen
    assert forward[1] > 0 and forward[0] == 0, "the forward pass computes every tangent"
    assert backward[0] > 0 and backward[1] == 0, "what is computed again has none"
