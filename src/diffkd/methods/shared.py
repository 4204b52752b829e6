"""One method, such as one denoiser, for several pairs of layers."""

from collections.abc import Sequence

from torch import nn

from diffkd.methods import MethodFactory
from diffkd.shape import FeatureShape

_Key = tuple[tuple[int, bool, str], ...]


class Shared:
    """A factory that builds a method once, and hands out the same module for every pair of the same channels.

    On a detector's feature pyramid all levels then share one denoiser, one projection and one set of running
    statistics; without it each level has its own. For methods whose parameters do not depend on the size of the maps,
    as those of DiffKD, FitNet, MGD and FGD. In YAML:

        method:
          class_path: diffkd.methods.shared.Shared
          init_args: {method: {class_path: diffkd.DiffKD, init_args: {kd_weight: 5.0}}}

    Automatic pairing makes a fresh one for each distiller; pairs that are written out share what they are given.

    Args:
        method: the factory, such as a method's class.

    >>> from diffkd import FeatureShape, FitNet
    >>> shared = Shared(FitNet)
    >>> shared(FeatureShape(8, (4, 4)), FeatureShape(6, (4, 4))) is shared(FeatureShape(8, (2, 2)), FeatureShape(6))
    False
    >>> shared(FeatureShape(8, (4, 4)), FeatureShape(6, (4, 4))) is shared(
    ...     FeatureShape(8, (2, 2)), FeatureShape(6, (2, 2))
    ... )
    True
    """

    def __init__(self, method: MethodFactory) -> None:
        if isinstance(method, nn.Module):
            raise TypeError(
                f"{type(method).__name__} is built already and needs no Shared: give it to the pairs itself"
            )
        self.func = method  # named like that of a partial call, since what the method wants is looked for behind it
        self._built: dict[tuple[_Key, _Key], nn.Module] = {}

    def __call__(
        self, student: FeatureShape | Sequence[FeatureShape], teacher: FeatureShape | Sequence[FeatureShape]
    ) -> nn.Module:
        """Return the method for these shapes: the same module for the same channels, whatever the sizes."""
        key = _key(student), _key(teacher)
        if key not in self._built:
            self._built[key] = self.func(student, teacher)  # type: ignore[arg-type]  # lists, where it wants levels
        return self._built[key]

    def fresh(self) -> "Shared":
        """Return one that has built nothing yet."""
        return Shared(self.func)


def _key(shapes: FeatureShape | Sequence[FeatureShape]) -> _Key:
    listed = [shapes] if isinstance(shapes, FeatureShape) else shapes
    return tuple((shape.channels, shape.is_map, shape.role) for shape in listed)
