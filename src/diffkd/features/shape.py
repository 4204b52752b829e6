"""The shape of a feature, the argument of a method's constructor.

Also the values of `wants`, the features that a method gets from automatic pairing: "feature" (the last map before
pooling), "last block" (the same, but of a teacher whose head widens the last stage's map by a convolution, such as
MobileNets and EfficientNets, that stage's map), "logits", "stages" (the last map of every resolution, each pair with a
method of its own), "levels" (the same maps, all given to one method as lists), or "class map" (the scores by position
of a model for dense prediction, and the last feature of any other), "box outputs" (a detector's class scores and box
regression, given to one method as a list of two), "last stage" (the last of the stages, which is not the head's
convolution), "second stage" (the second of the stages that both models have in common), "pooled" (beside "levels": the
last map before pooling as one more level), "embedding" (beside "feature", of models whose outputs are representations:
the pooled output, and nothing of other models), "stages to logits" (the student's stages and logits, and the teacher's
logits, given to one method as lists), or "feature to logits" (the student's last map and logits, and the teacher's
logits, likewise).

And the values of `resizes`, the handling of maps of different size: "student", the student's map is resized to the
teacher's size (by averaging to a smaller, bilinearly to a larger size); "larger", the larger one is averaged to the
smaller; "none", no resizing.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["feature", "logits"]
Want = Literal[
    "feature",
    "last block",
    "logits",
    "stages",
    "levels",
    "class map",
    "box outputs",
    "last stage",
    "second stage",
    "pooled",
    "embedding",
    "stages to logits",
    "feature to logits",
]
Resizing = Literal["student", "larger", "none"]


@dataclass(frozen=True)
class FeatureShape:
    """Channels, spatial size and role of a feature, from which methods are built.

    Args:
        channels: C, the number of channels of a map (B, C, H, W) or of a vector (B, C).
        size: (H, W) of a map in cells, () for a vector. If sizes vary between batches, that of the probe.
        role: "logits" if the tensor holds class scores, "feature" otherwise.

    Raises:
        ValueError: if `channels` is not positive or `size` has neither zero nor two entries.
    """

    channels: int
    size: tuple[int, ...] = ()
    role: Role = "feature"

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"a feature needs at least 1 channel, got {self.channels}")
        if len(self.size) not in (0, 2):
            raise ValueError(f"size is (height, width) for a map or () for a vector, got {self.size}")

    @property
    def is_map(self) -> bool:
        """Whether the feature has two spatial dimensions."""
        return len(self.size) == 2

    def __str__(self) -> str:
        return "x".join(str(n) for n in (self.channels, *self.size))


def channels_of(feature: int | FeatureShape) -> int:
    """Return the channel count of `feature`, given as a count or as a shape."""
    return feature.channels if isinstance(feature, FeatureShape) else FeatureShape(feature).channels
