"""Segmenters for images of any size: padded to what the model needs, and the class map brought back to the image."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.features.layout import select_tensor
from diffkd.files.weights import unwrap

Padding = Literal["zeros", "reflect"]

# By how much these architectures of smp shrink the last feature of the encoder once more.
_HALVED_FURTHER = {"DPT": 2, "PAN": 8}
_USUAL_STRIDE = 32  # of nearly all encoders; also the size below which some of them have nothing left


class AnySize(nn.Module):
    """A segmenter that takes images of any size and returns logits of the same size.

    The images are padded on the right and at the bottom to the next multiple of the stride, and the class map is
    up-sampled and cropped. The segmenter inside stays as it is and may be used on its own; the state of this module is
    that of the segmenter, under the same names. It goes through `torch.export` with dynamic height and width where the
    segmenter does.

    Args:
        model: a segmenter that returns (B, K, h, w), a mapping with "out", or an object with `logits`.
        stride: the multiple to pad to, in pixels; None to take :func:`stride_of`.
        padding: "zeros" (for normalised images their mean) or "reflect".

    Raises:
        ValueError: if `stride` is less than 1 or `padding` is unknown.
    """

    def __init__(self, model: nn.Module, *, stride: int | None = None, padding: Padding = "zeros") -> None:
        super().__init__()
        if stride is not None and stride < 1:
            raise ValueError(f"stride {stride} is no multiple to pad images to: it must be at least 1 pixel")
        if padding not in ("zeros", "reflect"):
            raise ValueError(f"padding '{padding}' is unknown: give 'zeros' or 'reflect'")
        self.model = model
        self.stride = stride_of(model) if stride is None else stride
        self.padding = padding
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Tensor:
        """Segment images.

        Args:
            images: (B, C, H, W), of any height and width.

        Returns:
            Logits (B, K, H, W).

        Raises:
            TypeError: if the model returns no class map.
        """
        height, width = images.shape[-2:]
        padded = pad_to_multiple(images, self.stride, self.padding)
        logits = upsample(class_map(self.model(padded)), (padded.shape[-2], padded.shape[-1]))
        # A slice would restrict an exported program to multiples of the stride, or to sizes other than these.
        return F.pad(logits, (0, width - logits.shape[-1], 0, height - logits.shape[-2]))


def stride_of(model: nn.Module) -> int:
    """Return the multiple, in pixels, that height and width of a segmenter's images should be of.

    For smp it is the output stride of the encoder, also for the architectures that take other sizes, since these too
    fail where an image is smaller than that. torchvision's take every size. Those of transformers take 32, or a common
    multiple of that and of their patches. A model of unknown origin gets that of the known ones it contains, else 32.

    Args:
        model: any segmenter; wrappers of `torch.compile` and DistributedDataParallel are looked through.

    Returns:
        At least 1.
    """
    found = list(_known_strides(unwrap(model)))
    return math.lcm(*found) if found else _USUAL_STRIDE


def pad_to_multiple(images: Tensor, stride: int, padding: Padding = "zeros") -> Tensor:
    """Pad images (B, C, H, W) on the right and at the bottom to the next multiples of `stride`.

    With "reflect" the image is mirrored at its last row and column, as often as it takes.
    """
    if stride == 1:
        return images
    height, width = images.shape[-2:]
    down, right = -height % stride, -width % stride
    if padding == "zeros":
        return F.pad(images, (0, right, 0, down))
    rows = _mirrored(height, height + down, images.device)
    columns = _mirrored(width, width + right, images.device)
    return images.index_select(-2, rows).index_select(-1, columns)


def class_map(output: Any, classes: int | None = None) -> Tensor:
    """Return the logits (B, K, h, w) in what a segmenter returned.

    Args:
        output: a tensor, a mapping with "out", or an object with `logits`.
        classes: K; None takes any.

    Raises:
        TypeError: if there are none, or of other classes.
    """
    logits = select_tensor(output)
    if logits is None or logits.ndim != 4 or classes not in (None, logits.shape[1]):
        kind = type(output).__name__ if logits is None else f"shape {tuple(logits.shape)}"
        wanted = "" if classes is None else f" of {classes} classes"
        raise TypeError(
            f"the model returned {kind} instead of a class map{wanted}: it must return (B, {classes or 'K'}, h, w), a "
            "mapping with 'out', or an object with logits"
        )
    return logits


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a class map (B, K, h, w) to `size` (H, W), bilinearly, with the corners of pixels aligned as in images."""
    # An exported program keeps the interpolation, so that it holds for sizes other than that of the example.
    if not torch.compiler.is_exporting() and tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _known_strides(module: nn.Module) -> Iterator[int]:
    if isinstance(module, AnySize):
        yield 1  # whatever it needs inside
        return
    origins = {parent.__module__ for parent in type(module).__mro__}
    if "segmentation_models_pytorch.base.model" in origins:
        encoder: Any = module.encoder
        yield int(encoder.output_stride) * _HALVED_FURTHER.get(type(module).__name__, 1)
    elif any(origin.startswith("torchvision.models.segmentation.") for origin in origins):
        yield 1
    elif any(origin.startswith("transformers.models.") for origin in origins):
        yield math.lcm(_USUAL_STRIDE, *_patch_sizes(module))
    for child in module.children():
        yield from _known_strides(child)


def _patch_sizes(module: nn.Module) -> list[int]:
    config = getattr(module, "config", None)
    sizes = [getattr(part, "patch_size", None) for part in (config, getattr(config, "backbone_config", None))]
    return [size for size in sizes if isinstance(size, int)]


def _mirrored(size: int, padded: int, device: torch.device) -> Tensor:
    """Index (padded,) of the pixels 0, 1, ..., size - 1, size - 2, ..., 1, 0, 1, ..."""
    index = torch.arange(padded, device=device)
    period = torch.full_like(index, max(2 * (size - 1), 1))  # a tensor: ONNX has no remainder by a dynamic size
    index = index % period
    return torch.minimum(index, period - index)


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    _rename(state, f"{prefix}model.", prefix)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    _rename(state, prefix, f"{prefix}model.")


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    # All are taken out before one is put back, since the segmenter may itself have a part called "model".
    taken = {key: state.pop(key) for key in list(state) if key.startswith(old)}
    state.update({new + key.removeprefix(old): value for key, value in taken.items()})
