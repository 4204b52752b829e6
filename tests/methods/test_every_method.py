"""What holds for all methods, whatever they compute."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffkd import DIST, FMKT, KD, NORM, OFAKD, PKD, WTTM, FeatureShape, FitNet, Hint, methods
from diffkd.methods.at import AT
from diffkd.methods.cirkd import CIRKD
from diffkd.methods.cosine import Cosine
from diffkd.methods.crd import CRD
from diffkd.methods.cwd import CWD
from diffkd.methods.dkd import DKD
from diffkd.methods.fgd import FGD
from diffkd.methods.maskd import MasKD
from diffkd.methods.mgd import MGD
from diffkd.methods.ofd import OFD
from diffkd.methods.pkt import PKT
from diffkd.methods.reviewkd import ReviewKD
from diffkd.methods.rkd import RKD
from diffkd.methods.sp import SP
from diffkd.methods.srrl import SRRL
from diffkd.methods.vid import VID

SMALL_MEMORIES = {"classes": 5, "pixel_memory": 100, "region_memory": 20, "pixel_contrast": 10, "region_contrast": 10}


@dataclass
class Case:
    method: type[nn.Module]
    channels: tuple[int, int] = (6, 8)
    sizes: tuple[tuple[int, ...], ...] = ((5, 3),)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def several(self):
        return "levels" in self.method.wants

    def build(self, **options):
        if self.method in (OFAKD, FMKT):
            ours, theirs = self.channels
            maps = [FeatureShape(ours, size) for size in self.sizes]
            scores = FeatureShape(theirs, (), "logits")
            return self.method([*maps, scores], [scores], **self.options, **options)
        role = "logits" if self.method in (KD, DKD, DIST, WTTM) else "feature"
        shapes = [[FeatureShape(c, size, role) for size in self.sizes] for c in self.channels]
        return self.method(*(shapes if self.several else (of[0] for of in shapes)), **self.options, **options)

    def features(self, batch=4, scale=1.0, dtype=torch.float32):
        if self.method in (OFAKD, FMKT):
            ours, theirs = self.channels
            maps = [scale * torch.randn(batch, ours, *size) for size in self.sizes]
            scores = [scale * torch.randn(batch, theirs) for _ in range(2)]
            return [[one.to(dtype) for one in (*maps, scores[0])], [scores[1].to(dtype)]]
        features = [[scale * torch.randn(batch, c, *size) for size in self.sizes] for c in self.channels]
        features = [[feature.to(dtype) for feature in of] for of in features]
        return features if self.several else [of[0] for of in features]

    def needed(self, method, batch=4):
        head = nn.Linear(self.channels[1], 5).to(next((p.dtype for p in method.parameters()), torch.float32))
        head.requires_grad_(False)
        grid = self.sizes[0] if self.method in (DKD, CIRKD) else ()
        everything = {
            "labels": torch.randint(0, 5, (batch, *grid)),
            "indices": torch.arange(batch),
            "boxes": [torch.tensor([[0.1, 0.2, 0.6, 0.9]])] * batch,
            "teacher_head": lambda x: head((x.mean(dim=(2, 3)) if x.ndim == 4 else x).to(head.weight.dtype)),
        }
        return {need: everything[need] for need in getattr(method, "needs", ())}


VECTOR = ((),)
CASES = [
    Case(KD, (7, 7), VECTOR),
    Case(KD, (7, 7), options={"standardize": True}),
    Case(DIST, (7, 7), VECTOR),
    Case(DIST, (7, 7), options={"standardize": True}),
    Case(Cosine),
    Case(Cosine, sizes=VECTOR),
    Case(FitNet),
    Case(FitNet, sizes=VECTOR),
    Case(FitNet, options={"standardize": True}),
    Case(DKD, (7, 7), VECTOR),
    Case(DKD, (7, 7), options={"standardize": True}),
    Case(SRRL),
    Case(SRRL, sizes=VECTOR),
    Case(AT),
    Case(SP),
    Case(SP, sizes=VECTOR),
    Case(RKD),
    Case(RKD, sizes=VECTOR),
    Case(PKT),
    Case(PKT, sizes=VECTOR),
    Case(VID),
    Case(VID, sizes=VECTOR),
    Case(CRD, options={"samples": 20, "negatives": 7}),
    Case(CRD, sizes=VECTOR, options={"samples": 20, "negatives": 7}),
    Case(ReviewKD, sizes=((9, 7), (5, 3), (1, 2))),
    Case(OFD, sizes=((9, 7), (5, 3))),
    Case(WTTM, (7, 7), VECTOR),
    Case(WTTM, (7, 7)),
    Case(Hint),
    Case(NORM),
    Case(PKD),
    Case(OFAKD, sizes=((9, 7), (5, 3))),
    Case(FMKT),
    Case(CWD),
    Case(MGD),
    Case(MGD, options={"drop": "channels"}),
    Case(FGD),
    Case(CIRKD, options=SMALL_MEMORIES),
    Case(MasKD, options={"token_steps": 0}),
]
# Those with tests of their own for all of this, as they take more than features.
ELSEWHERE = {"BoxKD", "DiffKD"}
# A method without a case here is tried on a map with its defaults.
CASES += [
    Case(method)
    for name, method in vars(methods).items()
    if name in methods.__all__ and isinstance(method, type) and issubclass(method, nn.Module)
    if name not in ELSEWHERE and not any(case.method is method for case in CASES)
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method.__name__}-{len(case.sizes[0])}d")


def total(losses):
    return torch.stack(list(losses.values())).sum()


def leaves(features):
    return features if isinstance(features, list) else [features]


def train_step(case, method, student, teacher, batch=4):
    for feature in leaves(student):
        feature.requires_grad_()
    losses = method(student, teacher, **case.needed(method, batch))
    assert "kd" in losses
    total(losses).backward()
    return losses


@every
@pytest.mark.parametrize("batch", [4, 1])
def test_losses_and_gradients_are_finite_and_reach_everything(case, batch):
    method = case.build()
    student, teacher = case.features(batch)
    for feature in leaves(teacher):
        feature.requires_grad_()
    losses = train_step(case, method, student, teacher, batch)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert all(feature.grad is not None and feature.grad.isfinite().all() for feature in leaves(student))
    assert all(feature.grad is None for feature in leaves(teacher))
    # A parameter without a gradient makes distributed training wait for ever.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast(case, dtype):
    method = case.build()
    student, teacher = case.features(scale=30.0, dtype=dtype)
    with torch.autocast("cpu", dtype):
        losses = train_step(case, method, student, teacher)
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters())


@every
def test_float64(case):
    method = case.build().double()
    losses = train_step(case, method, *case.features(dtype=torch.float64))
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in method.parameters())


@every
def test_pure_bfloat16(case):
    method = case.build().bfloat16()
    student, teacher = case.features(dtype=torch.bfloat16)
    losses = train_step(case, method, student, teacher)
    assert all(loss.isfinite() for loss in losses.values())


@every
def test_features_of_zero(case):
    method = case.build()
    student, teacher = case.features(scale=0.0)
    losses = train_step(case, method, student, teacher)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(feature.grad.isfinite().all() for feature in leaves(student))


@every
def test_the_weight_is_a_factor(case):
    student, teacher = case.features()
    light, heavy = case.build(weight=1.0), case.build(weight=4.0)
    heavy.load_state_dict(light.state_dict())
    needed = case.needed(light)
    results = []
    for method in (light, heavy):
        torch.manual_seed(1)
        results.append(method(student, teacher, **needed)["kd"])
    torch.testing.assert_close(results[1], 4 * results[0])  # a power of two rounds nothing


@every
def test_a_state_dict_carries_everything(case):
    method = case.build()
    needed = case.needed(method)
    for _ in range(3):
        method(*case.features(), **needed)
    torch.manual_seed(7)
    other = case.build()
    other.load_state_dict(method.state_dict())
    student, teacher = case.features()
    results = []
    for one in (method, other):
        torch.manual_seed(1)
        results.append(one(student, teacher, **needed))
    assert results[0] == results[1]


class NoFetching(TorchDispatchMode):
    """Raises where a value goes from the device to the host, or a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero")
        assert func._schema.name.removeprefix("aten::") not in forbidden, func
        return func(*args, **(kwargs or {}))


@every
def test_nothing_is_fetched_from_the_device(case):
    method = case.build()
    student, teacher = case.features()
    needed = case.needed(method)
    with NoFetching():
        total(method(student, teacher, **needed))


def test_the_guard_notices():
    with NoFetching(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


@every
def test_compiles_without_a_break_in_the_graph(case):
    method = case.build()
    student, teacher = case.features()
    needed = case.needed(method)
    torch.manual_seed(0)
    expected = method(student, teacher, **needed)
    fresh = case.build()
    fresh.load_state_dict(method.state_dict())
    try:
        losses = torch.compile(fresh, backend="eager", fullgraph=True)(student, teacher, **needed)
    finally:
        torch.compiler.reset()
    assert losses.keys() == expected.keys()
    assert all(loss.isfinite() for loss in losses.values())
