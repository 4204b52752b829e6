"""What is measured: pairs of networks with the layers that are distilled, and single features of dense prediction."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from diffkd import FeatureShape


@dataclass(frozen=True)
class Case:
    """One situation in which distillation is priced.

    Attributes:
        title: for tables.
        batch: images per step.
        size: edge of the square images in pixels, or of the feature as (H, W).
        student, teacher: build the networks; None: the features alone are distilled, without networks.
        layer: name of the distilled feature in both, the output aside.
        classes: length of the logits.
        channels: of the feature, where there are no networks.
        ae_channels: width of the autoencoder of the feature.
        steps: denoising steps (NFE).
        pairs: how many feature pairs.
    """

    title: str
    batch: int
    size: int | tuple[int, int]
    student: Callable[[], nn.Module] | None = None
    teacher: Callable[[], nn.Module] | None = None
    layer: str = ""
    classes: int = 0
    channels: int = 0
    ae_channels: int | None = None
    steps: int = 5
    pairs: int = 1

    @property
    def has_networks(self) -> bool:
        """Whether whole networks are trained, rather than features alone."""
        return self.student is not None

    @property
    def feature(self) -> FeatureShape:
        """Shape of the feature where there are no networks."""
        if not isinstance(self.size, tuple):
            raise ValueError(f"case {self.title!r} has networks: their features follow from them")
        return FeatureShape(self.channels, self.size)

    def smaller(self) -> "Case":
        """Return the case with a batch of 2 and, without networks, an eighth of the size: for a quick look."""
        size = self.size if isinstance(self.size, int) else (max(1, self.size[0] // 8), max(1, self.size[1] // 8))
        return replace(self, batch=2, size=size, ae_channels=self.ae_channels and 32)


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18()
    return model


def _resnet34() -> nn.Module:
    from torchvision.models import resnet34

    model: nn.Module = resnet34()
    return model


def _resnet20() -> nn.Module:
    from diffkd.models import load_model

    return load_model("cifar/resnet20", num_classes=100)


def _resnet56() -> nn.Module:
    from diffkd.models import load_model

    return load_model("cifar/resnet56", num_classes=100)


_IMAGENET = Case("", 16, 64, _resnet18, _resnet34, "layer4", 1000, ae_channels=1024)

CASES = {
    "imagenet": replace(_IMAGENET, title="ResNet-34 -> ResNet-18, 64 px, AE 1024 + logits 1000"),
    "imagenet224": replace(_IMAGENET, title="ResNet-34 -> ResNet-18, 224 px, AE 1024 + logits 1000", size=224, batch=4),
    "cifar": Case("ResNet-56 -> ResNet-20, 32 px, feature + logits 100", 64, 32, _resnet20, _resnet56, "layer3", 100),
    "fpn": Case("one FPN level, 256 x 80 x 124", 2, (80, 124), channels=256),
    "segmentation": Case("class map of a segmenter, 19 x 65 x 129", 4, (65, 129), channels=19),
}
