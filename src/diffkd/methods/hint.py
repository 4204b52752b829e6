"""Hint: FitNet's hint on the second stage, as in the CIFAR-100 benchmarks."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import mse
from diffkd.diffusion.modules import BatchNorm
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import like_parameters, require_maps


class Hint(nn.Module):
    """FitNet as in RepDistiller and mdistiller, whose numbers Table 9 of the DiffKD paper quotes.

    Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015. Mean squared error between the teacher's second stage
    and a regression of the student's: one convolution, batch normalisation, ReLU. The convolution outputs the teacher's
    size: 3x3 with stride 2 for half the size, transposed 4x4 with stride 2 for twice the size, otherwise without
    padding, the kernel 1 + the difference of sizes. :class:`~diffkd.FitNet` is the row "MSE" of the DiffKD paper.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map.
        weight: factor of the loss; 100 in RepDistiller and mdistiller.

    Raises:
        ValueError: if one of them is a vector, or the student's map is smaller than the teacher's and not half of it.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"second stage"})
    resizes: ClassVar[Resizing] = "none"

    def __init__(self, student: FeatureShape, teacher: FeatureShape, *, weight: float = 100.0) -> None:
        super().__init__()
        require_maps("Hint", student, teacher)
        channels = student.channels, teacher.channels
        (height, width), (to_height, to_width) = student.size, teacher.size
        if (height, width) == (2 * to_height, 2 * to_width):
            convolution: nn.Module = nn.Conv2d(*channels, 3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (to_height, to_width):
            convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
        elif height >= to_height and width >= to_width:
            convolution = nn.Conv2d(*channels, (1 + height - to_height, 1 + width - to_width))
        else:
            raise ValueError(
                f"Hint has no convolution from a map of {height}x{width} to one of {to_height}x{to_width}: pair stages "
                "of equal, half or twice the size, or take FitNet"
            )
        self.regression = nn.Sequential(convolution, BatchNorm(teacher.channels), nn.ReLU())
        self.weight = weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, Hs, Ws) and (B, Ct, Ht, Wt) of the sizes given to the constructor."""
        return {"kd": self.weight * mse(self.regression(like_parameters(student, self)), teacher.detach())}
