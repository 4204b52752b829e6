import pytest
import torch

from diffkd.data import Augmentation, DeviceLoader

AUGMENTATION = Augmentation(crop_padding=1, flip=True, random_erasing=0.3)


def loader(size=22, **options):
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return DeviceLoader(
        images,
        torch.arange(size) % 5,
        **({"batch_size": 4, "mean": [0.5] * 3, "std": [0.25] * 3} | options),
    )


def training(**options):
    return loader(**({"shuffle": True, "augmentation": AUGMENTATION, "seed": 9} | options))


def same(first, second):
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


def test_evaluation_gives_every_image_once_normalised_and_in_order():
    data = loader()
    batches = list(data)
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) == len(data) == 6
    assert indices.tolist() == list(range(22))
    assert torch.equal(labels, indices % 5)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, (data.images / 255 - 0.5) / 0.25)


def test_labels_and_images_follow_the_indices_when_shuffled():
    data = training(augmentation=None)
    for images, labels, indices in data:
        assert torch.equal(labels, indices % 5)
        torch.testing.assert_close(images, (data.images[indices] / 255 - 0.5) / 0.25)


def test_epochs_differ_and_repeat():
    data = training()
    first = list(data)
    same(first, list(data))
    data.set_epoch(1)
    second = list(data)
    assert not torch.equal(first[0][2], second[0][2])
    fresh = training()
    fresh.set_epoch(1)
    same(second, list(fresh))


def test_a_resume_in_mid_epoch_goes_on_bit_for_bit():
    whole = training()
    whole.set_epoch(3)
    resumed = training(start_batch=2)
    resumed.set_epoch(3)
    assert len(resumed) == len(whole)
    same(list(whole)[2:], list(resumed))
    for data in (whole, resumed):
        data.set_epoch(4)
    same(list(whole), list(resumed))


def test_the_epoch_is_read_when_iteration_begins():
    data, reference = training(), training()
    batches = iter(data)
    data.set_epoch(2)
    reference.set_epoch(2)
    same(list(batches), list(reference))


def test_no_global_random_state_is_used():
    state = torch.get_rng_state()
    first = list(training())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    same(first, list(training()))


def test_ranks_augment_differently_and_share_the_epoch():
    parts = [training(rank=rank, world_size=2) for rank in range(2)]
    indices = [torch.cat([batch[2] for batch in part]).tolist() for part in parts]
    assert len(parts[0]) == len(parts[1])
    assert sorted(indices[0] + indices[1]) == list(range(22))
    one = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    one[:, :, 4, 4] = 255
    views = [
        next(
            iter(
                DeviceLoader(
                    one,
                    torch.zeros(8, dtype=torch.int64),
                    batch_size=4,
                    mean=[0.0],
                    std=[1.0],
                    augmentation=Augmentation(crop_padding=3),
                    shuffle=True,
                    rank=rank,
                    world_size=2,
                )
            )
        )[0]
        for rank in range(2)
    ]
    assert not torch.equal(*views)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_over_ranks_is_exact(world):
    seen = [
        index for rank in range(world) for batch in loader(rank=rank, world_size=world) for index in batch[2].tolist()
    ]
    assert sorted(seen) == list(range(22))


def test_last_batches():
    assert [len(batch[1]) for batch in training(size=9)] == [4, 4]
    assert [len(batch[1]) for batch in training(size=10)] == [4, 4, 2]
    assert [len(batch[1]) for batch in training(size=10, drop_last=True)] == [4, 4]
    assert [len(batch[1]) for batch in loader(size=9)] == [4, 4, 1]


def test_float_images_keep_their_values():
    images = torch.randn(4, 2, 5, 5)
    (batch,) = DeviceLoader(images, torch.arange(4), batch_size=4, mean=[0.0, 1.0], std=[1.0, 2.0])
    torch.testing.assert_close(batch[0][:, 1], (images[:, 1] - 1) / 2)


IMAGES, LABELS = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[0]}, "do not fit"),
        ({"labels": LABELS[:3]}, "do not fit"),
        ({"labels": LABELS.float()}, "torch.int64"),
        ({"mean": [0.5] * 3}, "3 mean and 1 std values for images of 1 channel"),
        ({"std": [0.0]}, "cannot divide"),
        ({"mean": [124.0], "std": [58.0]}, "divided by 255"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"images": IMAGES.float(), "augmentation": Augmentation(rand_augment=2)}, "uint8"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DeviceLoader(**({"images": IMAGES, "labels": LABELS, "batch_size": 2, "mean": [0.5], "std": [0.5]} | change))
