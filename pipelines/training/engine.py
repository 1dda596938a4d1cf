"""A DeepSpeed engine around what trains, with its full state in and out for any ZeRO stage and world size.

With exact sums the gradients of a global batch are the same to the last bit on any number of workers. The gradients of
the micro-batches are float32 numbers (or bfloat16). Their sums in float64 are exact unless exponents lie more than 25
apart, so the order of summation leaves no trace after the one rounding to float32 at the end. In float32 another order
differs by a rounding error, which moves a ReLU across its kink somewhere, and within fifty steps that grows to percents
of the loss.

Shape suffixes: N elements of all parameters that train.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.training.config import TrainOptions

STEP = "step"  # the optimizer's own step count, one number for all parameters
AVERAGE = "average"  # kept beside the moments, of the same part of the weights on each worker


class Engine:
    """`forward`, `backward` and `step` of one worker, and its collectives: every worker calls these alike.

    Args:
        optimizer_state: what `optimizer_state()` of an earlier engine gave: `{parameter}.{moment}` and `step`.
        averages: exponential averages of the trained parameters, as `averages()` gave them; kept where
            `options.ema_decay` is set. Each worker holds those of the weights that its optimizer holds.
    """

    def __init__(
        self,
        module: nn.Module,
        options: TrainOptions,
        *,
        micro: int,
        accumulation: int,
        optimizer_state: dict[str, Tensor] | None = None,
        averages: dict[str, Tensor] | None = None,
    ):
        self.stage = options.zero_stage
        self.named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        parameters = [p for _, p in self.named]
        on_gpu = parameters[0].device.type == "cuda"
        deepspeed = _import_deepspeed(parameters[0].device)
        # One kernel for all parameters on GPUs; on CPUs torch's loop, whose rounding runs began with.
        common: dict[str, Any] = {"weight_decay": options.weight_decay, "fused": True if on_gpu else None}
        self.base_optimizer: SGD | AdamW
        if options.optimizer == "sgd":
            self.base_optimizer = SGD(parameters, options.lr, momentum=0.9, **common)
            self.moments = ["momentum_buffer"]
        else:
            self.base_optimizer = AdamW(parameters, options.lr, **common)
            self.moments = ["exp_avg", "exp_avg_sq"]
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.micro_batches = accumulation * self.world_size
        self.clip, self._norm = options.clip_grad_norm, math.nan
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            # Without ZeRO, DeepSpeed clips but tells no norm: `step` does both. So it does with exact sums.
            "gradient_clipping": options.clip_grad_norm if options.zero_stage and not options.exact_sums else 0.0,
            # Stage 3's own linear layer rounds otherwise than torch's.
            "zero_optimization": {"stage": options.zero_stage, "memory_efficient_linear": not options.exact_sums},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Parameters, gradients and their sums stay fp32, on the wire too; only what a forward computes is bf16.
            "torch_autocast": {
                "enabled": options.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.base_optimizer, config=config)
        self.averaged = bool(averages)
        self._make_optimizer_state(optimizer_state or {}, averages or {}, bool(options.ema_decay))
        self.exact = bool(options.exact_sums)
        if self.exact:  # sums of what every backward leaves at each parameter, 8 bytes per element
            sizes = [_shape(p).numel() for p in parameters]
            self._sum_N = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
            self._sums = [part.view(_shape(p)) for part, p in zip(self._sum_N.split(sizes), parameters, strict=True)]
            for p, part in zip(parameters, self._sums, strict=True):
                p.register_hook(partial(_add, part))
            # DeepSpeed need not reduce gradients, in whose place `step` puts others. ZeRO 3 does so inside its hooks.
            if self.stage == 0:
                self.engine.enable_backward_allreduce = False
            elif self.stage < 3:
                self.engine.optimizer.average_tensor = lambda tensor, dtype: None
            if self.stage < 3:
                for module_part in module.modules():
                    module_part.register_forward_pre_hook(_apart)

    @property
    def module(self) -> nn.Module:
        """What trains."""
        return self.engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        # An exact sum is not of losses divided by the number of micro-batches: each division would be rounded.
        self.engine.backward(loss, scale_wrt_gas=not self.exact)

    def accumulate(self) -> None:
        """After the `backward` of every micro-batch but the last one of an optimizer step."""
        self.engine.step()

    def step(self, lr: float, *, take: bool = True) -> bool:
        """The optimizer step after the last micro-batch. Returns whether it was taken, the same on every worker.

        It is skipped where `take` is False or the gradient is not finite: weights, moments and the optimizer's own step
        count stay, and the gradient is dropped.
        """
        self.base_optimizer.take = take
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.exact:
            self._norm = float(self.sum(self._sum_N).div_(self.micro_batches).norm())
            if 0 < self.clip < self._norm:
                self._sum_N.mul_(self.clip / self._norm)
            self.base_optimizer.take = take = take and math.isfinite(self._norm)
            if not take:  # DeepSpeed shall see nothing that it reads as an overflow
                self._sum_N.zero_()
            for (_, p), gradient in zip(self.named, self._sums, strict=True):
                self._set_gradient(p, gradient)
            self.engine.step()
            self._sum_N.zero_()
            return take
        if self.stage == 0:
            gradients = [p.grad for _, p in self.named if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._norm = float(norm)
            self.base_optimizer.take = take = take and math.isfinite(self._norm)
            if self.clip:
                nn.utils.clip_grads_with_norm_([p for _, p in self.named], self.clip, norm)
            self.engine.step()
            return take
        self.engine.step()  # skips by itself a step whose gradient has no finite norm
        self._norm = float(self.engine.get_global_grad_norm())
        return take and bool(self.engine.was_step_applied())

    def grad_norm(self) -> float:
        """Norm of the last optimizer step's gradient before clipping; not finite where the gradient is not."""
        return self._norm

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the workers."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenation over the workers, in rank order, along the first axis."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole fp32 tensor) of every trained parameter, one at a time; with ZeRO 3 a collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, p in self.named:
            yield name, p.detach() if self.stage < 3 else safe_get_full_fp32_param(p).detach().view(_shape(p))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move this worker's part of the exponential averages on, or begin them."""
        held = list(self._held())
        averages = [self.base_optimizer.state[p][AVERAGE] for p in held]
        torch._foreach_lerp_(averages, held, 1 - decay if self.averaged else 1.0)
        self.averaged = True

    def averages(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole exponential average) of every trained parameter, none before the first; a collective."""
        if self.averaged:
            yield from ((name, self._whole(p, AVERAGE)) for name, p in self.named)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole fp32 moments by `{parameter}.{moment}`, and `step`, on rank 0's CPU, {} elsewhere; a collective."""
        moments = ((f"{name}.{moment}", self._whole(p, moment)) for name, p in self.named for moment in self.moments)
        state = {name: on_cpu(value) for name, value in moments if self.rank == 0}
        steps = [s[STEP] for s in self.base_optimizer.state.values() if STEP in s]
        return state | {STEP: on_cpu(steps[0])} if steps and self.rank == 0 else state

    def _held(self) -> Iterable[Tensor]:
        """The fp32 weights that this worker's optimizer steps: all, or with ZeRO flat parts of them."""
        if self.stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return (p for group in self.base_optimizer.param_groups for p in group["params"])

    def _whole(self, p: nn.Parameter, key: str) -> Tensor:
        """The entry of a parameter in the optimizer's state; with ZeRO a collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self.base_optimizer.state[p][key]
        return safe_get_full_optimizer_state(p, key).view(_shape(p))

    def _make_optimizer_state(self, state: dict[str, Tensor], averages: dict[str, Tensor], average: bool) -> None:
        """What torch would make at the first step, from `state` or empty: there may be no first step to take."""
        for p in self._held():
            slot = self.base_optimizer.state[p]
            for moment in [*self.moments, *[AVERAGE] * average]:
                slot[moment] = torch.zeros_like(p)
            if isinstance(self.base_optimizer, AdamW):
                where = p.device if self.base_optimizer.defaults["fused"] else "cpu"  # as torch makes it
                slot[STEP] = state.get(STEP, torch.zeros(())).to(where, torch.float32, copy=True)
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, p in self.named:
            if state:
                for moment in self.moments:
                    self._set_state(p, moment, state[f"{name}.{moment}"])
            if averages:
                self._set_state(p, AVERAGE, averages[name])

    def _set_state(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.base_optimizer.state[p][key].copy_(value)
        elif self.stage == 3:  # by parts: what takes whole values there wants them to divide evenly
            safe_set_local_optimizer_state(p, self._part(value, p).to(self.device), key)
        else:
            safe_set_full_optimizer_state(p, value.to(self.device), key)

    def _set_gradient(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Put `gradient` where the optimizer step finds what DeepSpeed has reduced."""
        from deepspeed.utils import safe_set_local_grad

        if self.stage == 0:
            if p.grad is not None:
                p.grad.copy_(gradient)
        elif self.stage == 3:
            safe_set_local_grad(p, self._part(gradient, p))
        else:  # what safe_set_full_grad does, which stops at a `p.grad` that nothing reads any more
            p.set_full_hp_grad(gradient)  # type: ignore[attr-defined]

    def _part(self, value: Tensor, p: nn.Parameter) -> Tensor:
        """This worker's part of a value of `p` under ZeRO 3, which pads the last parts with zeros."""
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        return padded[self.rank * size : (self.rank + 1) * size]


class _Skippable:
    """An optimizer whose step can be skipped, inside whatever DeepSpeed wraps around it."""

    take = True

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.take else None  # type: ignore[misc]


class AdamW(_Skippable, torch.optim.AdamW):
    pass


class SGD(_Skippable, torch.optim.SGD):
    pass


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy that training does not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _apart(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inserts a view so that the gradients of this module are accumulated first, in the order of ZeRO-3's hooks."""
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


def _shape(p: nn.Parameter) -> torch.Size:
    """ZeRO-3 leaves an empty tensor in place and keeps the shape beside it."""
    return getattr(p, "ds_shape", p.shape)


def _import_deepspeed(device: torch.device) -> Any:
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if device.type == "cpu":
        # At every start DeepSpeed would compile a program to find out which operators it could compile (1 s), and then
        # its shared-memory collectives (45 s); gloo needs none of it.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _add(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)
