"""Segmentation: what is counted, what is lost, and what a batch becomes; all by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_segmenters import large, pointwise, small
from torch import nn
from torch.nn import functional as F

from diffkd import CIRKD, Distiller
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.options import SegmentationOptions
from diffkd.tasks.segmentation import Overlap, Segmentation, overlap
from diffkd.tasks.task import Step
from diffkd.tasks.task_of_data import build_task, padded_example

CPU = torch.device("cpu")
CLASSES = ("sky", "road", "traffic sign", "car")
WHOLE = SegmentationOptions()


class Echo(nn.Module):
    """Its images are its class scores."""

    def forward(self, images):
        return images


def scored(sizes, ignored=255, present=(0, 1, 2, 3)):
    """Batches of scores and masks, a fifth of their pixels ignored."""
    draw = np.random.default_rng(1)
    batches = []
    for count, height, width in sizes:
        scores = torch.from_numpy(draw.normal(size=(count, 4, height, width)))
        masks = draw.choice(present, size=(count, height, width))
        masks[draw.random(masks.shape) < 0.2] = ignored
        batches.append((scores, torch.from_numpy(masks), torch.arange(count)))
    return batches


def by_hand(batches, ignored=255):
    """Count pixel by pixel."""
    inter, union, right, pixels, losses = [0] * 4, [0] * 4, 0, 0, []
    for scores, masks, _ in batches:
        for image, mask in zip(scores, masks, strict=True):
            loss = []
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    true = int(mask[y, x])
                    if true == ignored:
                        continue
                    values = image[:, y, x].double()
                    said = int(values.argmax())
                    loss.append(float(values.exp().sum().log() - values[true]))
                    right, pixels = right + (said == true), pixels + 1
                    for one in range(4):
                        inter[one] += said == true == one
                        union[one] += one in (said, true)
            losses.append(sum(loss) / len(loss))
    shares = {CLASSES[one]: inter[one] / union[one] for one in range(4) if union[one]}
    return shares, right / pixels, sum(losses) / len(losses)


def measure(batches, options=WHOLE, ignored=255, model=None):
    meter = Segmentation(CLASSES, ignored, options=options).meter(CPU)
    with torch.no_grad():
        for batch in batches:
            meter.update(model or Echo(), batch)
    row = meter.compute()
    assert {name for name in row if not name.startswith("iou/")} == set(Segmentation.metrics)
    return row


def test_measurements_are_those_counted_by_hand():
    """Over all pixels of batches of several sizes, the ignored ones left out."""
    batches = scored([(3, 5, 7), (1, 9, 4), (2, 1, 1), (1, 33, 2)])
    shares, accuracy, loss = by_hand(batches)
    row = measure(batches)
    assert row["iou/traffic_sign"] == pytest.approx(shares["traffic sign"])
    assert [row[f"iou/{name}"] for name in ("sky", "road", "car")] == pytest.approx(
        [shares[name] for name in ("sky", "road", "car")]
    )
    assert row["miou"] == pytest.approx(sum(shares.values()) / 4)
    assert row["pixel_accuracy"] == pytest.approx(accuracy)
    assert row["loss"] == pytest.approx(loss, abs=1e-6)


def test_the_measurements_are_of_the_data_set_and_not_means_of_batches():
    batches = scored([(1, 2, 3), (1, 40, 40)])
    row = measure(batches)
    means = [sum(measure([batch])[name] for batch in batches) / 2 for name in ("miou", "pixel_accuracy")]
    assert all(abs(row[name] - mean) > 1e-3 for name, mean in zip(("miou", "pixel_accuracy"), means, strict=True))
    images = [(s[None], m[None], torch.tensor([0])) for batch in batches for s, m in zip(*batch[:2], strict=True)]
    assert measure(images) == pytest.approx(row)


def test_a_meter_begins_anew():
    meter, batches = Segmentation(CLASSES).meter(CPU), scored([(2, 5, 5)])
    for _ in range(2):
        meter.update(Echo(), batches[0])
        row = meter.compute()
    assert row == pytest.approx(measure(batches))


def test_classes_whose_names_differ_in_a_blank_are_measured_apart():
    row = overlap(torch.tensor([[4.0, 0, 0], [0, 1, 1], [1, 0, 1]]), ("sky", "traffic light", "traffic_light"))
    shares = {"iou/sky": 4 / 5, "iou/traffic_light_1": 1 / 2, "iou/traffic_light_2": 1 / 3}
    assert {name: value for name, value in row.items() if "/" in name} == pytest.approx(shares)


def test_a_class_that_occurs_nowhere_has_no_share_in_the_mean():
    (scores, masks, indices), *_ = scored([(2, 6, 6)], present=(0, 1))
    scores[:, 2] = -50
    scores[:, 3, :3] = -50  # predicted, though not there
    row = measure([(scores, masks, indices)])
    assert "iou/traffic_sign" not in row
    assert row["iou/car"] == 0
    assert row["miou"] == pytest.approx((row["iou/sky"] + row["iou/road"]) / 3)


def test_an_ignored_class_has_no_share_in_the_mean_even_if_it_is_predicted():
    """As where "0" is what is not labelled: the masks keep their ids."""
    batches = scored([(2, 6, 6)], ignored=0, present=(1, 2, 3))
    shares, accuracy, _ = by_hand(batches, ignored=0)
    assert shares.pop("sky") == 0
    row = measure(batches, ignored=0)
    assert "iou/sky" not in row
    assert row["miou"] == pytest.approx(sum(shares.values()) / 3)
    assert row["pixel_accuracy"] == pytest.approx(accuracy)


def test_nothing_to_measure_is_said():
    scores, masks, indices = scored([(2, 4, 4)])[0]
    nothing = scores, torch.full_like(masks, 255), indices
    with pytest.warns(UserWarning, match="every pixel of the evaluation set is ignored"):
        assert measure([nothing]) == {"miou": 0.0, "pixel_accuracy": 0.0, "loss": 0.0}
    assert measure([nothing, (scores, masks, indices)]) == measure([(scores, masks, indices)])


@given(st.lists(st.integers(0, 9), min_size=9, max_size=9))
def test_shares_lie_between_0_and_1(counts):
    row = overlap(torch.tensor(counts).reshape(3, 3).double(), CLASSES[:3])
    assert all(0 <= value <= 1 for value in row.values())
    assert row["miou"] <= max(row["pixel_accuracy"], *(v for k, v in row.items() if k.startswith("iou")), 0)


def test_masks_larger_than_images_are_measured_at_their_own_size():
    scores, _, indices = scored([(2, 6, 8)])[0]
    masks = scored([(2, 12, 16)])[0][1]
    full = F.interpolate(scores, (12, 16), mode="bilinear", align_corners=False)
    assert measure([(scores, masks, indices)]) == pytest.approx(measure([(full, masks, indices)]))


@pytest.mark.parametrize(("window", "stride"), [((8, 8), None), ((5, 3), (5, 3)), ((5, 7), (1, 2)), ((1, 1), (1, 1))])
def test_windows_make_no_difference_where_pixels_stand_for_themselves(window, stride):
    batches, model = scored([(2, 13, 17), (1, 4, 30)]), pointwise(4, 4).double().eval()
    options = SegmentationOptions(window=window, window_stride=stride)
    assert measure(batches, options, model=model) == pytest.approx(measure(batches, model=model), abs=1e-6)


def test_a_window_as_large_as_the_image_is_the_whole_image():
    batches, model = scored([(2, 13, 17)]), small(4, 4).double().eval()
    assert measure(batches, SegmentationOptions(window=(13, 17)), model=model) == measure(batches, model=model)
    smaller = measure(batches, SegmentationOptions(window=(6, 6)), model=model)
    assert smaller["loss"] != measure(batches, model=model)["loss"]


@pytest.mark.parametrize(
    "values",
    [{"window_stride": (2, 2)}, {"window": (0, 4)}, {"window": (4, 4), "window_stride": (5, 4)}],
)
def test_windows_that_leave_gaps_are_refused(values):
    with pytest.raises(ValueError, match="window"):
        SegmentationOptions(**values)


def test_the_loss_is_the_mean_over_labelled_pixels():
    (scores, masks, indices) = scored([(3, 5, 7)])[0]
    task = Segmentation(CLASSES)
    losses = task.losses(scores, task.step((scores, masks, indices), 0))
    expected = [
        -scores[b].log_softmax(0)[masks[b, y, x], y, x]
        for b in range(3)
        for y in range(5)
        for x in range(7)
        if masks[b, y, x] != 255
    ]
    assert losses == {"task": pytest.approx(float(torch.stack(expected).mean()))}


def test_small_class_maps_are_brought_to_the_size_of_the_masks():
    scores, masks = torch.randn(2, 4, 3, 2), torch.randint(0, 4, (2, 12, 8))
    task = Segmentation(CLASSES)
    step = task.step((torch.randn(2, 3, 12, 8), masks, torch.arange(2)), 0)
    full = F.interpolate(scores, (12, 8), mode="bilinear", align_corners=False)
    for output in (scores, {"out": scores}, {"out": scores, "aux": None}):
        assert float(task.losses(output, step)["task"]) == pytest.approx(float(F.cross_entropy(full, masks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_ignored_pixels_alone_is_zero(dtype):
    scores = torch.randn(2, 4, 5, 5, dtype=dtype, requires_grad=True)
    masks = torch.full((2, 5, 5), 255)
    task = Segmentation(CLASSES)
    losses = task.losses({"out": scores, "aux": scores}, task.step((scores, masks, torch.arange(2)), 0))
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {"task": 0.0, "task/auxiliary": 0.0}
    sum(losses.values()).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize(("weight", "names"), [(0.4, {"task", "task/auxiliary"}), (0.0, {"task"})])
def test_an_auxiliary_class_map_counts_by_its_weight(weight, names):
    output = {"out": torch.randn(2, 4, 3, 3), "aux": torch.randn(2, 4, 3, 3)}
    task = Segmentation(CLASSES, options=SegmentationOptions(auxiliary_weight=weight))
    step = task.step((torch.randn(2, 3, 3, 3), torch.randint(0, 4, (2, 3, 3)), torch.arange(2)), 0)
    losses = task.losses(output, step)
    assert set(losses) == names
    if weight:
        assert float(losses["task/auxiliary"]) == pytest.approx(
            weight * float(F.cross_entropy(output["aux"], step.targets))
        )


@pytest.mark.parametrize(
    ("output", "told"),
    [(torch.randn(2, 3, 4, 4), "shape .2, 3, 4, 4."), (torch.randn(2, 4), "shape .2, 4."), ("text", "returned str")],
)
def test_outputs_that_are_no_class_map_are_refused(output, told):
    with pytest.raises(TypeError, match=f"{told}.* 4 classes"):
        Segmentation(CLASSES).losses(output, Step(None, torch.zeros(0), None))


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 8]))
def test_images_are_padded_at_the_right_and_at_the_bottom(height, width, multiple):
    images, masks = torch.ones(1, 3, height, width), torch.ones(1, height, width, dtype=torch.int64)
    step = Segmentation(CLASSES, multiple=multiple).step((images, masks, torch.arange(1)), 0)
    assert all(0 <= new - old < multiple for new, old in zip(step.targets.shape[1:], (height, width), strict=True))
    assert step.targets.shape[1] % multiple == step.targets.shape[2] % multiple == 0
    assert step.inputs.shape[2:] == step.targets.shape[1:]
    assert torch.equal(step.inputs[0, 0] == 1, step.targets[0] == 1)
    assert int((step.targets == 255).sum()) == step.targets.numel() - height * width
    assert torch.equal(step.inputs[..., :height, :width], images)


@pytest.mark.parametrize("ignored", [0, 2, 255, -100])
def test_methods_see_ignored_pixels_as_of_no_class(ignored):
    masks = torch.tensor([[[0, 1, 2], [3, ignored, 1]]])
    context = Segmentation(CLASSES, ignored).step((torch.randn(1, 3, 2, 3), masks, torch.arange(1)), 0).context
    assert context["labels"].tolist() == [[[-1 if one == ignored else one for one in row] for row in masks[0].tolist()]]


def test_a_method_of_labels_learns_nothing_of_ignored_pixels():
    distiller = Distiller(small(4, 3), large(4, 3), example=torch.randn(2, 3, 32, 32), method=CIRKD)
    masks = torch.full((2, 32, 32), 2)
    masks[:, 8:] = 3
    step = Segmentation(CLASSES, ignore_index=3).step((torch.randn(2, 3, 32, 32), masks, torch.arange(2)), 0)
    distiller(step.inputs, **step.context)
    pixels = distiller.methods[0].pixels
    assert pixels.draw(1, torch.tensor(0), 0)[1].tolist() == [one == 2 for one in range(19)]


def test_a_teacher_is_judged_by_its_pixels():
    scores, masks, indices = scored([(2, 6, 6)])[0]
    right = F.one_hot(masks.where(masks != 255, 0), 4).movedim(-1, 1).float()
    task = Segmentation(CLASSES)
    assert task.judge(lambda _: {"out": right}, (scores, masks, indices)) == (1.0, 0.25)
    assert task.judge(lambda _: right.roll(1, dims=1), (scores, masks, indices)) == (0.0, 0.25)
    assert task.judge(lambda _: torch.randn(2, 7, 6, 6), (scores, masks, indices)) is None


def facts(size, **options):
    values = {"num_classes": 4, "in_channels": 3, "image_size": size, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return DataFacts(**values, classes=CLASSES, example=torch.randn(2, 3, *size), task="segmentation", **options)


def test_the_task_pads_for_student_and_teacher():
    data = facts((33, 50), ignore_index=9)
    task = build_task(data, models=[small(4, 3), nn.Sequential(nn.Conv2d(3, 4, 1))])
    assert (task.name, task.classes, task.ignore_index, task.multiple) == ("segmentation", CLASSES, 9, 32)
    assert padded_example(data, small(4, 3)).shape == (2, 3, 64, 64)
    assert build_task(data).multiple == 1
    with pytest.raises(ValueError, match="label_smoothing"):
        build_task(data, label_smoothing=0.1)


def test_overlap_takes_models_of_another_type():
    """An average is in float32 whatever the images are in, and a student may be in half precision."""
    batches = scored([(2, 8, 8)])
    meter = Overlap(CLASSES, 255, WHOLE, CPU)
    meter.update(small(4, 4).to(torch.bfloat16).eval(), batches[0])
    assert 0 <= meter.compute()["miou"] <= 1
