"""The teacher's classifier on top of a feature, for methods that apply it to the student's feature."""

from collections.abc import Callable

from torch import Tensor, nn

from diffkd.files.weights import unwrap


def pooled_classifier(teacher: nn.Module, channels: int) -> Callable[[Tensor], Tensor]:
    """Return a function from the teacher's last feature to logits: average pooling and its last linear layer.

    Gradients flow to the feature, not to the layer's parameters.

    Args:
        teacher: a classifier.
        channels: of the feature.

    Returns:
        A function from (B, C, H, W) or (B, C) to logits (B, K).

    Raises:
        ValueError: if the teacher has no linear layer that takes the feature.
    """
    linears = [module for module in unwrap(teacher).modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1].in_features != channels:
        found = f"takes {linears[-1].in_features}" if linears else "is missing"
        raise ValueError(
            f"the teacher's last linear layer {found}, but the feature has {channels} channels: hand the method a "
            "teacher_head, a function from the feature to logits, with distiller(images, teacher_head=...)"
        )
    linear = linears[-1]

    def head(feature: Tensor) -> Tensor:
        pooled = feature.flatten(2).mean(2) if feature.ndim == 4 else feature
        bias = None if linear.bias is None else linear.bias.detach()
        return nn.functional.linear(pooled, linear.weight.detach(), bias)

    return head
