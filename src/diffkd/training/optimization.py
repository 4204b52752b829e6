"""Parameter groups of the optimiser, and the learning rate as a function of the epoch."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]

# Optimisers with a fused CPU kernel.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes: peak rate times a factor that depends on the epoch alone.

    The epoch is counted from 0 and is fractional within an epoch. Nothing is accumulated, so a resumed run has the same
    rates as an uninterrupted one.

    Args:
        kind: "constant"; "step": times `factor` at every milestone or after every `every` epochs; "exponential": times
            `factor` per `every` epochs, smoothly; "cosine": half a cosine from the end of warm-up down to `floor` at
            the last epoch; "poly": `(1 - progress) ** power`, usual for segmentation, likewise.
        milestones: epochs at which "step" decays; empty: every `every` epochs.
        every: period of "step" without milestones, and of "exponential", in epochs.
        factor: of "step" and "exponential".
        floor: final rate of "cosine" and "poly" as a share of the peak rate.
        power: of "poly"; 0.9 is usual (Chen et al., DeepLab, 2017).
        warmup_epochs: length of a linear warm-up in epochs; milestones and periods still count from epoch 0.
        warmup_start: initial rate of the warm-up as a share of the peak rate.
        per: "step" changes the rate with every optimiser step, "epoch" at the start of every epoch. Warm-up is always
            per step.

    Raises:
        ValueError: if a number is out of its range.
    """

    kind: Literal["constant", "step", "exponential", "cosine", "poly"] = "cosine"
    milestones: Sequence[float] = ()
    every: float = 1.0
    factor: float = 0.1
    floor: float = 0.0
    power: float = 0.9
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    per: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "step", "exponential", "cosine", "poly"):
            raise ValueError(f"schedule.kind must be constant, step, exponential, cosine or poly, got {self.kind!r}")
        if not all(0 < value < math.inf for value in (self.every, self.factor, self.power)):  # NaN is not
            raise ValueError(
                "schedule.every, schedule.factor and schedule.power must be finite and above 0, got "
                f"{self.every}, {self.factor} and {self.power}"
            )
        if not all(mark >= 0 for mark in self.milestones):
            raise ValueError(f"schedule.milestones must be epochs, counted from 0, got {list(self.milestones)}")
        if not 0 <= self.warmup_epochs < math.inf or not 0 <= self.warmup_start <= 1 or not 0 <= self.floor <= 1:
            raise ValueError(
                "schedule: warmup_epochs must be finite and at least 0, warmup_start and floor in 0..1, got "
                f"{self.warmup_epochs}, {self.warmup_start} and {self.floor}"
            )

    def __call__(self, epoch: float, epochs: int) -> float:
        """Return the factor of the peak rate.

        Args:
            epoch: finished epochs, fractional.
            epochs: length of the whole training.

        >>> [Schedule("step", milestones=[2, 3])(epoch, 4) for epoch in (0.0, 1.9, 2.0)]
        [1.0, 1.0, 0.1]
        """
        if epoch < self.warmup_epochs:
            return self.warmup_start + (1 - self.warmup_start) * epoch / self.warmup_epochs
        if self.per == "epoch":
            epoch = math.floor(epoch)
        match self.kind:
            case "constant":
                return 1.0
            case "step":
                passed = sum(epoch >= mark for mark in self.milestones)
                return self.factor ** (passed if self.milestones else math.floor(epoch / self.every))
            case "exponential":
                return float(self.factor ** (epoch / self.every))
            case "cosine" | "poly":
                length = max(epochs - self.warmup_epochs, 1e-12)
                progress = min(max(epoch - self.warmup_epochs, 0.0) / length, 1.0)
                falling = (1 + math.cos(math.pi * progress)) / 2
                if self.kind == "poly":
                    falling = (1 - progress) ** self.power
                return self.floor + (1 - self.floor) * falling


def build_optimizer(model: nn.Module, factory: OptimizerFactory, *, decay_all: bool = True) -> Optimizer:
    """Build an optimiser of all trainable parameters of `model`.

    Args:
        model: its `parameters()` are trained.
        factory: makes the optimiser from parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`.
        decay_all: weight decay on every parameter; False: none on biases and on the scales and shifts of normalisation
            layers (all parameters of at most one dimension).

    Returns:
        The optimiser; `initial_lr` of each group keeps its peak rate.

    Raises:
        ValueError: if no parameter is trainable, or a value of the optimiser, such as its rate, is not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no trainable parameters; set requires_grad of what should learn")
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if not decay_all:
        groups = [
            {"params": [p for p in trainable if p.ndim > 1]},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer = factory([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{name}={value} of {type(optimizer).__name__} is no number to learn with: give a finite one"
                )
        group.setdefault("initial_lr", group["lr"])
    _fuse(optimizer)
    return optimizer


def takes_channels_last(factory: OptimizerFactory) -> bool:
    """Whether an optimiser can step channels_last parameters; one that calls `view(-1)` on them (LBFGS) cannot.

    Tried on a parameter of 16 entries. Also True if the optimiser fails in both memory formats.
    """
    return _steps(factory, torch.channels_last) or not _steps(factory, torch.contiguous_format)


def _steps(factory: OptimizerFactory, layout: torch.memory_format) -> bool:
    parameter = nn.Parameter(torch.ones(2, 2, 2, 2).to(memory_format=layout))

    def closure() -> float:
        parameter.grad = torch.ones_like(parameter)
        return 1.0

    try:
        factory([{"params": [parameter]}]).step(closure)
    except Exception:  # a custom optimiser may raise anything
        return False
    return True


def _fuse(optimizer: Optimizer) -> None:
    """Use the fused kernel on a CPU, unless another implementation was requested. Equal up to rounding.

    The unfused implementation allocates a tensor as large as the parameter for the weight decay alone.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if type(optimizer) not in _FUSED or not all(
        type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.is_cpu
        for parameter in parameters
    ):
        return
    for group in optimizer.param_groups:
        if group["fused"] is None and not any(
            group.get(other) for other in ("foreach", "differentiable", "capturable")
        ):
            group["fused"] = True
    optimizer.register_step_pre_hook(_align)


def _align(optimizer: Optimizer, *_: object) -> None:
    """Give gradients and state the strides of their parameters, since the fused kernels ignore strides.

    Loaded state may come from a run with another memory format. Sparse gradients use the unfused implementation.
    """
    for group in optimizer.param_groups:
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in group["params"]):
            group["fused"] = False
            continue
        for parameter in group["params"]:
            order = _order(parameter)
            if parameter.grad is not None and _order(parameter.grad) != order:
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and _order(value) != order:
                    state[name] = torch.empty_like(parameter).copy_(value)


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without those of dimensions of size 1."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of every group to its peak rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
