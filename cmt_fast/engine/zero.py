"""The zero engine: DeepSpeed's ZeRO shards what a process would hold twice; optimizer and EMA stay our op.

DeepSpeed hosts an optimizer of the client's (`zero_allow_untested_optimizer`): stages 1 to 3 hand it the flat fp32
partition of this rank with its reduced, clipped gradient, so `adamw_ema` runs once a partition and the EMA tracks are
sharded like the moments. Stage 0 hands it the module's parameters: there the op clips too, over one flat buffer.
What DeepSpeed keeps for itself in stages 1 to 3 is the gradient's norm and its clipping, two passes over the gradient
that the op would have made one, and a copy of the partition beside the weights.

bf16 is the local engine's autocast over fp32 weights, which are the masters, and gradients are summed in fp32.
DeepSpeed's own bf16 mode is not used: it casts the whole module, and the time embedding, which stays in fp32 because
its tangent grows with its highest frequency, then meets bf16 weights and fails. The price is 2 bytes a parameter in
stages 1 and 2, and weights that travel between ranks as fp32. A stage 3 that trains calls DeepSpeed's linear map, as torch's
holds every gathered weight until the backward: in bf16 it rounds before and after its bias, so there the curves agree with the
local engine's to bf16's rounding alone. DeepSpeed puts it in torch's place in the whole process for good, where it changes the
order of gradients, and so the last bits, of later stages: torch's is put back at once. A sharded teacher calls torch's, and gives
the bits of a whole one in fp32 and bf16; by DeepSpeed's it was 2.4e-3 of its largest number off in bf16 (CPU, 2026-11-28).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmt_fast.config.schema import Stage
from cmt_fast.engine import buffers, sums, wrapping
from cmt_fast.engine.buffers import Unread
from cmt_fast.engine.compile import compile_network
from cmt_fast.engine.partitions import AdamWEma
from cmt_fast.engine.sharding import ShardingPlan, buckets
from cmt_fast.engine.snapshot import Place, Snapshot
from cmt_fast.engine.wrapping import Autocast, Sharded, largest, no_scalars, release, section_of
from cmt_fast.runtime import distributed
from cmt_fast.storage.checkpoint import Tensors


class ZeroEngine:
    """One module trained by AdamW under a ZeRO stage. Every method is a collective call: all ranks make it."""

    def __init__(
        self,
        net: nn.Module,
        stage: Stage,
        device: torch.device,
        grad_accum_steps: int,
        choice: ShardingPlan,
        numbers: Iterable[tuple[str, Tensor]] = (),
    ) -> None:
        """net: with its weights, or without memory (models/deferred.py); numbers: what such a one begins with, by name."""
        assert choice.stage is not None
        self.level, self.choice = choice.stage, choice
        bare, self.buckets = buffers.without_memory(net), choice.buckets or buckets(buffers.count(net), largest(net))
        self.net, self.stage, self.device = buffers.to(net, device), stage, device
        self.grad_accum_steps = grad_accum_steps
        self.step_count = self.skipped = 0
        self.checking, self.checks = False, dict[str, Tensor]()
        self.shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        self.keys = ["m", "v", *(f"ema-{i}" for i in range(len(stage.ema)))]
        buffers.narrow_stream(net, stage.precision)
        self.frame = buffers.frame(net)
        self.constants = buffers.constants(net)
        no_scalars(net)
        self.borrowed = wrapping.rank_variable()
        if self.level == 0:
            self.whole = torch.zeros(buffers.count(net), device=device) if bare else buffers.flat(net)
            ends = itertools.accumulate(p.numel() for p in net.parameters())
            self.places = {k: slice(e - p.numel(), e) for (k, p), e in zip(net.named_parameters(), ends)}
            buffers.bind(net, self.whole)
        if bare:
            self._begin(numbers)
        self.parameters = dict(net.named_parameters())
        self.optimizer = AdamWEma(net.parameters(), self)
        with _deepspeed(device) as deepspeed:
            self.linear = deepspeed.runtime.zero.linear.zero3_linear_wrap if self.level == 3 else None
            self.outer = Autocast(net, device, stage.products == "bf16", self.linear)
            self.ds, *_ = deepspeed.initialize(model=self.outer, optimizer=self.optimizer, config=self._config())
        distributed.same_timeout(self.ds.data_parallel_group, self.ds.seq_data_parallel_group)
        self.partitions = self._partitions()
        for p in self.partitions:
            self.optimizer.allocate(p)
        self.forward, self.sharded = self.ds, list[Any]()
        if stage.compile:
            self.outer.calls = (compile_network(net),)

    @torch.no_grad()
    def _begin(self, numbers: Iterable[tuple[str, Tensor]]) -> None:
        """Give a network without memory what it begins with, one parameter after the other, zeros where nothing is said; at
        stage 3 each is cut into the ranks' parts before the next one is there."""
        place = _cutter(self._config(), self.device) if self.level == 3 else None
        framed, waiting = buffers.constants(self.frame), dict(self.net.named_parameters())

        def put(name: str, value: Tensor) -> None:
            if name in self.constants:
                framed[name].copy_(self.constants[name].copy_(value))
                return
            p = waiting.pop(name)
            if self.level == 0:
                p.copy_(value.view(p.shape))
                return
            p = buffers.place(self.net, name, value.view(p.shape).to(self.device, torch.float32), p.requires_grad)
            if place:
                place(p)

        for name, value in numbers:
            put(name, value)
            del value
        if self.level:
            for name, p in list(waiting.items()):
                put(name, torch.zeros(p.shape, device=self.device))

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loop cuts batches into parts; DeepSpeed only counts them
            "gradient_accumulation_steps": self.grad_accum_steps,
            "gradient_clipping": self.stage.grad_clip_norm if self.level else 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": section_of(self.level, self.buckets),
        }

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer steps: one a rank, at stage 3 one a sub-group."""
        if self.level == 0:
            return [self.whole]
        if self.level == 3:
            return list(self.ds.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The module's forward in the stage's precision."""
        return self.forward(*args, **named)

    def wide(self, *args: Any, **named: Any) -> Any:
        """The module's forward in fp32."""
        own, self.outer.bf16 = self.outer.bf16, False
        try:
            return self.forward(*args, **named)
        finally:
            self.outer.bf16 = own

    def scaling(self) -> dict[str, float]:
        """There is no scale."""
        return {}

    def eager(self, *args: Any, wide: bool = False, **named: Any) -> Any:
        """The same forward, never compiled; wide: in fp32."""
        outer = self.outer
        before = outer.calls, outer.bf16
        outer.calls, outer.bf16 = (self.net,), outer.bf16 and not wide
        try:
            return self.ds(*args, **named)
        finally:
            outer.calls, outer.bf16 = before

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one of the step's losses; their mean is what is differentiated."""
        with wrapping.linear_of(self.linear):  # blocks may run again in it
            self.ds.backward(loss)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # counts the pass; the optimizer is not called

    def step(self, lr: float) -> Tensor:
        """Average over ranks, clip, AdamW, EMAs, constraints. Returns the norm before clipping, NaN where the gradient is not
        finite on any rank: then nothing has changed on all of them."""
        self.step_count += 1
        self.optimizer.lr = lr
        self.checks = {}
        self.ds.step()
        norm = self.optimizer.norm if self.level == 0 else self.ds.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        if self.level and (
            self.ds.optimizer.overflow or not 0 <= norm < torch.inf
        ):  # DeepSpeed's -1 and inf are of no norm
            norm = torch.full_like(norm, torch.nan)
        if buffers.constrained(self.frame) and not norm.isnan():
            self._constrain()
        if self.checking:
            self.checks |= {"parameters": self.partial_sum(lambda flat: flat)}
            self.checks = {k: distributed.sum_(x) if self.level else x for k, x in self.checks.items()}
        return norm

    def skip(self, step: int) -> None:
        """Go on after `step` steps, the last of which was not finite: for the optimizer it was none."""
        self.step_count, self.skipped = step, self.skipped + 1

    def partial_sum(self, of: Callable[[Tensor], Tensor | None]) -> Tensor:
        """The checksum of this rank's parts of something that is laid out as the partitions, where there is any; at stage 0 of
        the whole."""
        total, first = torch.zeros((), dtype=torch.int64, device=self.device), 0
        for name, shape in self.shapes.items():
            part = self._slices(name)
            if part and (flat := of(part[0])) is not None:
                total += sums.partial(flat[part[1]], first + part[2].start)
            first += torch.Size(shape).numel()
        return total

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take a parent's weights: student and every EMA track start there."""
        self._take(weights, "p", *self.keys[2:])
        if buffers.constrained(self.frame):
            self._constrain(("p", *self.keys[2:]))

    def average(self, index: int = 0) -> nn.Module:
        """A frozen fp32 module of EMA track `index`, whole on every rank; at stage 0 the track itself, not a copy of it."""
        if self.level == 0:
            net = copy.deepcopy(self.frame).requires_grad_(False)
            buffers.bind(net, self._of(self.whole, f"ema-{index}"))
            return net.eval()
        return buffers.fill(self.frame, self._tensors(f"ema-{index}"), self.device)

    def copy(self) -> nn.Module:
        """A module of its own with the student's present fp32 weights, whole on every rank."""
        return buffers.fill(self.frame, self._tensors("p"), self.device)

    def frozen(self, net: nn.Module | Unread) -> Any:
        """A teacher: itself, or its parameters sharded over ranks and gathered layer by layer (ZeRO stage 3).

        One that is still to be read is read module by module, and cut before the next module is read.
        """
        if not self.choice.teacher_sharded:
            return buffers.read(net, self.device) if isinstance(net, Unread) else net
        own = net.net if isinstance(net, Unread) else net
        cut = buckets(buffers.count(own), largest(own))
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section_of(3, cut)}
        if isinstance(net, Unread):
            place = _cutter(config, self.device)
            for module in buffers.pour(net, self.device):
                no_scalars(module, recurse=False)
                for p in module.parameters(recurse=False):
                    place(p)
        else:
            no_scalars(own)
        outer = Autocast(own, self.device, False)
        with _deepspeed(self.device) as deepspeed:
            sharded, *_ = deepspeed.initialize(model=outer, config=config)
        sharded.module.eval()
        self.sharded.append(sharded)
        return Sharded(sharded, outer)

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything a restart needs, file name -> full tensors by name, gathered one by one as they are asked for."""
        shapes = {f"{k}.{name}": shape for k in "mv" for name, shape in self.shapes.items()}
        optimizer = Tensors(shapes, lambda key: self._full(key[2:], key[0]))
        return {"model": self._tensors("p"), **{k: self._tensors(k) for k in self.keys[2:]}, "optimizer": optimizer}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Restore what `state` of any engine on any number of ranks gave after `step` steps: each rank takes its part."""
        self._take(state["model"], "p")
        for key in self.keys[2:]:
            self._take(state[key], key)
        for name in {f"{key}.{name}" for key in "mv" for name in self.shapes} - state["optimizer"].keys():
            raise KeyError(name)
        for name in state["optimizer"]:
            value = state["optimizer"][name]
            if name[2:] in self.shapes:
                self._put(name[2:], name[0], value)
        self.step_count = step

    def snapshot_bytes(self) -> int:
        """Of host memory, that a whole snapshot takes on this rank."""
        held = sum(flat.numel() for flat in self.partitions) if self.level or distributed.rank() == 0 else 0
        return 4 * held * (1 + len(self.keys))

    def snapshot(self, files: Collection[str] | None = None) -> Snapshot:
        """`state` as it is now, this rank's partitions copied to the host, gathered when it is written; files: those alone."""
        places = {}
        for name in self.shapes if self.level or distributed.rank() == 0 else ():
            part = self._slices(name)
            if part and part[2].stop > part[2].start:
                index = next(i for i, flat in enumerate(self.partitions) if flat is part[0])
                places[name] = Place(index, part[1].start, part[2].start, part[2].stop)
        partitions = self.partitions if places else []
        held = {key: [self._of(flat, key) for flat in partitions] for key in ("p", *self.keys)}
        return Snapshot(self.shapes, places, held, self.constants, files, added=self.level > 0)

    def close(self) -> None:
        """Let go of all memory, of sharded teachers too; at stage 0 `average` has lent the tracks."""
        lent = [] if self.level else [self._of(self.whole, key) for key in self.keys[2:]]
        for held in (*self.sharded, self.ds):
            release(held, lent)
        self.optimizer.state.clear()
        self.borrowed()

    def _tensors(self, key: str) -> Tensors:
        shapes = self.shapes | {name: tuple(x.shape) for name, x in self.constants.items()}
        return Tensors(shapes, lambda name: self.constants[name] if name in self.constants else self._full(name, key))

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Tensor], *keys: str) -> None:
        """Full tensors in the order that they come in: this rank's parts of parameters into `keys`, and the persistent buffers.

        Raises ValueError where names or shapes do not fit.
        """
        own, framed = self.constants, buffers.constants(self.frame)
        buffers.check_names(self.shapes | {name: tuple(x.shape) for name, x in own.items()}, weights)
        for name in weights:
            value = weights[name]
            if name not in own:
                for key in keys:
                    self._put(name, key, value)
            elif "p" in keys:
                framed[name].copy_(own[name].copy_(value))

    def _slices(self, name: str) -> tuple[Tensor, slice, slice] | None:
        """(partition, where in it, where in the flat parameter) of this rank's part of a parameter; None if it has none."""
        p = self.parameters[name]
        if self.level == 0:
            return self.whole, self.places[name], slice(0, p.numel())
        if self.level < 3:
            part = p._hp_mapping  # what DeepSpeed's safe_get_full_* read
            if part is None:
                return None
            inner, outer = part.get_hp_fragment_address(), part.lp_fragment_address
            flat = next(
                f for f in self.partitions if f.data_ptr() <= part.hp_fragment.data_ptr() < f.data_ptr() + 4 * f.numel()
            )
            return flat, slice(inner.start, inner.start + inner.numel), slice(outer.start, outer.start + outer.numel)
        group, start, size = self.ds.optimizer.grad_position[self.ds.optimizer.get_param_id(p)]
        first = size * distributed.rank()
        count = max(0, min(size, p.ds_numel - first))
        return self.partitions[group], slice(start, start + count), slice(first, first + count)

    def _of(self, partition: Tensor, key: str) -> Tensor:
        return partition if key == "p" else self.optimizer.state[partition][key]

    @torch.no_grad()
    def _full(self, name: str, key: str) -> Tensor:
        """A parameter, moment or EMA track gathered from all ranks, in its shape."""
        shape = self.shapes[name]
        full = torch.zeros(torch.Size(shape).numel(), device=self.device)
        part = self._slices(name)
        if part:
            full[part[2]] = self._of(part[0], key)[part[1]]
        return (distributed.sum_(full) if self.level else full).view(shape)

    @torch.no_grad()
    def _put(self, name: str, key: str, value: Tensor) -> None:
        """This rank's part of a full tensor into its partition, and into the weights that the forward reads."""
        value = value.detach().reshape(-1).to(self.device, torch.float32)
        part = self._slices(name)
        if part:
            self._of(part[0], key)[part[1]] = value[part[2]]
        if key != "p" or self.level == 0:
            return
        p = self.parameters[name]
        if self.level < 3:
            p.copy_(value.view(p.shape))
            return
        p.ds_tensor.view(-1)[: part[2].stop - part[2].start] = value[part[2]]
        if p.data.numel() == p.ds_numel:  # small parameters stay gathered
            p.data.copy_(value.view(p.data.shape))

    def _constrain(self, keys: tuple[str, ...] = ("p",)) -> None:
        """Weight constraints on fp32 masters: one constrained part after the other is gathered, constrained and put back."""
        for prefix, part in self.frame.named_modules():
            if not hasattr(part, "constrain"):
                continue
            names = {name: f"{prefix}.{name}" if prefix else name for name, _ in part.named_parameters()}
            whole = buffers.fill(part, {name: self._full(full, "p") for name, full in names.items()}, self.device)
            whole.constrain()
            for name, p in whole.named_parameters():
                for key in keys:
                    self._put(names[name], key, p)


def _cutter(config: dict[str, Any], device: torch.device) -> Callable[[nn.Parameter], None]:
    """Cuts single parameters as stage 3 holds them: this rank's part stays, the rest is freed."""
    with _deepspeed(device) as deepspeed:
        # of an empty module: a context would cut after every constructor, before a parent has drawn anew
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
    return lambda p: init._convert_to_zero_parameters([p])


@contextlib.contextmanager
def _deepspeed(device: torch.device) -> Iterator[Any]:
    """The one door to DeepSpeed: imported for this device, quiet, in a process group. Its changes of the process end here."""
    with wrapping.as_found():
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if device.type == "cpu":
            # its all-reduce for inference, which ZeRO does not call: it would be compiled here, 45 s at the first start
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        distributed.alone(device)
        wrapping.forget_groups(deepspeed)
        with distributed.together():  # groups that it makes have torch's timeout until they are there
            yield deepspeed
