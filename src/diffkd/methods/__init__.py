"""Distillation methods, one a file: `(student feature, teacher feature) -> losses`.

A method is an `nn.Module` built as `Method(student_shape, teacher_shape, **options)` from two
:class:`~diffkd.FeatureShape`. Its forward takes the two features, (B, C, H, W) or (B, C), and returns a dict of scalar
losses, or a tuple with a field `losses` as :class:`DiffKD` does. Class attributes say what it wants:

- `wants`: what automatic pairing gives it, a set of the words in :mod:`diffkd.features.shape`;
- `before_activation` (may be missing): for which sides of stages and levels automatic pairing takes the map before its
  activation, a set of "student" and "teacher";
- `resizes` (may be missing): what is done about two maps of different size before the method gets them: "student", the
  student's is brought to the teacher's (the default), "larger", the larger is averaged to the smaller, or "none";
- `take_norms` (may be missing): is called once with the BatchNorm right before the teacher's activation for each layer
  that is tapped there, None for others;
- `least_classes` (may be missing): the fewest classes of logits that it can learn from, which automatic pairing then
  heeds;
- `least_batch` (may be missing): the fewest images of a batch that it can learn from, as it relates them;
- `tasks` (may be missing): what it is for, of "classification", "detection" and "segmentation"; `diffkd fit` refuses it
  for others;
- `needs` (may be missing): names of further things that its forward takes by keyword, such as `("labels",)`; the caller
  of the distiller hands them over. One that needs "indices" and takes `samples=None` is told by `diffkd fit` how many
  training images there are, and one that needs "labels" and takes `classes=None` how many classes.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from diffkd.methods.at import AT
from diffkd.methods.box_kd import BoxKD
from diffkd.methods.cirkd import CIRKD
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

# Of one feature on each side the shapes are a FeatureShape each, of several a list of them.
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
    "DiffKD",
    "DiffKDOutput",
    "FitNet",
    "Hint",
    "MasKD",
    "MethodFactory",
    "ReviewKD",
    "standardize",
]
