"""A kernel of attention that is wrong at its first use is found and not used: in Triton's interpreter, faults planted.

As test_attention_interpreted: one process of its own with TRITON_INTERPRET, a line for each check, a test for each line.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cmt_kernels import Dual, remembered
from cmt_kernels.attention import agreement, examine, proof, triton_launches
from cmt_kernels.attention.cases import Case, inputs
from cmt_kernels.attention.reference import attention as reference

from tests.fixtures import forked
from tests.kernels import interpreter

ROOT = Path(__file__).parents[2]
CASE = Case(3, 5, 1, 16, 2)
NEXT = "tiles 1 used"
PLAIN = "plain torch computes it"


@contextmanager
def card(home: str | None = None, **planted: Callable) -> Iterator[SimpleNamespace]:
    """A process that has proven nothing, on a device where proofs are needed. planted: attributes of the launches.

    Gives .lines, the warnings, and .examined, what was examined.
    """
    seen = SimpleNamespace(lines=[], examined=[])
    examined = lambda sample, run: seen.examined.append(sample.kind) or examine.examine(sample, run)
    with ExitStack() as stack:
        home = home or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, XDG_CACHE_HOME=home))
        for name in ("_settled", "_current", "_verdicts", "_lines"):
            stack.enter_context(mock.patch.object(proof, name, {}))
        stack.enter_context(mock.patch.object(proof, "needed", lambda qkv: True))
        stack.enter_context(mock.patch.object(proof, "examine", examined))
        for name, function in planted.items():
            stack.enter_context(mock.patch.object(triton_launches, name, function))
        warn = lambda line, *_, **__: seen.lines.append(line) if str(line).startswith("attention") else None
        stack.enter_context(mock.patch.object(warnings, "warn", warn))
        proof._machine.cache_clear()
        stack.callback(proof._machine.cache_clear)
        yield seen


def wrong_forward(candidates: tuple[int, ...], dual_only: bool = False, factor: float = 1.07) -> Callable:
    """`triton_launches.forward` whose output is 7 % off at these candidates: the least that was seen on a card."""
    true, listed = triton_launches.forward, triton_launches.candidates("forward", CASE.d, torch.float32, CASE.T)

    def planted(qkv, qkv_dot, chosen):
        o, o_dot, norms = true(qkv, qkv_dot, chosen)
        if listed.index(chosen) in candidates and not (dual_only and qkv_dot is None):
            o, o_dot = (o, factor * o_dot) if dual_only else (factor * o, o_dot)
        return o, o_dot, norms

    return planted


def everything(function: Callable, dual: bool = True) -> list[torch.Tensor]:
    """Value, gradient, tangent."""
    x, x_dot = inputs(CASE)["qkv"]
    x.requires_grad_()
    y = function(Dual(x, x_dot) if dual else x)
    y, tangents = (y.value, [y.tangent]) if dual else (y, [])
    return [y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0], *tangents]


def right(dual: bool = True) -> bool:
    """The op in use gives what plain torch gives."""
    from cmt_kernels.attention.triton import attention

    pairs = zip(everything(attention, dual), everything(reference, dual), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def check_right_kernels_are_used() -> None:
    with card() as seen:
        assert right() and right() and seen.lines == [] and seen.examined == ["forward", "backward"]
        assert sorted(v.split(": ")[1].split(",")[0] for v in proof.table().values()) == ["tiles 0 used"] * 2
        assert right(dual=False) and seen.examined == ["forward", "backward", "forward"]  # plain is a launch of its own
        assert proof.spent().keys() == proof.table().keys() and all(ms > 0 for ms in proof.spent().values())


def check_a_wrong_tile_is_not_used() -> None:
    with card(forward=wrong_forward((0,))) as seen:
        assert right()
        assert len(seen.lines) == 1 and "tiles 0: value errs by 7.0e-02" in seen.lines[0] and NEXT in seen.lines[0]
        assert list(proof.table().values())[0] == seen.lines[0]


def check_without_proof_the_fault_is_seen() -> None:
    """What the other checks call right is not blind to the fault they plant."""
    with card(forward=wrong_forward((0,))), mock.patch.object(proof, "needed", lambda qkv: False):
        assert not right()


def check_a_wrong_gradient() -> None:
    true = triton_launches.backward
    listed = triton_launches.candidates("backward", CASE.d, torch.float32, CASE.T)
    planted = lambda qkv, o, norms, do, chosen: true(qkv, o, norms, do, chosen) * (1.07 if chosen == listed[0] else 1)
    with card(backward=planted) as seen:
        assert right() and len(seen.lines) == 1 and "backward" in seen.lines[0] and "gradient errs" in seen.lines[0]


def check_a_wrong_tangent_moves_the_plain_call_too() -> None:
    from cmt_kernels.attention.triton import attention

    with card(forward=wrong_forward((0,), dual_only=True)) as seen:
        assert right(dual=False) and seen.lines == []
        assert right() and "tangent errs" in seen.lines[0] and NEXT in seen.lines[0]
        dual, plain = everything(attention), everything(attention, dual=False)
        assert torch.equal(dual[0], plain[0])
        used = [(launch[0], i) for (_, launch), (i, _) in proof._settled.items()]
        assert sorted(used) == [("backward", 0), ("forward", 1), ("forward", 1)]


def check_all_wrong_falls_back() -> None:
    for planted in (wrong_forward((0, 1)), wrong_forward((0, 1), factor=float("nan"))):
        with card(forward=planted) as seen:
            assert right() and right() and len(seen.lines) == 1 and seen.lines[0].endswith(PLAIN)
    with card(forward=wrong_forward((0, 1)), backward=lambda *x, **_: torch.zeros_like(x[0])) as seen:
        assert right() and [line.endswith(PLAIN) for line in seen.lines] == [True, True]


def check_tiles_that_raise() -> None:
    true, listed = triton_launches.forward, triton_launches.candidates("forward", CASE.d, torch.float32, CASE.T)

    def planted(qkv, qkv_dot, chosen):
        if chosen == listed[0]:
            raise RuntimeError("out of resource: shared memory")
        return true(qkv, qkv_dot, chosen)

    with card(forward=planted) as seen:
        assert right() and "RuntimeError: out of resource" in seen.lines[0] and NEXT in seen.lines[0]


def check_two_runs_that_differ() -> None:
    true, count = triton_launches.forward, iter(range(1, 1000))
    planted = lambda *x, **y: (lambda o: (o[0] + 1e-8 * next(count), *o[1:]))(true(*x, **y))
    with card(forward=planted) as seen:
        assert right() and "two runs differ" in seen.lines[0] and seen.lines[0].endswith(PLAIN)


def check_remembered() -> None:
    with tempfile.TemporaryDirectory() as home:
        with card(home, forward=wrong_forward((0,))) as seen:
            assert right() and seen.examined == ["forward", "forward", "backward"]
        with card(home, forward=wrong_forward((0,))) as seen:  # the next process
            assert right() and seen.examined == [] and NEXT in seen.lines[0]
        with card(home, versions=lambda device: "triton 3.6, ptxas 13.3") as seen:
            assert right() and seen.examined == ["forward", "backward"] and seen.lines == []
        assert triton_launches.versions(torch.device("cpu")).startswith("triton 3")
        file = remembered.path("attention_proofs.json")
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=home):
            file = remembered.path("attention_proofs.json")
        assert len(json.loads(file.read_text())) == 2
        unknown = {
            machine: {label: {"x": 1} for label in found} for machine, found in json.loads(file.read_text()).items()
        }
        for broken in ("{", "[]", '{"a": 1}', json.dumps(unknown)):
            file.write_text(broken)
            with card(home) as seen:
                assert right() and seen.examined == ["forward", "backward"]


def check_captured_graph() -> None:
    with card() as seen:
        with mock.patch.object(proof, "capturing", lambda qkv: True):
            assert right() and seen.examined == [] and len(seen.lines) == 2 and "before this graph" in seen.lines[0]
        assert right() and seen.examined == ["forward", "backward"]
        with mock.patch.object(proof, "capturing", lambda qkv: True):
            assert right() and len(seen.lines) == 2  # proven before, so its kernels are in the graph
            assert all("tiles 0 used" in line for line in proof.table().values())


def check_layouts() -> None:
    """Proofs are of the layout of the call: its strides and its alignment."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 3, 2, 12, dtype=torch.float64).to(torch.float16)
    for y in (
        x,
        x.transpose(1, 3),
        x[:, :, :, :1],
        x[..., ::2],
        x.flatten()[1:].new_zeros(x.numel() + 3)[3:].view(x.shape),
        x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
        x[:1].expand(4, -1, -1, -1, -1),
        x[:1],
    ):
        like = examine.alike(y, 2, generator)
        assert examine.layout(like) == examine.layout(y) and like.shape == (2, *y.shape[1:]) and like.std() > 0.5
    with card() as seen:
        from cmt_kernels.attention.triton import attention

        qkv = inputs(CASE)["qkv"].value
        attention(qkv), attention(torch.stack((qkv, qkv), dim=-1)[..., 0]), attention(qkv[:1]), attention(qkv[:0])
        assert seen.examined == ["forward", "forward"]


def check_compiled() -> None:
    """Proof at run time, not while a graph is traced."""
    import cmt_kernels

    with card(forward=wrong_forward((0,))) as seen, cmt_kernels.use("attention:triton"):
        compiled = torch.compile(cmt_kernels.attention, fullgraph=True, backend="aot_eager")
        got, exact = everything(compiled), everything(reference)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, exact)) and NEXT in seen.lines[0]


def check_libraries() -> None:
    """`primal` times our kernel only where it is right, and its plain calls ask no other rank."""
    from cmt_kernels.attention import primal

    key = (CASE.T, CASE.H, CASE.d, torch.float32, torch.device("cpu"))
    libraries = {"triton": primal.LIBRARIES["triton"], "torch": reference}
    for planted, names in ((wrong_forward((0,)), ["torch", "triton"]), (wrong_forward((0, 1)), ["torch"])):
        with (
            card(forward=planted),
            mock.patch.multiple(primal, LIBRARIES=libraries, TOKENS=16, ROUNDS=1),
            proof.alone(),
        ):
            with mock.patch.object(agreement, "agree", side_effect=AssertionError("asks other ranks")):
                found, report = primal.measure(*key, milliseconds=lambda call: call() is None)
            assert sorted(found) == names and (len(names) == 2 or report["triton"].endswith(PLAIN)), report


def check_cost() -> str:
    found = proof.prove(CASE.T, CASE.H, CASE.d, torch.float32, dual=True, device="cpu")
    assert all(v.right and v.ms > 0 for verdicts in found.values() for v in verdicts) and len(found["forward"]) == 2
    return "ms of a proof here: " + ", ".join(f"{kind} {v[0].ms:.0f}" for kind, v in found.items())


def checks() -> dict[str, Callable]:
    return {name: f for name, f in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [*forked.python("interpreter"), "-m", "tests.kernels.test_attention_proof"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", checks())
def test_proof(name: str, results: dict[str, str]) -> None:
    assert results[name].startswith("ok"), results[name].replace("\\n", "\n")


def honest(x: torch.Tensor, do: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient with the roundings of a bf16 kernel: p, ds and the outputs."""
    rounded = lambda y: y.to(x.dtype).float()
    q, k, v = x.float().permute(2, 0, 3, 1, 4)
    g, c = do.float().unflatten(2, x.shape[3:]).transpose(1, 2), x.shape[-1] ** -0.5
    s = c * q @ k.mT
    p = (s - s.amax(-1, keepdim=True)).exp()
    o, p = rounded(rounded(p) @ v / p.sum(-1, keepdim=True)), p / p.sum(-1, keepdim=True)
    ds = rounded(p * (g @ v.mT - (g * o).sum(-1, keepdim=True)))
    dqkv = torch.stack((c * ds @ k, c * ds.mT @ q, rounded(p).mT @ g)).permute(1, 3, 0, 2, 4)
    return o.transpose(1, 2).flatten(2).to(x.dtype), dqkv.to(x.dtype)


@pytest.mark.parametrize("t", [1, 2, 16, 77, 256])
@pytest.mark.parametrize("d", [16, 72, 128])
def test_rounding_is_allowed_and_a_fault_is_not(t: int, d: int) -> None:
    """The faults seen on a card were 7 to 50 %; half of the least is caught."""
    qkv, do = torch.zeros(2, t, 3, 2, d, dtype=torch.bfloat16), torch.zeros(2, t, 2 * d, dtype=torch.bfloat16)
    forward, backward = examine.draw("forward", qkv, None), examine.draw("backward", qkv, do)
    for factor, verdict in ((1.0, True), (1.035, False)):
        value = examine.examine(forward, lambda x, _, off=factor: (off * honest(x, do)[0],))
        gradient = examine.examine(backward, lambda x, o, norms, g, off=factor: off * honest(x, g)[1])
        assert (value.right, gradient.right) == (verdict, verdict), f"{value}; {gradient}"


def test_of_many_tokens_a_few_heads_are_compared_and_a_fault_in_one_of_them_is_seen() -> None:
    qkv, do = torch.zeros(2, 1000, 3, 6, 16, dtype=torch.bfloat16), torch.zeros(2, 1000, 6 * 16, dtype=torch.bfloat16)
    sample = examine.draw("backward", qkv, do)
    assert len(sample.heads) < 6 and {0, 5} <= set(sample.heads)
    assert sample.inputs[2][:, 1].any() == (1 in sample.heads)  # norms of a head that nobody compares are zeros
    for head, right in ((sample.heads[1], False), (next(i for i in range(6) if i not in sample.heads), True)):

        def run(
            x: torch.Tensor, o: torch.Tensor, norms: torch.Tensor, g: torch.Tensor, head: int = head
        ) -> torch.Tensor:
            dqkv = honest(x, g)[1]
            dqkv[:, :, :, head] *= 1.07
            return dqkv

        assert examine.examine(sample, run).right == right


def rank(number: int, folder: str, answers: list[int], results: multiprocessing.Queue) -> None:
    """One of two ranks, which accepts the candidates from answers[number] on."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=number, world_size=2)
    first = answers[number]
    results.put((number, agreement.agree("a", first, lambda i: max(i, first)), agreement.agree("b", 0, lambda i: i)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("answers", [(0, 0), (0, 2), (1, 0)])
def test_ranks_agree(tmp_path: Path, answers: tuple[int, int]) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank, args=(i, str(tmp_path), answers, results)) for i in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert found == [(0, max(answers), 0), (1, max(answers), 0)]


def test_a_rank_alone_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "WAIT_S", 0.05)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    with pytest.warns(UserWarning, match="rank 0 goes on alone"):
        assert agreement.agree("question", 1, lambda i: i) == 1


def main() -> None:
    torch.set_num_threads(1)
    interpreter.lighten()
    warnings.simplefilter("ignore")
    for name, check in checks().items():
        try:
            print(name, f"ok {check() or ''}", sep="\t", flush=True)
        except Exception:
            print(name, traceback.format_exc().replace("\n", "\\n"), sep="\t", flush=True)


if __name__ == "__main__":
    main()
