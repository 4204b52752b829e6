"""The passes through a denoiser in one forward: shared weight gradients, and optional activation checkpointing."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffkd.diffusion.modules import Denoiser
from diffkd.features.forward import on_device_of

LinearPass = Callable[[Tensor], Tensor]

# Entries of a weight, 1 MiB in float32, that fit into a CPU cache: for smaller weights the overhead exceeds the gain.
CACHED = 2**18


def linear_passes(layer: nn.Linear, rows: Sequence[int]) -> list[LinearPass]:
    """Return `layer` once for each of its passes, to be called at most once each, with (rows[i], in).

    Outputs and gradients are the layer's own up to rounding. The layer itself is returned if a joint product would not
    be faster or not equal: small weights, no gradients, while compiling (the compiler plans the backward), and layers
    that are not a plain nn.Linear with plain parameters (hooks, parametrisations, sharded weights).
    """
    if not _pays(layer, rows):
        return [layer] * len(rows)
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    device = weight.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and weight.dtype == torch.float32:
        half = torch.get_autocast_dtype(device)
        weight, bias = weight.to(half), None if bias is None else bias.to(half)
    tokens: tuple[Tensor, ...] = _HandOut.apply(weight, bias, tuple(rows))

    def one(index: int) -> LinearPass:
        def run(x: Tensor) -> Tensor:
            out: Tensor = _Pass.apply(x.to(weight.dtype), weight, bias, tokens[2 * index], tokens[2 * index + 1])
            return out

        return run

    return [one(index) for index in range(len(rows))]


def is_wide(layer: nn.Linear, rows: int) -> bool:
    """Whether reading the weight dominates a pass: it is larger than the activations and than a CPU cache."""
    return max(CACHED, rows * (layer.in_features + layer.out_features)) < layer.weight.numel()


def _pays(layer: nn.Linear, rows: Sequence[int]) -> bool:
    weights = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and len(rows) > 1
        and is_wide(layer, max(rows))
        and type(layer) is nn.Linear
        and not hooked
        and all(type(weight) is nn.Parameter and weight.requires_grad for weight in weights)
    )


class _HandOut(torch.autograd.Function):
    """Maps (weight, bias) to an input and an output token per pass; the backward computes one joint product."""

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        out_features, in_features = weight.shape
        return tuple(weight.new_zeros(()).expand(count, size) for count in rows for size in (in_features, out_features))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # passes outside this backward get None instead of zeros
        ctx.has_bias = inputs[1] is not None

    @staticmethod
    def backward(ctx: Any, *factors: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x = [factor for factor in factors[0::2] if factor is not None]
        g = [factor for factor in factors[1::2] if factor is not None]
        if not g:
            return None, None, None
        every_g = torch.cat(g)  # (sum of rows, out)
        return every_g.t() @ torch.cat(x), every_g.sum(dim=0) if ctx.has_bias else None, None


class _Pass(torch.autograd.Function):
    """One pass through the layer. Its two factors of the weight's gradient are the gradients of the tokens."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, input_token: Tensor, output_token: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g @ weight if ctx.needs_input_grad[0] else None, None, None, x, g


# The compiler of PyTorch 2.8 updates running statistics in the recomputation too: no checkpointing there.
_STATISTICS_TWICE = torch.__version__ < "2.9"


class DenoiserPasses:
    """The passes of one forward: a chain of denoising steps, and one extra pass that does not depend on them.

    If reading the weights dominates (logits), the extra pass is batched with the last step, each with its own batch
    statistics: every weight is read one time less, and running statistics are updated in the order of the passes.

    Args:
        denoiser: predicts the noise from `(noisy, timesteps)`, with one timestep per sample. Other modules than
            :class:`~diffkd.diffusion.modules.Denoiser` are called once for each pass.
        chain: timesteps of the denoising steps, in their order, (n,) int64, or (n, B) for one per sample.
        noisy: input of the extra pass, (B, C, H, W) or (B, C), with the batch size of the steps.
        timesteps: its timesteps, (B,) int64; None: no extra pass.
        checkpoint: activation checkpointing: recompute a pass's activations in its backward. The results are bitwise
            equal; the running statistics are updated once.
    """

    def __init__(
        self, denoiser: nn.Module, chain: Tensor, noisy: Tensor, timesteps: Tensor | None, *, checkpoint: bool = False
    ) -> None:
        alone = timesteps is None
        rows, planned = len(noisy), [*(chain if chain.ndim == 2 else chain[:, None])]
        planned += [planned[-1] if timesteps is None else timesteps]
        self.denoiser, self.checkpoint, self.noisy = denoiser, checkpoint, noisy
        self.light = isinstance(denoiser, Denoiser)
        layers: list[nn.Linear] = []
        if isinstance(denoiser, Denoiser):
            layers = [layer for layer in denoiser.pred if isinstance(layer, nn.Linear)]
            *self.times, self.extra_time = _looked_up(denoiser.time_embedding, planned)
        else:
            *self.times, self.extra_time = [one.expand(rows) for one in planned]
        self.together = not alone and len(layers) > 0 and all(is_wide(layer, 2 * rows) for layer in layers)
        counts = [rows] * (len(chain) - 1) + ([2 * rows] if self.together else [rows] if alone else [rows, rows])
        per_layer = [linear_passes(layer, counts) for layer in layers]
        self.linears: list[tuple[LinearPass, ...]] = (
            list(zip(*per_layer, strict=True)) if layers else [()] * len(counts)
        )
        self.steps = 0
        self._extra: Tensor | None = None

    def step(self, noisy: Tensor) -> Tensor:
        """Predict the noise in the input of the next step of the chain.

        Raises:
            RuntimeError: if no step is left.
        """
        if self.steps == len(self.times):
            raise RuntimeError(f"{self.steps} denoising steps were planned, and this is one more")
        time, linears = self.times[self.steps], self.linears[self.steps]
        self.steps += 1
        if not (self.together and self.steps == len(self.times)):
            return self._run(noisy, time, linears)
        both = torch.cat([noisy, self.noisy])
        times = torch.cat([time.expand_as(self.extra_time), self.extra_time])
        predicted, self._extra = self._run(both, times, linears, 2).chunk(2)
        return predicted

    def extra(self) -> Tensor:
        """Predict the noise in the input of the extra pass; call after the last step."""
        if self._extra is None:
            self._extra = self._run(self.noisy, self.extra_time, self.linears[-1])
        return self._extra

    def _run(self, noisy: Tensor, time: Tensor, linears: tuple[LinearPass, ...], batches: int = 1) -> Tensor:
        turn = (noisy, time, linears, batches) if self.light else (on_device_of(self.denoiser, noisy), time)
        compiling = torch.compiler.is_compiling()
        if not (self.checkpoint and torch.is_grad_enabled()) or (compiling and _STATISTICS_TWICE):
            result = self.denoiser(*turn)
        else:
            # The compiler handles running statistics in the recomputation, and takes no context_fn.
            extra: dict[str, Any] = {} if compiling else {"context_fn": partial(_contexts, self.denoiser)}
            # The light denoiser draws no random numbers, so that no generator state needs to be kept.
            result = recomputed(self.denoiser, *turn, use_reentrant=False, preserve_rng_state=not self.light, **extra)
        if not isinstance(result, Tensor) or result.shape != noisy.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"the denoiser {type(self.denoiser).__name__} returned {got} for {tuple(noisy.shape)}; it must predict "
                "the noise in its input, in the same shape"
            )
        return result


def _looked_up(table: nn.Embedding, timesteps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Look up all timesteps at once: the gradient of each lookup is as large as the table. Not if it is sharded."""
    if type(table.weight) is not nn.Parameter:
        return timesteps
    return table(torch.cat(list(timesteps))).split([len(one) for one in timesteps])  # type: ignore[no-any-return]


def _contexts(denoiser: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the forward and of the recomputation."""
    return nullcontext(), _StatisticsKept(denoiser)


class _StatisticsKept:
    """A context in which a module's buffers are copies, so that BatchNorm updates do not change the actual ones.

    It can be entered repeatedly, since a graph can be run backward more than once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.owners = [(owner, name) for owner in module.modules() for name, _ in owner.named_buffers(recurse=False)]
        self.true: list[Tensor] = []

    def __enter__(self) -> None:
        self.true = [getattr(owner, name) for owner, name in self.owners]
        for (owner, name), buffer in zip(self.owners, self.true, strict=True):
            setattr(owner, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for (owner, name), buffer in zip(self.owners, self.true, strict=True):
            setattr(owner, name, buffer)
        self.true = []
