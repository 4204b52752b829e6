"""The passes of one forward through a denoiser: gradients in common, and activations recomputed if asked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffkd.modules import Denoiser
from diffkd.shared_gradients import LinearPass, linear_passes


def denoiser_passes(
    denoiser: Denoiser, timesteps: Sequence[Tensor], rows: int, *, checkpoint: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return `denoiser` for one call per entry of `timesteps`, which together cost less than as many on their own.

    Args:
        denoiser: predicts the noise from `(noisy, timesteps)`.
        timesteps: of each call, in their order, (B,) or (1,) int64.
        rows: samples in each call.
        checkpoint: keep none of a pass's activations, and compute them again in its backward. The results are equal to
            the last bit; the running statistics are updated once.

    Returns:
        A function `noisy -> predicted noise`.
    """
    layers = [layer for layer in denoiser.pred if isinstance(layer, nn.Linear)]
    per_layer = [linear_passes(layer, len(timesteps), rows) for layer in layers]
    linears: list[tuple[LinearPass, ...]] = list(zip(*per_layer, strict=True)) if layers else [()] * len(timesteps)
    turns: Iterator[tuple[Tensor, tuple[LinearPass, ...]]] = iter(
        zip(_looked_up(denoiser.time_embedding, timesteps), linears, strict=True)
    )

    def predict(noisy: Tensor) -> Tensor:
        turn = next(turns, None)
        if turn is None:
            raise RuntimeError(f"the denoiser was planned for {len(timesteps)} passes, and this is one more")
        if not (checkpoint and torch.is_grad_enabled()):
            result: Tensor = denoiser(noisy, *turn)
            return result
        # A compiler plans the recomputation itself, statistics aside, and takes no contexts.
        extra: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_contexts, denoiser)}
        # No random numbers are drawn inside, so that there is no state of a generator to keep.
        result = recomputed(denoiser, noisy, *turn, use_reentrant=False, preserve_rng_state=False, **extra)
        return result

    return predict


def _looked_up(table: nn.Embedding, timesteps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Look all timesteps up at once: the gradient of each lookup is as large as the table. Sharded tables: none."""
    if type(table.weight) is not nn.Parameter:
        return timesteps
    return table(torch.cat(list(timesteps))).split([len(one) for one in timesteps])  # type: ignore[no-any-return]


def _contexts(denoiser: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first computation, and every further one."""
    return nullcontext(), _StatisticsKept(denoiser)


class _StatisticsKept:
    """Within, a module's buffers are copies: batch normalisations update those, and the true ones stay as they are.

    It can be entered again and again, as a graph can be run backwards more than once.
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
