"""Object detectors of Hugging Face transformers, behind the interface of torchvision's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.models.extras import require
from diffkd.models.from_transformers import _first_line, keep_constants, warn_of_random_weights

# Models with a padding mask, so that images keep their aspect ratio; boxes are relative to the image without padding.
_MASKED = ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")


class TransformersDetector(nn.Module):
    """A detector of transformers that is called as torchvision's are.

    Args:
        model: takes `pixel_values`, `pixel_mask` and `labels`; returns `loss`, `logits` (B, Q, K) or, with one more for
            "no object", (B, Q, K + 1), and `pred_boxes` (B, Q, 4): centre, width and height relative to the image.
        num_classes: K, the number of classes without background.
        transform: torchvision's: resizes, normalises and pads images, and resizes the boxes of targets.
        masked: give the model a mask of the padding; else the transform must pad nothing.
    """

    def __init__(self, model: nn.Module, num_classes: int, transform: nn.Module, masked: bool) -> None:
        super().__init__()
        self.transform = transform
        self.model = model
        self.num_classes = num_classes
        self.masked = masked

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        """Return {"loss": the model's loss} in training, the detections in evaluation.

        Args:
            images: B of (3, H, W) in [0, 1], each of its own size.
            targets: B of `boxes` (n, 4), left, top, right, bottom in pixels, and `labels` (n,) in 1..K. Ignored in
                evaluation.

        Returns:
            In evaluation B mappings of `boxes` (Q, 4) in pixels of the image, `labels` (Q,) in 1..K and `scores` (Q,),
            best first: as many as the model has queries.

        Raises:
            ValueError: if there are no targets in training.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training needs targets: give them, or call eval() first")
        batch, resized = self.transform(list(images), list(targets) if self.training and targets is not None else None)
        arguments: dict[str, Any] = {"pixel_values": batch.tensors}
        if self.masked:
            arguments["pixel_mask"] = padding_mask(batch.tensors, batch.image_sizes)
        if resized is not None:
            arguments["labels"] = [
                {"class_labels": target["labels"] - 1, "boxes": _relative(target["boxes"], size)}
                for target, size in zip(resized, batch.image_sizes, strict=True)
            ]
            return {"loss": self._loss(arguments)}
        output = self.model(**arguments)
        found = []
        for logits, boxes, image in zip(output.logits, output.pred_boxes, images, strict=True):
            one = self.detections(logits[None].float(), boxes[None].float(), image.shape[-2:])
            found.append(dict(zip(("boxes", "scores", "labels"), (part[0] for part in one), strict=True)))
        return found

    def _loss(self, arguments: dict[str, Any]) -> Tensor:
        """Return the model's loss, NaN if its predictions are not finite, for which its box matching would raise."""
        try:
            # Its loss_dict holds the same terms without their weights.
            loss: Tensor = self.model(**arguments).loss
        except (ValueError, RuntimeError):
            output = self.model(**{name: value for name, value in arguments.items() if name != "labels"})
            if output.logits.isfinite().all() and output.pred_boxes.isfinite().all():
                raise
            loss = output.logits.sum() * math.nan
        return loss

    def feature_backbone(self) -> nn.Module:
        """Return the model's backbone: from images and their mask to a list of pairs, map (B, C, h, w) and mask.

        Raises:
            ValueError: if the model has no backbone of its own, apart from its encoder.
        """
        backbone = getattr(getattr(self.model, "model", None), "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ValueError(
                f"{type(self.model).__name__} has no module model.backbone whose maps could be distilled: take a "
                "detector that has, such as RT-DETR, D-FINE or DETR"
            )
        return backbone

    def detections(self, logits: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the detections in a batch of outputs, as many as there are queries, best first.

        Args:
            logits: (B, Q, K) or, with one more for "no object", (B, Q, K + 1).
            boxes: (B, Q, 4) centre, width and height relative to the image.
            size: (H, W) of the images, in pixels.

        Returns:
            Boxes (B, Q, 4) in pixels, scores (B, Q), labels (B, Q) in 1..K.
        """
        queries, columns = logits.shape[1:]
        if columns > self.num_classes:  # one class or none per query
            scores, labels = logits.softmax(-1)[..., : self.num_classes].max(-1)
            scores, query = scores.sort(descending=True)
            labels = labels.gather(1, query)
        else:  # classes are independent: the best of all pairs of query and class
            scores, best = logits.sigmoid().flatten(1).topk(queries)
            labels, query = best % columns, best // columns
        height, width = size
        x, y, w, h = boxes.gather(1, query[..., None].expand(-1, -1, 4)).unbind(-1)
        corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), dim=-1).clamp(0, 1)
        return corners * corners.new_tensor([width, height] * 2), scores, labels + 1


def padding_mask(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Return (B, H, W) int64, 1 for the pixels of images of `sizes` in a batch (B, 3, H, W), 0 for padding."""
    mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.int64, device=images.device)
    for one, (height, width) in zip(mask, sizes, strict=True):
        one[:height, :width] = 1
    return mask


def build_transformers_detector(
    name: str,
    num_classes: int,
    *,
    min_size: Sequence[int],
    max_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pretrained: bool,
) -> TransformersDetector:
    """Build an object detector of transformers; code that comes with a model is never run.

    Models that take a padding mask (DETR and variants) get images of any shape, resized as in torchvision. All others
    (RT-DETR, D-FINE, YOLOS, ...) get squares, as in their training: of the last `min_size`, rounded up to a multiple of
    32 and of the model's patches.

    Args:
        name: a folder with config.json (and model.safetensors for its weights), or a name on the Hub.
        num_classes: number of classes without background.
        min_size, max_size, mean, std: as for :func:`diffkd.models.detectors.load`.
        pretrained: load the weights, from safetensors only; else only the configuration is read and all weights are
            random. A layer that the weights do not fill starts from random weights and a warning names it.

    Returns:
        The model, in training mode and float32.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        ValueError: if there is no such model, it is no object detector, or it has no safetensors.
    """
    transformers = require("transformers", "hf", f"detector 'hf/{name}'")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, num_labels=num_classes)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"detector 'hf/{name}' has no readable configuration ({_first_line(error)}): give a folder with "
            "config.json, or the name of a model on the Hub"
        ) from error
    factory = transformers.AutoModelForObjectDetection
    try:
        if pretrained:
            model, report = factory.from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
            warn_of_random_weights(name, report)
            if getattr(model.config, "use_pretrained_backbone", False):
                model.config.use_pretrained_backbone = False  # which would fetch weights
            keep_constants(model, factory)
        else:
            if getattr(config, "use_pretrained_backbone", False):
                config.use_pretrained_backbone = False  # which would fetch weights
            model = factory.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"detector 'hf/{name}' cannot be built ({_first_line(error)}): it must be an object detector whose "
            "weights, if asked for, are safetensors"
        ) from error
    masked = config.model_type in _MASKED
    patch = getattr(getattr(config, "backbone_config", None) or config, "patch_size", 1)
    divisor = math.lcm(32, patch) if isinstance(patch, int) else 32
    side = divisor * math.ceil(min_size[-1] / divisor)
    transform = require("torchvision.models.detection.transform", "train", f"detector 'hf/{name}'")
    resize = transform.GeneralizedRCNNTransform(
        tuple(min_size),
        max_size,
        list(mean),
        list(std),
        size_divisible=32 if masked else 1,
        fixed_size=None if masked else (side, side),
    )
    return TransformersDetector(model, num_classes, resize, masked).train()


def _relative(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return corners (n, 4) in pixels of an image of `size` as centre, width and height relative to it."""
    left, top, right, bottom = (boxes / boxes.new_tensor([size[1], size[0]] * 2)).unbind(-1)
    return torch.stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), dim=-1)
