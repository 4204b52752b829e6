"""FGD: match foreground and background separately under the teacher's attention, and their global relation."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32, attentions
from diffkd.features.shape import FeatureShape, Want
from diffkd.methods.inputs import align, check_same_grid, like_parameters, require_maps


class FGD(nn.Module):
    """Focal and global distillation for detectors (Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, CVPR 2022), for one level.

    "kd" is the focal feature loss, squared errors weighted by the teacher's attention over positions and channels and
    divided by the area of the enclosing box, or of the background; "attention" the difference of the attentions;
    "relation" the squared error of the maps, each after a global context block. All are sums over an image, averaged
    over the batch.

    Boxes are fractions of the padded batch, which the maps cover; the authors' code scales them by each image's own
    size, which shifts them if a batch is padded. The authors, like those of MGD, also clip the gradient at 35 and
    initialise the student's neck and head from the teacher's (`diffkd fit --gradient_clip 35 --inherit_neck_and_head`).

    The defaults are the paper's for anchor-based one-stage detectors (RetinaNet). Anchor-free: temperature 0.8 and
    weights 1.6e-3, 8e-4, 8e-4, 8e-6. Two-stage: 5e-5, 2.5e-5, 5e-5, 5e-7.

    Args:
        student: the student's shape, a map, such as a level of its feature pyramid.
        teacher: the teacher's shape, a map.
        temperature: of the attention.
        foreground_weight: alpha.
        background_weight: beta.
        attention_weight: gamma.
        relation_weight: lambda.
        weight: factor of all losses.

    Raises:
        ValueError: if one of them is a vector, or `temperature` is not positive.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"stages"})
    tasks: ClassVar[frozenset[str]] = frozenset({"detection"})
    needs: ClassVar[tuple[str, ...]] = ("boxes",)

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        temperature: float = 0.5,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        require_maps("FGD", student, teacher)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.student_projection = align(student, teacher)
        self.student_context = GlobalContext(teacher.channels)
        self.teacher_context = GlobalContext(teacher.channels)
        self.temperature, self.weight = temperature, weight
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.attention_weight, self.relation_weight = attention_weight, relation_weight

    def forward(self, student: Tensor, teacher: Tensor, *, boxes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compare the maps.

        Args:
            student: (B, Cs, H, W).
            teacher: (B, Ct, H, W).
            boxes: for each image (n, 4), left, top, right and bottom of its objects as fractions of the (padded)
                input's width and height; n may be 0.

        Returns:
            {"kd": focal loss, "attention": loss, "relation": loss}.

        Raises:
            ValueError: if the number of sets of boxes is not the number of images.
        """
        check_same_grid(student, teacher)
        if len(boxes) != len(student):
            raise ValueError(f"FGD needs boxes for each of {len(student)} images, got {len(boxes)}")
        projected = self.student_projection(like_parameters(student, self))
        ours, theirs = at_least_float32(projected), at_least_float32(teacher.detach())
        weights = torch.stack([self._position_weights(of_image.to(ours), *ours.shape[2:]) for of_image in boxes])
        our_space, our_channels = attentions(ours, self.temperature)
        space, channels = attentions(theirs, self.temperature)
        focus = (weights * space)[:, None] * channels[:, :, None, None]
        relation = self.student_context(projected) - self.teacher_context(teacher.detach())
        attention = (our_space - space).abs().sum() + (our_channels - channels).abs().sum()
        factor = self.weight / len(student)
        return {
            "kd": factor * (focus * (ours - theirs).square()).sum(),
            "attention": factor * self.attention_weight * attention,
            "relation": factor * self.relation_weight * relation.square().sum(),
        }

    def _position_weights(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Return per position alpha / area of the smallest enclosing box, or beta / area of the background, (H, W)."""
        inside = box_weights(boxes, height, width)
        background = (inside == 0).to(inside.dtype)
        background = background / background.sum().clamp_min(1)
        return self.foreground_weight * inside + self.background_weight * background


class GlobalContext(nn.Module):
    """Global context block, (B, C, H, W) to the same shape in float32 or wider (Cao et al., GCNet, 2019).

    Adds to every position a transformed average of all, weighted by a learned attention; initially 0.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.attention.get_parameter("bias"), *self.transform[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus its context."""
        x = like_parameters(x, self)
        share = at_least_float32(self.attention(x)).flatten(2).softmax(dim=2)  # (B, 1, H * W)
        context = (at_least_float32(x).flatten(2) * share).sum(dim=2)
        transformed = self.transform(like_parameters(context, self))
        return at_least_float32(x) + at_least_float32(transformed)[:, :, None, None]


def box_weights(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return 1 / area of the smallest box at each position, (H, W), 0 outside of all.

    Args:
        boxes: (n, 4) left, top, right, bottom as fractions of the image. A box covers the positions from floor(left *
            W) to ceil(right * W), both included, as in the authors' code, and likewise vertically.
        height: H.
        width: W.
    """
    left, top, right, bottom = boxes.unbind(dim=1)
    left, right = (left * width).floor(), (right * width).ceil()
    top, bottom = (top * height).floor(), (bottom * height).ceil()
    rows = torch.arange(height, device=boxes.device, dtype=boxes.dtype)[:, None]
    columns = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    down = (rows >= top[:, None, None]) & (rows <= bottom[:, None, None])  # (n, H, 1)
    across = (columns >= left[:, None, None]) & (columns <= right[:, None, None])  # (n, 1, W)
    area = (right - left + 1) * (bottom - top + 1)
    inside = (down & across) / area[:, None, None]
    nothing = boxes.new_zeros(1, height, width)
    return torch.cat([nothing, inside]).amax(dim=0)
