"""AT: match spatial attention maps."""

from typing import ClassVar

from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32, mse
from diffkd.features.shape import FeatureShape, Resizing, Want
from diffkd.methods.inputs import check_same_grid, require_maps, unit


class AT(nn.Module):
    """Attention transfer (Zagoruyko, Komodakis, ICLR 2017), for one pair of maps.

    `mean((Q_s / |Q_s| - Q_t / |Q_t|)^2)` over images and positions, where Q sums `|F|^p` over the channels. The paper's
    factor `beta / 2 * sum` becomes the mean, as in the authors' code; their beta of 1000 is the default weight, also in
    RepDistiller and mdistiller, on every stage of the network. If sizes differ, the larger map is averaged to the
    smaller.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map. Channels may differ.
        power: p of the attention map; 2 in paper and code.
        weight: factor of the loss.

    Raises:
        ValueError: if one of them is a vector.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"stages"})
    resizes: ClassVar[Resizing] = "larger"

    def __init__(
        self, student: FeatureShape, teacher: FeatureShape, *, power: float = 2.0, weight: float = 1000.0
    ) -> None:
        super().__init__()
        require_maps("AT", student, teacher)
        self.power, self.weight = power, weight

    def forward(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"kd": loss} for maps (B, Cs, H, W) and (B, Ct, H, W)."""
        check_same_grid(student, teacher)
        return {"kd": self.weight * mse(self._attention(student), self._attention(teacher.detach()))}

    def _attention(self, feature: Tensor) -> Tensor:
        strength = at_least_float32(feature).abs().pow(self.power).mean(dim=1)
        return unit(strength.flatten(1))
