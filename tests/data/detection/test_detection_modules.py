import inspect
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data import BoxAugmentation, CocoDetection, VocDetection, YoloDetection
from diffkd.data.detection.dataset import collate_detection
from diffkd.data.loaders import FolderLoader
from diffkd.files.config import describe

SIZES = [(20, 30), (16, 16), (30, 20), (24, 40), (20, 20)]
EVERYTHING = BoxAugmentation(flip=True, scale_jitter=0.3, min_crop=0.6, color_jitter=0.4)


def write(root, split, empty=(), crowd=()):
    """Write five images of noise in COCO's format, each with a box around its middle, cats and dogs in turn."""
    (root / "images").mkdir(exist_ok=True)
    content = {"categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}], "images": [], "annotations": []}
    random = np.random.default_rng(len(split))
    for index, (height, width) in enumerate(SIZES):
        name = f"{split}{index}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / "images" / name)
        content["images"].append({"id": 100 + index, "file_name": name, "width": width, "height": height})
        if index not in empty:
            box = [width / 4, height / 4, width / 2, height / 2]
            entry = {"id": index, "image_id": 100 + index, "category_id": (4, 9)[index % 2], "bbox": box}
            content["annotations"].append(entry | {"iscrowd": int(index in crowd)})
    (root / f"{split}.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, split)
    return tmp_path


def module(root, **options):
    return CocoDetection(root, **({"batch_size": 2, "num_workers": 0, "seed": 3} | options))


def run(loader, epoch=0):
    loader.set_epoch(epoch)
    return list(loader)


def same(first, second):
    assert len(first) == len(second) > 0
    for (images, targets, indices), (others, others_targets, others_indices) in zip(first, second, strict=True):
        assert torch.equal(indices, others_indices)
        assert all(torch.equal(one, other) for one, other in zip(images, others, strict=True))
        for target, other in zip(targets, others_targets, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[name], other[name]) for name in target)


def test_the_module_says_what_it_is(root):
    data = module(root, min_size=(320, 400), max_size=500)
    assert (data.task, data.classes, data.num_classes, data.category_ids) == ("detection", ("cat", "dog"), 2, (4, 9))
    assert (data.in_channels, data.image_size) == (3, (20, 30))
    assert (data.min_size, data.max_size) == ((320, 400), 500)
    assert [image.shape for image in data.example()] == [(3, 20, 30), (3, 20, 20)]
    assert (data.skipped, data.dropped) == ([], [])
    assert (module(root).min_size, module(root).max_size) == (800, 1333)


def test_what_roboflow_exports_is_found(tmp_path):
    for split, folder in (("train", "train"), ("val", "valid")):
        write(tmp_path, split)
        (tmp_path / "images").rename(tmp_path / folder)
        (tmp_path / f"{split}.json").rename(tmp_path / folder / "_annotations.coco.json")
    for options in ({}, {"val": "valid/_annotations.coco.json"}):
        data = module(tmp_path, **options)
        assert [loader.sampler.size for loader in (data.train_dataloader(), data.val_dataloader())] == [5, 5]
    (tmp_path / "valid").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"val\.json: no such file.* set val_share"):
        module(tmp_path)
    assert module(tmp_path, val_share=0.2).val_dataloader().sampler.size == 1


def test_images_that_are_there_twice_are_named(root):
    content = json.loads((root / "train.json").read_text())
    content["images"][4]["file_name"] = "./train0.png"
    content["images"][4] |= {"width": 30, "height": 20}
    (root / "train.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"train.json: 1 image files are there more than once, .*train0.png"):
        assert len(module(root).train_dataloader()) == 3


def with_boxes(root, change):
    content = json.loads((root / "train.json").read_text())
    for entry, image in zip(content["annotations"], content["images"], strict=True):
        entry["bbox"] = change(*entry["bbox"], image["width"], image["height"])
    (root / "train.json").write_text(json.dumps(content))
    return root


def test_boxes_written_as_corners_are_noticed(root):
    with_boxes(root, lambda left, top, width, height, *_: [left + 3, top + 3, left + width + 3, top + height + 3])
    with pytest.warns(UserWarning, match=r"5 box\(es\) are cut .*train.json: box 0 of .*train0.png: .* reaches out of"):
        module(root)


def test_boxes_may_reach_a_pixel_out_of_their_image(root):
    with_boxes(root, lambda left, top, width, height, *size: [-0.5, 0, size[0] + 1, height])
    assert module(root).dropped == []


def test_boxes_in_shares_of_the_image_are_refused(root):
    with_boxes(root, lambda left, top, width, height, *size: [left / size[0], top / size[1], 0.5, 0.5])
    with pytest.raises(ValueError, match=r"train.json: all boxes lie in the first pixel of their image; write pixels"):
        module(root)


def test_evaluation_is_the_images_as_they_are(root):
    batches = run(module(root).val_dataloader())
    assert [len(images) for images, _, _ in batches] == [2, 2, 1]
    index = 0
    for images, targets, indices in batches:
        for image, target, number in zip(images, targets, indices.tolist(), strict=True):
            height, width = SIZES[index]
            with Image.open(root / "images" / f"val{index}.png") as file:
                assert torch.equal(image, torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255)
            assert number == index
            assert {name: part.dtype for name, part in target.items()} == {
                "boxes": torch.float32,
                "labels": torch.int64,
                "area": torch.float32,
                "iscrowd": torch.int64,
                "image_id": torch.int64,
            }
            assert target["boxes"].tolist() == [[width / 4, height / 4, width * 3 / 4, height * 3 / 4]]
            assert target["labels"].tolist() == [1 + index % 2]
            assert target["area"].tolist() == [width * height / 4]
            assert target["image_id"].item() == 100 + index
            index += 1
    assert index == 5


def test_the_test_split_is_its_own_or_that_of_evaluation(root):
    same(run(module(root).test_dataloader()), run(module(root).val_dataloader()))
    own = run(module(root, test="test.json").test_dataloader())
    with Image.open(root / "images/test0.png") as file:
        assert torch.equal(own[0][0][0], torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255)


def test_results_depend_on_seed_and_epoch_but_not_on_workers(root):
    state = torch.get_rng_state()
    alone = module(root, augmentation=EVERYTHING).train_dataloader()
    helped = module(root, augmentation=EVERYTHING, num_workers=2).train_dataloader()
    first = run(alone, 1)
    same(first, run(helped, 1))
    assert torch.equal(torch.get_rng_state(), state)
    other = run(module(root, augmentation=EVERYTHING, seed=4).train_dataloader(), 1)
    for epoch in (run(alone, 2), other):
        assert not torch.equal(epoch[0][0][0], first[0][0][0])


def test_a_resume_in_mid_epoch_goes_on_bit_for_bit(root):
    whole, resumed = module(root, augmentation=EVERYTHING), module(root, augmentation=EVERYTHING)
    resumed.start_batch = 1
    first, second = whole.train_dataloader(), resumed.train_dataloader()
    assert len(first) == len(second) == 3
    same(run(first, 2)[1:], run(second, 2))
    same(run(first, 3), run(second, 3))


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_processes_see_what_one_sees(root, shuffle):
    dataset = module(root, augmentation=EVERYTHING).train_dataloader()._loader.dataset
    options = {"shuffle": shuffle, "seed": 3, "collate": collate_detection, "drop_last": False}
    one = run(FolderLoader(dataset, batch_size=2, **options), 1)
    ranks = [run(FolderLoader(dataset, batch_size=1, rank=rank, world_size=2, **options), 1) for rank in range(2)]
    for batch in range(2):
        (images, targets, indices), (others, others_targets, others_indices) = (rank[batch] for rank in ranks)
        merged = (images + others, targets + others_targets, torch.cat([indices, others_indices]))
        same([one[batch]], [merged])
    assert sum(len(rank) for rank in ranks) == (4 if shuffle else 5)


def test_images_without_boxes_are_kept_or_not_in_training_only(root):
    write(root, "train", empty=[1], crowd=[2])
    write(root, "val", empty=[1], crowd=[2])
    kept = run(module(root).train_dataloader())
    counts = {
        int(number): len(one["labels"]) for _, many, numbers in kept for one, number in zip(many, numbers, strict=True)
    }
    assert counts == {0: 1, 1: 0, 2: 0, 3: 1, 4: 1}
    data = module(root, keep_empty=False)
    ids = [target["image_id"].item() for _, targets, _ in run(data.train_dataloader()) for target in targets]
    assert sorted(ids) == [100, 103, 104]
    targets = [target for _, targets, _ in run(data.val_dataloader()) for target in targets]
    assert [target["iscrowd"].tolist() for target in targets] == [[0], [], [1], [0], [0]]
    assert targets[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("keep_empty", [True, False])
def test_a_split_without_boxes_teaches_nothing(root, keep_empty):
    write(root, "train", empty=range(5))
    with pytest.raises(ValueError, match=r"train.json: no image has a box to train on \(there is none\); add boxes"):
        module(root, keep_empty=keep_empty)
    write(root, "train", empty=[0], crowd=range(5))
    with pytest.raises(ValueError, match=r"\(all 4 boxes are marked as crowds or difficult"):
        module(root, keep_empty=keep_empty)


@pytest.mark.parametrize("missing", [{"empty": range(5)}, {"crowd": range(5)}])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_boxes_measures_nothing(root, split, missing):
    write(root, split, **missing)
    with pytest.warns(UserWarning, match=rf"{split}.json: no image has a box that counts, .* precision will be 0"):
        module(root, test="test.json")


def test_boxes_without_extent_are_counted_in_one_warning(root):
    content = write(root, "val")
    for index in range(2):
        bad = {"id": 70 + index, "image_id": 101, "category_id": 4, "bbox": [3, 3, 0, 2]}
        content["annotations"].append(bad)
    (root / "val.json").write_text(json.dumps(content))
    with pytest.warns(
        UserWarning, match=r"2 box\(es\) are left out; the first: .*val.json: box 70 of .*val1.png"
    ) as seen:
        data = module(root)
    assert len(seen) == 1
    assert len(data.dropped) == 2


def test_classes_without_a_box_to_train_on_are_told_of(root):
    content = write(root, "train", crowd=(1, 3))  # all dogs
    content["categories"].append({"id": 2, "name": "animals"})
    (root / "train.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"train.json: no box of class\(es\) 'animals', 'dog' to train on") as seen:
        data = module(root)
    assert len(seen) == 1
    assert data.classes == ("animals", "cat", "dog")


@pytest.mark.parametrize("stated", [True, False])
def test_missing_images_are_refused_before_training(root, stated):
    if not stated:
        content = write(root, "val")
        content["images"] = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"]]
        (root / "val.json").write_text(json.dumps(content))
    (root / "images/val3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"val3.png is missing \(1 of 5 are\)"):
        module(root)
    with pytest.warns(UserWarning, match=r"val.json: 1 of 5 images are left out"):
        data = module(root, on_bad_image="skip")
    assert len(data.skipped) == 1
    ids = [target["image_id"].item() for _, targets, _ in run(data.val_dataloader()) for target in targets]
    assert ids == [100, 101, 102, 104]


def test_broken_images_and_wrong_sizes_stop_with_their_name(root):
    path = root / "images/train2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"train2.png cannot be read"):
        run(module(root).train_dataloader())
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(ValueError, match=r"train2.png is 30x20 pixels, but its annotations are for 20x30"):
        module(root)
    with pytest.raises(ValueError, match=r"train.json: 1 of 5 images are broken; the first: .*train2.png is 30x20"):
        module(root, verify=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train2.png is empty"):
        module(root)
    with pytest.raises(ValueError, match="on_bad_image='ignore': give 'error' or 'skip'"):
        module(root, on_bad_image="ignore")


def voc(root):
    """Write the COCO splits as VOC folders."""
    for split in ("train", "val", "test"):
        content = json.loads((root / f"{split}.json").read_text())
        (root / split).mkdir()
        for image, entry in zip(content["images"], content["annotations"], strict=True):
            left, top, width, height = entry["bbox"]
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (left, top, left + width, top + height), strict=True)
            box = "".join(f"<{side}>{value}</{side}>" for side, value in corners)
            name = {4: "cat", 9: "dog"}[entry["category_id"]]
            stem = image["file_name"].removesuffix(".png")
            text = f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
            (root / split / f"{stem}.xml").write_text(text)
            (root / "images" / image["file_name"]).rename(root / split / image["file_name"])
    return VocDetection(root, test="test", batch_size=2, num_workers=0, seed=3, augmentation=EVERYTHING)


def yolo(root):
    """Write the COCO splits as YOLO folders."""
    (root / "data.yaml").write_text("names: [cat, dog]\ntest: images/test\n")
    for split in ("train", "val", "test"):
        content = json.loads((root / f"{split}.json").read_text())
        (root / "images" / split).mkdir()
        (root / "labels" / split).mkdir(parents=True)
        for image, entry in zip(content["images"], content["annotations"], strict=True):
            name = image["file_name"]
            (root / "images" / name).rename(root / "images" / split / name)
            line = f"{(4, 9).index(entry['category_id'])} 0.5 0.5 0.5 0.5"
            (root / "labels" / split / f"{name.removesuffix('.png')}.txt").write_text(line)
    return YoloDetection(root, batch_size=2, num_workers=0, seed=3, augmentation=EVERYTHING)


@pytest.mark.parametrize("convert", [voc, yolo])
def test_other_formats_give_the_same_batches(root, convert):
    data = module(root, test="test.json", augmentation=EVERYTHING)
    expected = [run(loader, 1) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    for batches in expected:
        for _, targets, indices in batches:
            for target, index in zip(targets, indices, strict=True):
                target["image_id"] = index  # these formats have no ids of their own
    other = convert(root)
    assert (other.classes, other.num_classes, other.image_size) == (("cat", "dog"), 2, (20, 30))
    loaders = (other.train_dataloader(), other.val_dataloader(), other.test_dataloader())
    for batches, loader in zip(expected, loaders, strict=True):
        same(batches, run(loader, 1))


@pytest.mark.parametrize("convert", [None, voc, yolo])
def test_a_record_of_the_arguments_makes_the_same_data(root, convert):
    data = module(root, augmentation=EVERYTHING) if convert is None else convert(root)
    record = describe(data)["init_args"]
    assert list(record) == list(inspect.signature(type(data)).parameters)
    again = type(data)(**(record | {"augmentation": BoxAugmentation(**record["augmentation"])}))
    same(run(data.train_dataloader()), run(again.train_dataloader()))


def test_yolo_needs_the_names_of_the_classes(root):
    with pytest.raises(ValueError, match="give the names of the classes"):
        YoloDetection(root)


def strip(root):
    """Make one training image a strip of 500x2 pixels."""
    content = json.loads((root / "train.json").read_text())
    first = content["images"][0]
    Image.new("RGB", (500, 2)).save(next(root.rglob(first["file_name"])))
    first |= {"width": 500, "height": 2}
    content["annotations"][0]["bbox"] = [1, 0, 9, 2]
    (root / "train.json").write_text(json.dumps(content))
    return first["file_name"]


def test_an_image_of_which_nothing_is_left_is_named_or_left_out(root):
    before = module(root).train_dataloader().sampler.size
    name = strip(root)
    with pytest.raises(ValueError, match=rf"{name} is 500x2 pixels, of which nothing is left at max_size=200"):
        module(root, min_size=160, max_size=200)
    with pytest.warns(UserWarning, match="1 of"):
        data = module(root, min_size=160, max_size=200, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == before - 1
    assert "nothing is left" in data.skipped[0]
    assert module(root, max_size=250).train_dataloader().sampler.size == before


def test_a_category_without_boxes_can_be_left_out(root):
    for file in ("train.json", "val.json"):
        content = json.loads((root / file).read_text())
        content["categories"].append({"id": 0, "name": "animals", "supercategory": "none"})
        (root / file).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"'animals'.*leave the class out with categories=\[...\]"):
        assert module(root).classes == ("animals", "cat", "dog")
    assert module(root, categories=("cat", "dog")).classes == ("cat", "dog")


def test_large_batches_need_few_open_files(root):
    resource = pytest.importorskip("resource")
    data = module(root)
    dataset = data.train_dataloader()._loader.dataset
    many = Repeated(dataset, 128)
    options = {"batch_size": 64, "shuffle": False, "collate": collate_detection}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the loader hangs"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    signal.alarm(60)
    try:
        batches = list(FolderLoader(many, num_workers=2, **options))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    same(batches, list(FolderLoader(many, **options)))


class Repeated:
    """Give the samples of a data set again and again."""

    def __init__(self, dataset, count):
        self.dataset, self.count = dataset, count

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        image, target, _ = self.dataset[key[0], key[1] % len(self.dataset)]
        return image, target, key[1]
