"""Detectors as one graph of tensors, for export with images of a fixed size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.models.detectors.from_transformers import TransformersDetector, padding_mask
from diffkd.models.extras import require

_SMALLEST = 1e-2  # pixels; torchvision drops the boxes of Faster R-CNN that are smaller


class DetectorGraph(nn.Module):
    """A detector of torchvision that `torch.export` can follow, with the same detections.

    torchvision's code chooses its implementation of NMS by the number of candidates, which cannot be exported. This
    module uses one implementation of NMS, without data-dependent branches.

    Args:
        detector: RetinaNet, FCOS or Faster R-CNN of torchvision, in evaluation mode; shared, not copied. Its score
            threshold becomes the buffer `score_threshold`, which stays changeable in the exported file.

    Raises:
        ValueError: if the detector is of another kind.
    """

    score_threshold: Tensor

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        kinds = require("torchvision.models.detection", "train", "exporting a detector")
        if not isinstance(detector, (kinds.RetinaNet, kinds.FCOS, kinds.FasterRCNN)):
            raise ValueError(
                f"{type(detector).__name__} cannot be exported as a graph, only torchvision's RetinaNet, FCOS and "
                "Faster R-CNN and the detectors of transformers can: export it as .safetensors"
            )
        self.detector: Any = detector
        self.two_stages = isinstance(detector, kinds.FasterRCNN)
        heads: Any = detector.roi_heads if self.two_stages else detector
        self.limit: int = heads.detections_per_img
        self.overlap: float = heads.nms_thresh
        self.register_buffer("score_threshold", torch.tensor(float(heads.score_thresh)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find objects.

        Args:
            images: (1, 3, H, W) in [0, 1].

        Returns:
            `boxes` (n, 4), left, top, right, bottom in pixels of the image; `scores` (n,), best first; `labels` (n,).
        """
        batch, _ = self.detector.transform([images[0]], None)
        size: tuple[int, int] = batch.image_sizes[0]
        maps = self.detector.backbone(batch.tensors)
        find = self._two_stages if self.two_stages else self._one_stage
        boxes, scores, labels, valid = find(batch, maps, size)
        chosen = torch.where(valid & (scores > self.score_threshold))[0]
        boxes, scores, labels = boxes[chosen], scores[chosen], labels[chosen]
        kept = suppress(boxes, scores, labels, size, self.overlap)[: self.limit]
        height, width = images.shape[-2:]
        scale = boxes.new_tensor([width / size[1], height / size[0]] * 2)
        return boxes[kept] * scale, scores[kept], labels[kept]

    def _one_stage(self, batch: Any, maps: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the best candidates of each level: boxes (n, 4), scores (n,), labels (n,), and which count (n,)."""
        levels = list(maps.values())
        output = self.detector.head(levels)
        anchors: Tensor = self.detector.anchor_generator(batch, levels)[0]
        scores = output["cls_logits"][0].sigmoid()  # (anchors, classes)
        centred = output.get("bbox_ctrness")  # FCOS: how near the centre of an object
        if centred is not None:
            scores = torch.sqrt(scores * centred[0].sigmoid())
        coder = self.detector.box_coder
        decode = coder.decode_single if centred is None else coder.decode
        classes = scores.shape[1]
        cells = [level.shape[-2] * level.shape[-1] for level in levels]
        counts = [cell * (len(anchors) // sum(cells)) for cell in cells]
        found = []
        for here, shifts, boxes in zip(
            torch.split(scores, counts),
            torch.split(output["bbox_regression"][0], counts),
            torch.split(anchors, counts),
            strict=True,
        ):
            best, index = here.flatten().topk(min(self.detector.topk_candidates, here.numel()))
            anchor = index // classes
            found.append((clip(decode(shifts[anchor], boxes[anchor]), size), best, index % classes))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return boxes, scores, labels, torch.ones_like(scores, dtype=torch.bool)

    def _two_stages(self, batch: Any, maps: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each class's box in each proposal, likewise."""
        heads = self.detector.roi_heads
        proposals = self._proposals(batch, list(maps.values()), size)
        features = heads.box_head(heads.box_roi_pool(maps, [proposals], [size]))
        logits, shifts = heads.box_predictor(features)
        classes = logits.shape[1]
        boxes = clip(heads.box_coder.decode(shifts, [proposals]), size)[:, 1:].reshape(-1, 4)  # without the background
        scores = logits.softmax(-1)[:, 1:].reshape(-1)
        labels = torch.arange(1, classes, device=logits.device).repeat(len(proposals))
        return boxes, scores, labels, large(boxes, _SMALLEST)

    def _proposals(self, batch: Any, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the first stage's boxes (n, 4), filled up to always the same number with boxes of no size."""
        rpn = self.detector.rpn
        objectness, shifts = rpn.head(levels)
        counts = [level[0].numel() for level in objectness]
        every: Tensor = rpn.anchor_generator(batch, levels)[0]
        anchors = torch.split(every, counts)
        found = []
        for number, (logits, shift, boxes) in enumerate(zip(objectness, shifts, anchors, strict=True)):
            per_cell = logits.shape[1]
            flat = logits[0].permute(1, 2, 0).reshape(-1)  # (H, W, A)
            shift = shift[0].reshape(per_cell, 4, *shift.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4)
            best, index = flat.topk(min(rpn.pre_nms_top_n(), flat.numel()))
            decoded = rpn.box_coder.decode_single(shift[index], boxes[index])
            found.append((clip(decoded, size), best.sigmoid(), torch.full_like(index, number)))
        boxes, scores, origins = (torch.cat(parts) for parts in zip(*found, strict=True))
        chosen = torch.where(large(boxes, rpn.min_size) & (scores >= rpn.score_thresh))[0]
        boxes, scores, origins = boxes[chosen], scores[chosen], origins[chosen]
        kept = boxes[suppress(boxes, scores, origins, size, rpn.nms_thresh)]
        # What follows wants a fixed number; boxes of no size stay such and are dropped in the end.
        slots = min(rpn.post_nms_top_n(), sum(len(part[0]) for part in found))
        filled = torch.cat([kept, kept.new_zeros(slots, 4)])
        return filled[torch.arange(slots, device=filled.device)]


class QueryDetectorGraph(nn.Module):
    """A detector of transformers that `torch.export` can follow, for batches of images of one size.

    Args:
        detector: in evaluation mode; shared, not copied.
        size: (H, W) of the images, in pixels.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor

    def __init__(self, detector: TransformersDetector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        transform: Any = detector.transform
        batch, _ = transform([torch.zeros(3, *size)], None)
        self.resized: tuple[int, int] = batch.image_sizes[0]
        height, width = batch.tensors.shape[-2:]
        self.padding = (0, width - self.resized[1], 0, height - self.resized[0])
        self.register_buffer("mean", torch.tensor(transform.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.image_std)[:, None, None])
        self.register_buffer("mask", padding_mask(batch.tensors, batch.image_sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find objects.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            `boxes` (B, Q, 4), left, top, right and bottom in pixels; `scores` (B, Q), best first; `labels`
            (B, Q). Q is the number of the model's queries.
        """
        given = (images - self.mean) / self.std
        if tuple(given.shape[-2:]) != self.resized:
            given = F.interpolate(given, self.resized, mode="bilinear", align_corners=False)
        arguments = {"pixel_values": F.pad(given, self.padding)}
        if self.detector.masked:
            arguments["pixel_mask"] = self.mask.expand(images.shape[0], -1, -1)
        output = self.detector.model(**arguments)
        return self.detector.detections(output.logits.float(), output.pred_boxes.float(), images.shape[-2:])


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, size: tuple[int, int], overlap: float) -> Tensor:
    """Return the indices of the boxes (n, 4) kept by NMS within each group, best first.

    Boxes are shifted by group, so that those of different groups never overlap.
    """
    apart = groups.to(boxes) * (max(size) + 1)
    kept: Tensor = require("torchvision.ops", "train", "a detector").nms(boxes + apart[:, None], scores, overlap)
    return kept


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (..., 4) cut at the edges of an image of `size` (H, W)."""
    height, width = size
    left, top, right, bottom = boxes.unbind(-1)
    horizontal, vertical = (
        (left.clamp(0, width), right.clamp(0, width)),
        (top.clamp(0, height), bottom.clamp(0, height)),
    )
    return torch.stack((horizontal[0], vertical[0], horizontal[1], vertical[1]), dim=-1)


def large(boxes: Tensor, smallest: float) -> Tensor:
    """Return which boxes (n, 4) are at least so many pixels wide and high."""
    return (boxes[:, 2] - boxes[:, 0] >= smallest) & (boxes[:, 3] - boxes[:, 1] >= smallest)
