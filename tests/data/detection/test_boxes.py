import torch

from diffkd.data.detection.annotated_files import ImageBoxes, gather, measurable, no_boxes


def some(*labels, crowd=()):
    count = len(labels)
    boxes = torch.arange(4.0 * count).reshape(count, 4)
    crowds = torch.tensor([int(label in crowd) for label in labels], dtype=torch.int64)
    return ImageBoxes(boxes, torch.tensor(labels, dtype=torch.int64), torch.ones(count), crowds)


def test_each_image_gets_its_boxes_back():
    images = [no_boxes(), some(1, 2), no_boxes(), some(3), no_boxes()]
    annotations = gather([9, 8, 7, 6, 5], images)
    assert len(annotations) == 5
    for index, image in enumerate(images):
        for got, given in zip(annotations.of(index), image, strict=True):
            assert torch.equal(got, given)
            assert got.dtype == given.dtype
    chosen = annotations.select([3, 0])
    assert chosen.image_ids.tolist() == [6, 9]
    assert [chosen.of(index).labels.tolist() for index in range(2)] == [[3], []]


def test_crowds_are_left_out_of_their_image_only():
    annotations = gather([0, 1, 2], [some(7), some(1, 7, 2, crowd=[7]), some(7, crowd=[7])]).without_crowds()
    assert [annotations.of(index).labels.tolist() for index in range(3)] == [[7], [1, 2], []]
    assert torch.equal(annotations.of(1).boxes, torch.tensor([[0.0, 1, 2, 3], [8, 9, 10, 11]]))


def test_no_images_are_no_boxes():
    assert len(gather([], [])) == 0


def test_what_has_an_extent():
    nan, inf = float("nan"), float("inf")
    boxes = [[0, 0, 1, 1], [0, 0, 0, 1], [0, 2, 1, 1], [0, 0, nan, 1], [-inf, 0, 1, 1], [5, 5, 5.005, 6]]
    assert measurable(torch.tensor(boxes)).tolist() == [True, False, False, False, False, False]
