"""Distillation methods, one a file: `(student feature, teacher feature) -> losses`.

A method is an `nn.Module` built as `Method(student_shape, teacher_shape, **options)` from two
:class:`~diffkd.FeatureShape`. Its forward takes the two features, (B, C, H, W) or (B, C), and returns a dict of scalar
losses, or a tuple with a field `losses` as :class:`DiffKD` does. Class attributes say what it wants:

- `wants`: what automatic pairing gives it, a set of the words in :mod:`diffkd.features.shape`;
- `before_activation` (may be missing): for which sides of stages and levels automatic pairing takes the map before its
  activation, a set of "student" and "teacher";
- `resizes` (may be missing): how two maps of different size are resized before the method gets them: "student", the
  student's map to the teacher's size (the default), "larger", the larger map to the smaller size by averaging, or
  "none";
- `take_norms` (may be missing): a method that is called once with a list: for each teacher layer recorded before its
  activation the BatchNorm right before that activation, None for other layers;
- `least_classes` (may be missing): the smallest number of classes for which the method works on logits; automatic
  pairing respects it;
- `least_batch` (may be missing): the smallest batch size for which the method works;
- `tasks` (may be missing): the tasks it supports, of "classification", "detection", "segmentation" and
  "representation"; `diffkd fit` refuses it for others;
- `needs` (may be missing): names of keyword arguments of its forward besides the features, such as `("labels",)`; the
  caller of the distiller passes them. `diffkd fit` sets `samples=None` of a method that needs "indices" to the number
  of training images, and `classes=None` of one that needs "labels" to the number of classes.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from diffkd.methods.at import AT
from diffkd.methods.box_kd import BoxKD
from diffkd.methods.cirkd import CIRKD
from diffkd.methods.cosine import Cosine
from diffkd.methods.crd import CRD
from diffkd.methods.cwd import CWD
from diffkd.methods.diffkd import DiffKD, DiffKDOutput
from diffkd.methods.dist import DIST
from diffkd.methods.dkd import DKD
from diffkd.methods.fgd import FGD
from diffkd.methods.fitnet import FitNet
from diffkd.methods.fmkt import FMKT
from diffkd.methods.hint import Hint
from diffkd.methods.kd import KD, standardize
from diffkd.methods.maskd import MasKD
from diffkd.methods.mgd import MGD
from diffkd.methods.norm import NORM
from diffkd.methods.ofakd import OFAKD
from diffkd.methods.ofd import OFD
from diffkd.methods.pkd import PKD
from diffkd.methods.pkt import PKT
from diffkd.methods.reviewkd import ReviewKD
from diffkd.methods.rkd import RKD
from diffkd.methods.sp import SP
from diffkd.methods.srrl import SRRL
from diffkd.methods.vid import VID
from diffkd.methods.wttm import WTTM

# The arguments are one FeatureShape per side for a single feature, and lists of FeatureShape for several features.
MethodFactory = Callable[[Any, Any], nn.Module]

__all__ = [
    "AT",
    "CIRKD",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FGD",
    "FMKT",
    "KD",
    "MGD",
    "NORM",
    "OFAKD",
    "OFD",
    "PKD",
    "PKT",
    "RKD",
    "SP",
    "SRRL",
    "VID",
    "WTTM",
    "BoxKD",
    "Cosine",
    "DiffKD",
    "DiffKDOutput",
    "FitNet",
    "Hint",
    "MasKD",
    "MethodFactory",
    "ReviewKD",
    "standardize",
]
