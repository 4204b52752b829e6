"""A detector inside the distiller is the detector alone, and its teacher sees the very same pixels."""

import copy
from functools import partial

import pytest
import torch
from rounding import units_of
from small_detectors import batch, detector, facts
from torch import nn

from diffkd import DiffKD, FitNet, Pair
from diffkd.diffusion.distances import mse
from diffkd.methods.box_kd import BoxKD
from diffkd.methods.fgd import FGD
from diffkd.methods.shared import Shared
from diffkd.teacher.view import DetectorView, StudentView
from diffkd.training.models import build_distiller

FAMILIES = ["retinanet", "fcos", "fasterrcnn"]


def distil(student, teacher, method=FitNet, pairs="auto", **options):
    return build_distiller(student, teacher, None, data=facts(**options), pairs=pairs, method=method, seed=0)


class Seen:
    """What modules are called with and return."""

    def __init__(self, **modules):
        self.args, self.outputs, self.calls = {}, {}, []
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda _, args, name=name: self.called(name, args))
            # Not called after the last layer of a teacher, which ends there.
            module.register_forward_hook(lambda _, args, out, name=name: self.outputs.update({name: out}))

    def called(self, name, args):
        self.calls.append(name)
        self.args[name] = args


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("min_size", [(64,), (64, 72, 96)])
def test_the_student_is_itself(family, min_size):
    """Losses in training, with all that it draws, and detections in evaluation, to the bit."""
    student = detector(family, min_size=min_size)
    plain = copy.deepcopy(student)
    distiller = distil(student, detector(family, seed=1), [FitNet, BoxKD], min_size=min_size)
    for seed in range(3):
        images, targets = batch(2, 0, seed=seed)
        torch.manual_seed(seed)
        expected = plain.train()(images, targets)
        torch.manual_seed(seed)
        found, losses = distiller.train()((images, targets))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(loss.isfinite() for loss in losses.values())
        theirs, ours = plain.eval()(images), student.eval()(images)
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores"))
    assert set(student.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("min_size", [64, (64, 80, 96), (40, 128)])
def test_the_teacher_sees_the_students_pixels(min_size):
    min_size = (min_size,) if isinstance(min_size, int) else min_size
    distiller = distil(detector(min_size=min_size), detector(seed=1, min_size=(100,)), min_size=min_size)
    seen = Seen(ours=distiller.student.transform, theirs=distiller.teacher.backbone)
    shapes = set()
    for seed in range(8):
        torch.manual_seed(seed)
        distiller(batch(1, 2, seed=seed))
        made = seen.outputs["ours"][0].tensors
        assert torch.equal(seen.args["theirs"][0], made)
        shapes.add(tuple(made.shape))
    assert (len(shapes) > 1) == (len(min_size) > 1)


def test_pixels_are_normalised_as_the_teacher_wants():
    """As its own transform would have made them, padding included."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.7, 0.9)
    teacher = detector(seed=1, mean=mean, std=std)
    distiller = distil(detector(), teacher)
    seen = Seen(theirs=distiller.teacher.backbone, ours=distiller.student.transform)
    images, targets = batch(1, 1)
    distiller((images, targets))
    expected = teacher.transform(images)[0].tensors
    # A dozen roundings of numbers below 3, and nothing that magnifies them.
    torch.testing.assert_close(seen.args["theirs"][0], expected, atol=3 * units_of(torch.float32, 12), rtol=0)
    assert not torch.equal(seen.args["theirs"][0], seen.outputs["ours"][0].tensors)
    assert (expected == 0).any()  # something is padded


def test_the_teachers_box_head_gets_the_students_proposals():
    distiller = distil(detector("fasterrcnn"), detector("fasterrcnn", seed=1), [FitNet, BoxKD])
    ours, theirs = distiller.student.roi_heads, distiller.teacher.roi_heads
    seen = Seen(ours=ours.box_roi_pool, theirs=theirs.box_roi_pool, one=ours.box_predictor, other=theirs.box_predictor)
    distiller(batch(3, 1))
    for mine, given in zip(seen.args["ours"][1], seen.args["theirs"][1], strict=True):
        assert torch.equal(mine, given)
    assert seen.args["ours"][2] == seen.args["theirs"][2]
    assert {"one", "other"} <= set(seen.calls)  # both heads looked at them


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_run_only_where_their_outputs_are_wanted(family):
    whole = detector(family, seed=1)
    head = whole.roi_heads.box_head if family == "fasterrcnn" else whole.head
    seen = Seen(head=head)
    distiller = distil(detector(family), whole)
    seen.calls.clear()
    distiller(batch(1, 1))
    assert seen.calls == []
    assert {name.partition(".")[0] for name in distiller.teacher.state_dict()} == {"backbone"}
    distil(detector(family), whole, BoxKD)(batch(1, 1))
    assert "head" in seen.calls


def test_written_pairs_of_heads_run_them():
    pair = Pair(["head[cls_logits]", "head[bbox_regression]"], None, BoxKD, name="boxes")
    taught = distil(detector(), detector(seed=1), None, [pair, Pair("backbone[1]", None, FitNet)])
    assert set(taught(batch(1, 1))[1]) == {"boxes/kd", "backbone[1]/kd"}


def test_boxes_are_fractions_of_the_padded_batch():
    distiller = distil(detector(), detector(seed=1), FGD)
    assert isinstance(distiller.teacher_input, StudentView)
    seen = Seen(ours=distiller.student.transform)
    handed = []
    distiller.methods[0].register_forward_pre_hook(lambda _, args, kwargs: handed.append(kwargs), with_kwargs=True)
    distiller(batch(2, 0, 1))
    made, targets = seen.outputs["ours"]
    height, width = made.tensors.shape[2:]
    for boxes, target in zip(handed[0]["boxes"], targets, strict=True):
        torch.testing.assert_close(boxes * torch.tensor([width, height, width, height]), target["boxes"])
    assert [len(boxes) for boxes in handed[0]["boxes"]] == [2, 0, 1]


@pytest.mark.parametrize("counts", [(0, 0), (0,), (1,), (0, 3, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_boxes(family, counts):
    """One image, some without boxes, or all: every loss and gradient is finite."""
    method = [partial(DiffKD, kd_weight=5.0), BoxKD, FGD]
    distiller = distil(detector(family), detector(family, seed=1), method).train()
    output, losses = distiller(batch(*counts))
    total = sum(output.values()) + sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in distiller.parameters() if p.grad is not None)


def test_a_single_class():
    distiller = distil(detector(num_classes=1), detector(seed=1, num_classes=1), [DiffKD, BoxKD], num_classes=1)
    images, targets = batch(2, 1)
    for target in targets:
        target["labels"] = torch.ones_like(target["labels"])
    output, losses = distiller((images, targets))
    assert (sum(output.values()) + sum(losses.values())).isfinite()


def test_other_classes_teach_features_and_not_boxes():
    distil(detector(), detector(seed=1, num_classes=5), DiffKD)(batch(1, 1))
    with pytest.raises(ValueError, match="the same classes and kind of head; distil the feature pyramid"):
        distil(detector(), detector(seed=1, num_classes=5), BoxKD)


def test_other_kinds_of_detectors_pair_levels_of_the_same_size():
    """The level "0" of a Faster R-CNN is a quarter of the image, that of a RetinaNet an eighth."""
    example = {"min_size": (128,)}
    distiller = distil(detector(**example), detector("fasterrcnn", seed=1, **example), DiffKD, **example)
    assert [(ours.names[0], theirs.names[0]) for ours, theirs in distiller.readers] == [
        ("backbone[0]", "backbone[1]"),
        ("backbone[1]", "backbone[2]"),
        ("backbone[2]", "backbone[3]"),
        ("backbone[p6]", "backbone[pool]"),
    ]
    for ours, theirs in distiller.readers:
        assert ours.shapes[0].size == theirs.shapes[0].size
    assert sum(distiller(batch(1, 1))[1].values()).isfinite()


def test_what_cannot_be_joined_is_said():
    with pytest.raises(ValueError, match=r"one-stage and a two-stage detector.*feature pyramid alone"):
        distil(detector(), detector("fasterrcnn", seed=1), BoxKD)
    bare = detector(seed=1)
    bare.transform = nn.Identity()
    with pytest.raises(ValueError, match="teacher RetinaNet has no module 'transform'"):
        distil(detector(), bare)
    same = detector()
    with pytest.raises(ValueError, match="share parameters"):
        distil(same, same)


def test_one_method_for_all_levels():
    separate = distil(detector(), detector(seed=1, fpn_channels=48), DiffKD)
    shared = distil(detector(), detector(seed=1, fpn_channels=48), [partial(Shared, method=DiffKD), BoxKD][:1])
    assert len(separate.methods) == 5
    assert shared.names == ("levels",)
    assert [len(reader.names) for reader in shared.readers[0]] == [5, 5]
    count = sum(p.numel() for p in separate.methods.parameters())
    assert sum(p.numel() for p in shared.methods.parameters()) == count // 5
    losses = shared(batch(1, 1))[1]
    assert set(losses) == {"levels/kd", "levels/diffusion"}
    assert shared.gammas["levels"].shape == (10,)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in shared.methods.parameters())
    assert set(distil(detector(), detector(seed=1), partial(Shared, method=FGD))(batch(2, 0))[1]) == {
        "levels/kd",
        "levels/attention",
        "levels/relation",
    }


def test_no_level_is_taken_for_class_scores():
    """Other distances are for those."""
    distiller = distil(detector(), detector(seed=1), DiffKD)
    assert {shape.role for pair in distiller.readers for side in pair for shape in side.shapes} == {"feature"}
    assert all(method.distance is mse for method in distiller.methods)


def test_nothing_wanted_nothing_watched():
    assert DetectorView().layers == ("transform",)
    assert DetectorView(proposals=True).layers == ("transform", "roi_heads.box_roi_pool")
