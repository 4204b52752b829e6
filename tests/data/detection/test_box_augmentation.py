import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffkd.data import BoxAugmentation
from diffkd.data.detection.annotated_files import ImageBoxes
from diffkd.data.detection.augmentation import augment_boxes, crop, flip, resize

SIDES = st.integers(2, 40)


@st.composite
def pictures(draw):
    """Draw an image of one bright rectangle per channel, and the boxes of the rectangles."""
    height, width = draw(SIDES), draw(SIDES)
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), []
    for channel in range(3):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
        image[channel, top:bottom, left:right] = 255
        boxes.append([left, top, right, bottom])
    area = torch.tensor([float((right - left) * (bottom - top)) for left, top, right, bottom in boxes])
    return image, ImageBoxes(torch.tensor(boxes).float(), torch.arange(1, 4), area, torch.zeros(3, dtype=torch.int64))


def seen(mask):
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


def agree(image, boxes):
    for box, label, area in zip(boxes.boxes.tolist(), boxes.labels.tolist(), boxes.area.tolist(), strict=True):
        assert box == seen(image[label - 1] > 0)
        assert area == pytest.approx((image[label - 1] > 0).sum().item())


@given(pictures())
def test_a_flip_moves_boxes_with_their_pixels_and_back(picture):
    flipped = flip(*picture)
    assert torch.equal(flipped[0], picture[0].flip(-1))
    agree(*flipped)
    image, boxes = flip(*flipped)
    assert torch.equal(image, picture[0])
    assert all(torch.equal(one, other) for one, other in zip(boxes, picture[1], strict=True))


@given(pictures(), st.integers(1, 3), st.integers(1, 3))
def test_a_resize_scales_boxes_and_areas(picture, tall, wide):
    image, boxes = picture
    _, height, width = image.shape
    bigger, scaled = resize(image, boxes, (height * tall, width * wide))
    assert bigger.shape == (3, height * tall, width * wide)
    assert torch.equal(scaled.boxes, boxes.boxes * torch.tensor([wide, tall, wide, tall]))
    assert torch.equal(scaled.area, boxes.area * tall * wide)
    # A bilinear filter blurs the border by less than one old pixel: half bright, 127 or 128, is inside.
    for box, label in zip(scaled.boxes.tolist(), scaled.labels.tolist(), strict=True):
        assert seen(bigger[label - 1] >= 127) == box


@given(pictures(), st.data())
def test_a_crop_keeps_boxes_with_their_centre_inside_and_cuts_them_right(picture, data):
    image, boxes = picture
    _, height, width = image.shape
    tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - tall)), data.draw(st.integers(0, width - wide))
    cut, kept = crop(image, boxes, top, left, tall, wide)
    assert torch.equal(cut, image[:, top : top + tall, left : left + wide])
    agree(cut, kept)
    inside = [
        label
        for (x0, y0, x1, y1), label in zip(boxes.boxes.tolist(), boxes.labels.tolist(), strict=True)
        if left <= (x0 + x1) / 2 < left + wide and top <= (y0 + y1) / 2 < top + tall
    ]
    assert kept.labels.tolist() == inside


@given(pictures(), st.integers(0, 2**30))
def test_everything_together_stays_inside_the_image(picture, seed):
    torch.manual_seed(seed)
    everything = BoxAugmentation(flip=True, scale_jitter=0.9, min_crop=0.1, color_jitter=0.5)
    image, boxes = augment_boxes(*picture, everything)
    assert image.dtype == torch.uint8
    assert len({len(part) for part in boxes}) == 1
    limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
    assert ((boxes.boxes >= 0) & (boxes.boxes <= limits)).all()
    assert (boxes.boxes[:, 2:] > boxes.boxes[:, :2]).all()
    assert (boxes.area > 0).all()


def test_nothing_asked_for_changes_nothing_and_draws_nothing():
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8)
    boxes = ImageBoxes(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).long())
    state = torch.get_rng_state()
    same_image, same_boxes = augment_boxes(image, boxes, BoxAugmentation())
    assert same_image is image
    assert same_boxes is boxes
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_without_boxes_is_augmented():
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8)
    boxes = ImageBoxes(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).long())
    for seed in range(4):
        torch.manual_seed(seed)
        _, left = augment_boxes(image, boxes, BoxAugmentation(True, 0.5, 0.5, 0.5))
        assert left.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "values", [{"scale_jitter": 1.0}, {"min_crop": 0.0}, {"color_jitter": -0.1}, {"min_crop": float("nan")}]
)
def test_values_out_of_range_are_refused(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        BoxAugmentation(**values)
