"""One weight gradient for all the passes that go through a linear layer, instead of one per pass and their sum.

A layer that is applied n times in a forward gets `dW = sum over passes of g_i^T x_i`. Where the weight is larger than
what passes through it (logits: 4000 x 1000 entries against 16 rows), forming and adding n matrices of that size costs
more than anything else in the backward. `dW = cat(g)^T cat(x)` is the same number in one product.

The passes are brought together by autograd itself, so that there is no state to go stale. :class:`_HandOut` gives each
pass two tokens, tensors without memory of their own, shaped like the pass's input and output. :class:`_Pass` computes
the layer, and as the tokens' gradients it returns the two factors x and g themselves. Autograd calls the backward of
:class:`_HandOut` once, after all the passes that take part in a backward have had theirs, with exactly their factors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearPass = Callable[[Tensor], Tensor]

# Entries of a weight, 1 MiB in float32, that the caches next to a processor hold: for smaller ones the bookkeeping
# costs more than the products.
CACHED = 2**18


def linear_passes(layer: nn.Linear, rows: Sequence[int]) -> list[LinearPass]:
    """Return `layer` once for each of its passes, to be called at most once each, with (rows[i], in).

    Outputs and gradients are the layer's own up to rounding. The layer itself is returned where one product would not
    pay, or would not be the same: small weights, no gradients, while compiling (which plans the backward itself), and
    layers that are more than a plain nn.Linear with plain parameters (hooks, parametrisations, sharded weights).
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
    """Whether the weight is what a pass costs: larger than what passes through it, and than what a cache holds."""
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
    """(weight, bias) to an input and an output token per pass; the backward makes the one product."""

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, rows: tuple[int, ...]) -> tuple[Tensor, ...]:
        out_features, in_features = weight.shape
        return tuple(weight.new_zeros(()).expand(count, size) for count in rows for size in (in_features, out_features))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # a pass outside this backward has none, rather than zeros
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
    """One pass through the layer. The weight's gradient leaves through the tokens, as its two factors."""

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
