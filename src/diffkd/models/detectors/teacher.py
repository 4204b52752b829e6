"""A detector as teacher: its features, and its heads' outputs for the student's images and proposals."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from diffkd.models.detectors.from_transformers import TransformersDetector, padding_mask


class DetectorTeacher(nn.Module):
    """Runs backbone and heads of a detector on images that the student's transform has already batched.

    Teacher and student then get the same pixels; two transforms would each draw their own size in training. It computes
    no proposals and selects no detections. The modules are the detector's own, under its own names ("backbone", "head",
    "roi_heads"), always in evaluation mode.

    Args:
        detector: torchvision's Faster R-CNN, RetinaNet or FCOS or one built like them (modules `backbone` and `head` or
            `roi_heads`), or a :class:`TransformersDetector`, for which only the backbone's features are available.
        heads: also run the head on the features. Otherwise the detector's heads are dropped.

    Raises:
        ValueError: if the detector has no such parts.
    """

    def __init__(self, detector: nn.Module, heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.takes_mask = isinstance(detector, TransformersDetector)
        kind = type(detector).__name__
        if isinstance(detector, TransformersDetector):
            if heads:
                raise ValueError(
                    f"the heads of {type(detector.model).__name__} answer its own queries, which no student shares: "
                    "distil its features only, or take a detector of torchvision"
                )
            self.backbone: nn.Module = detector.feature_backbone()
        elif isinstance(getattr(detector, "backbone", None), nn.Module):
            self.backbone = detector.get_submodule("backbone")
        else:
            raise ValueError(f"{kind} has no module 'backbone' whose features could be distilled: give it that name")
        if heads:
            parts = [part for part in ("roi_heads", "head") if isinstance(getattr(detector, part, None), nn.Module)]
            if not parts:
                raise ValueError(
                    f"{kind} has no module 'head' or 'roi_heads', so that only its features can be distilled"
                )
            self.add_module(parts[0], detector.get_submodule(parts[0]))
        self.eval()

    @property
    def needs_proposals(self) -> bool:
        """Whether the heads need the student's proposals, as those of Faster R-CNN do."""
        return hasattr(self, "roi_heads")

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> Mapping[str, Tensor]:
        """Return features and, if wanted, the heads' outputs.

        Args:
            images: (B, 3, H, W), resized, normalised and padded by the student's transform.
            image_sizes: height and width of each image without padding; None if nothing is padded.
            proposals: per image (n, 4), left, top, right, bottom in pixels of `images`: the input of the student's
                "roi_heads.box_roi_pool". For the heads of Faster R-CNN only.

        Returns:
            The features, (B, C, h, w), under the names of their levels ("0", "1", ..., "pool" or "p6", "p7"), then
            from a head `cls_logits` (B, N, K + 1), `bbox_regression` (B, N, 4) and of FCOS `bbox_ctrness` (B, N, 1);
            from RoI heads `class_logits` (R, K + 1) and `bbox_regression` (R, 4 (K + 1)) of all R proposals in order.

        Raises:
            ValueError: if sizes or proposals are not one per image, or proposals are needed and not given.
        """
        sizes = [(images.shape[-2], images.shape[-1])] * len(images) if image_sizes is None else list(image_sizes)
        if len(sizes) != len(images):
            raise ValueError(f"{len(sizes)} image_sizes for {len(images)} images: give one per image")
        features = self._features(images, sizes)
        if not self.heads:
            return features
        if not self.needs_proposals:
            return OrderedDict((*features.items(), *self.get_submodule("head")(list(features.values())).items()))
        if proposals is None or len(proposals) != len(images):
            raise ValueError(
                f"{0 if proposals is None else len(proposals)} lists of proposals for {len(images)} images: the heads "
                "of Faster R-CNN need the student's proposals of each image"
            )
        roi_heads = self.get_submodule("roi_heads")
        pooled = roi_heads.get_submodule("box_roi_pool")(features, list(proposals), sizes)
        class_logits, regression = roi_heads.get_submodule("box_predictor")(roi_heads.get_submodule("box_head")(pooled))
        return OrderedDict((*features.items(), ("class_logits", class_logits), ("bbox_regression", regression)))

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is: a teacher's statistics must not change."""
        return super().train(False)

    def _features(self, images: Tensor, sizes: list[tuple[int, int]]) -> OrderedDict[str, Tensor]:
        if self.takes_mask:
            pairs = self.backbone(images, padding_mask(images, sizes))
            return OrderedDict((str(level), map_) for level, (map_, _) in enumerate(pairs))
        features = self.backbone(images)
        return OrderedDict([("0", features)]) if isinstance(features, Tensor) else OrderedDict(features)
