"""Logit standardisation: compare the shapes of two class distributions, not their scales."""

from torch import Tensor

from diffkd.losses import at_least_float32


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return the Z-scores of logits over the classes: mean 0, standard deviation 1 for each sample or position.

    `Z(z) = (z - mean(z)) / (std(z) + eps)`, to be taken of both sides before the temperature. Sun, Ren, Li, Wang, Cao,
    *Logit Standardization in Knowledge Distillation*, CVPR 2024. The standard deviation is the population's;
    the authors' code divides by K - 1 instead of K, half a percent at 100 classes. They train with temperature 2 and a
    loss weight of 9 on CIFAR-100.

    Args:
        logits: (B, K) or (B, K, H, W).
        eps: added to the standard deviation, as in the authors' code.

    Returns:
        The same shape in float32 or wider, unchanged by any shift and (up to `eps`) any positive factor of the logits.
    """
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, correction=0, keepdim=True) + eps)
