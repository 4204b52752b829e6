"""Distillation methods, one a file: `(student feature, teacher feature) -> losses`.

A method is an `nn.Module` built as `Method(student_shape, teacher_shape, **options)` from two
:class:`~diffkd.FeatureShape`. Its forward takes the two features, (B, C, H, W) or (B, C), and returns a dict of scalar
losses, or a tuple with a field `losses` as :class:`DiffKD` does. Two class attributes say what it wants:

- `wants`: what automatic pairing gives it, a set of the words in :mod:`diffkd.shape`;
- `needs` (may be missing): names of further things that its forward takes by keyword, such as `("labels",)`; the caller
  of the distiller hands them over.
"""

from collections.abc import Callable

from torch import nn

from diffkd.methods.diffkd import DiffKD, DiffKDOutput
from diffkd.methods.dist import DIST
from diffkd.methods.fitnet import FitNet
from diffkd.methods.kd import KD
from diffkd.shape import FeatureShape

MethodFactory = Callable[[FeatureShape, FeatureShape], nn.Module]

__all__ = ["DIST", "KD", "DiffKD", "DiffKDOutput", "FitNet", "MethodFactory"]
