import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from diffkd.data import SegmentationAugmentation
from diffkd.data.segmentation.transform import EvalTransform, TrainTransform, fitted, resized, resized_mask

IGNORED = 255
PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # normalised images then keep the numbers of their bytes
sides = st.integers(1, 40)


def coordinates(height, width):
    """Return an image whose red is the column and green the row, and two masks that hold the same."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)
    return image, columns.to(torch.uint8), rows.to(torch.uint8)


def transform(augmentation, crop_size=(16, 16), statistics=PLAIN):
    return TrainTransform(augmentation, crop_size, IGNORED, *statistics)


def drawn(step, seed, image, mask):
    torch.manual_seed(seed)
    return step(image, mask)


@given(st.integers(0, 10**6), sides, sides, sides, sides, st.booleans())
def test_crop_and_flip_move_image_and_mask_alike(seed, height, width, crop_height, crop_width, flip):
    image, columns, rows = coordinates(height, width)
    step = transform(SegmentationAugmentation(flip=flip), (crop_height, crop_width))
    for channel, mask in enumerate((columns, rows)):
        moved, seen = drawn(step, seed, image, mask)
        assert moved.shape == (3, crop_height, crop_width)
        assert seen.shape == (crop_height, crop_width)
        assert (moved.dtype, seen.dtype) == (torch.float32, torch.int64)
        counted = seen != IGNORED
        assert counted.sum() == min(height, crop_height) * min(width, crop_width)
        assert torch.equal(moved[channel][counted].round().long(), seen[counted])
        assert (moved[:, ~counted] == 0).all()


@example(0, 9, 4, 0.3125, False)  # a single column
@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(4, 40), st.floats(0.3, 3), st.booleans())
def test_scaling_moves_image_and_mask_alike(seed, height, width, factor, flip):
    image, columns, rows = coordinates(height, width)
    step = transform(SegmentationAugmentation(scale=(factor, factor), flip=flip), (24, 24))
    for channel, mask in enumerate((columns, rows)):
        moved, seen = drawn(step, seed, image, mask)
        counted = seen != IGNORED
        # The nearest pixel is at most half a pixel off, bytes are rounded; at the rim antialiasing averages inwards.
        slack = 1.01 + max(1 / factor, 1)
        assert (moved[channel][counted] - seen[counted]).abs().max() <= slack
        assert set(seen[counted].tolist()) <= set(mask.flatten().tolist())


def test_resizing_to_a_quarter_takes_the_middle_of_each_block():
    image, columns, _ = coordinates(8, 16)
    small, mask = resized(image, columns, (2, 4))
    assert mask[0].tolist() == [2, 6, 10, 14]
    assert small.shape == (3, 2, 4)
    assert (small[0, 0].float() - torch.tensor([1.5, 5.5, 9.5, 13.5])).abs().max() <= 1
    assert (
        resized_mask(torch.tensor([[-100, 70000]], dtype=torch.int32), (2, 4)).tolist()
        == [[-100] * 2 + [70000] * 2] * 2
    )


def test_an_image_may_shrink_to_a_single_pixel():
    image = torch.full((3, 4, 5), 77, dtype=torch.uint8)
    small, mask = resized(image, torch.full((4, 5), 3, dtype=torch.uint8), (1, 1))
    assert (small.dtype, small.flatten().tolist(), mask.tolist()) == (torch.uint8, [77] * 3, [[3]])


def test_scale_is_drawn_over_its_whole_range():
    image, columns, _ = coordinates(20, 20)
    step = transform(SegmentationAugmentation(scale=(0.5, 2.0)), (40, 40))
    sides = [int((drawn(step, seed, image, columns)[1][0] != IGNORED).sum()) for seed in range(60)]
    assert min(sides) < 14
    assert max(sides) > 35


def test_half_of_the_images_are_flipped():
    image, columns, _ = coordinates(4, 4)
    step = transform(SegmentationAugmentation(flip=True), (4, 4))
    first = [int(drawn(step, seed, image, columns)[1][0, 0]) for seed in range(200)]
    assert set(first) == {0, 3}
    assert 70 < first.count(3) < 130


def test_flipping_twice_is_the_identity():
    image, columns, _ = coordinates(5, 7)
    step = transform(SegmentationAugmentation(flip=True), (5, 7))
    seed = next(seed for seed in range(20) if drawn(step, seed, image, columns)[1][0, 0] == 6)
    once = drawn(step, seed, image, columns)
    twice = drawn(step, seed, once[0].round().to(torch.uint8), once[1].to(torch.uint8))
    assert torch.equal(twice[0].round().to(torch.uint8), image)
    assert torch.equal(twice[1], columns.long())


def test_colour_jitter_leaves_the_mask_alone():
    image, columns, _ = coordinates(16, 16)
    image = image * 10
    plain = drawn(transform(SegmentationAugmentation()), 0, image, columns)
    changed = drawn(transform(SegmentationAugmentation(color_jitter=0.5, hue=0.1)), 0, image, columns)
    assert torch.equal(plain[1], changed[1])
    assert (plain[0] - changed[0]).abs().max() > 5


def test_padding_is_the_mean_and_ignored():
    image, mask = torch.full((3, 2, 3), 90, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.uint8)
    statistics = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    moved, seen = transform(SegmentationAugmentation(), (4, 5), statistics)(image, mask)
    expected = (90 / 255 - torch.tensor(statistics[0])) / torch.tensor(statistics[1])
    torch.testing.assert_close(moved[:, :2, :3], expected[:, None, None].expand(3, 2, 3))
    assert seen.tolist() == [[1, 1, 1, 255, 255]] * 2 + [[255] * 5] * 2
    assert moved[:, 2:].abs().max() == moved[:, :, 3:].abs().max() == 0


def test_crops_of_one_class_are_drawn_again():
    mask = torch.zeros(8, 400, dtype=torch.uint8)
    mask[:, 196:204] = 1
    image = torch.zeros(3, 8, 400, dtype=torch.uint8)

    def several(share):
        step = transform(SegmentationAugmentation(max_class_share=share), (8, 100))
        return sum(len(drawn(step, seed, image, mask)[1].unique()) == 2 for seed in range(60))

    assert several(1.0) < 35  # about 36 % of the crops
    assert several(0.99) > 55
    uniform = transform(SegmentationAugmentation(max_class_share=0.5), (8, 8))
    assert uniform(image[..., :9], mask[..., :9])[1].shape == (8, 8)  # where no crop will do, the last is taken
    ignored = torch.full((8, 9), IGNORED, dtype=torch.uint8)
    assert (uniform(image[..., :9], ignored)[1] == IGNORED).all()


def test_evaluation_only_normalises():
    image, columns, _ = coordinates(5, 7)
    seen, mask = EvalTransform(*PLAIN)(image, columns)
    torch.testing.assert_close(seen, image.float())
    assert torch.equal(mask, columns.long())
    assert type(seen) is type(mask) is torch.Tensor


@given(sides, sides, sides, sides)
def test_fitting_gives_the_size(height, width, new_height, new_width):
    image, columns, _ = coordinates(height, width)
    cut, mask = fitted(image.float(), columns.long(), (new_height, new_width), -1)
    assert cut.shape == (3, new_height, new_width)
    counted = mask != -1
    assert torch.equal(cut[0][counted], mask[counted].float())
    assert counted.sum() == min(height, new_height) * min(width, new_width)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (2.0, 0.5)},
        {"scale": (0.0, 1.0)},
        {"scale": (1.0, float("inf"))},
        {"scale": (1.0,)},
        {"color_jitter": 1.5},
        {"hue": 0.6},
        {"max_class_share": 0.0},
        {"max_class_share": 1.5},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SegmentationAugmentation(**options)
