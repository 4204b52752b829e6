import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.data import MaskFolder, SegmentationAugmentation
from diffkd.data.loaders import FolderLoader
from diffkd.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from diffkd.files.config import describe
from diffkd.tasks.data_facts import facts_of

EVERYTHING = SegmentationAugmentation(scale=(0.5, 2.0), flip=True, color_jitter=0.4, hue=0.05, max_class_share=0.75)
GREY = 40  # of a pixel of class 1; class 0 is black


def pair(root, split, name, size, ids=None):
    """Write an image whose pixels are grey by their class, and its mask."""
    random = np.random.default_rng(len(name) + size[0])
    ids = random.integers(0, 3, size, dtype=np.uint8) if ids is None else ids
    for folder, pixels in (("images", np.repeat(ids[..., None] * GREY, 3, axis=2)), ("masks", ids)):
        path = root / split / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root / split / "masks" / f"{name}.png"


@pytest.fixture
def root(tmp_path):
    for index in range(5):
        pair(tmp_path, "train", str(index), (20 + index, 30 - index))
    for index, size in enumerate([(9, 13), (9, 13), (13, 9), (9, 13), (9, 13)]):
        pair(tmp_path, "val", str(index), size)
    return tmp_path


def module(root, **options):
    given = {"num_classes": 3, "batch_size": 2, "crop_size": (16, 24), "num_workers": 0, "seed": 3}
    return MaskFolder(root, **(given | options))


def same(first, second):
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


def as_bytes(images):
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((images.movedim(1, -1) * std + mean) * 255).round().long()


def test_the_module_says_what_it_is(root):
    data = module(root)
    assert (data.task, data.num_classes, data.in_channels, data.ignore_index) == ("segmentation", 3, 3, 255)
    assert data.classes == ("class 0", "class 1", "class 2")
    assert (data.image_size, data.mean, data.std) == ((16, 24), IMAGENET_MEAN, IMAGENET_STD)
    assert data.example().shape == (2, 3, 16, 24)
    assert facts_of(data).num_classes == 3
    assert MaskFolder(root, num_classes=3).image_size == (512, 512)
    assert MaskFolder(root, num_classes=3, resize=(8, 10)).image_size == (8, 10)


def test_training_batches_show_what_masks_say(root):
    data = module(root, augmentation=SegmentationAugmentation(flip=True), batch_size=1)
    indices = []
    for images, masks, chosen in data.train_dataloader():
        assert (images.shape, masks.shape, masks.dtype) == ((1, 3, 16, 24), (1, 16, 24), torch.int64)
        assert torch.equal(as_bytes(images)[..., 0], masks * GREY)
        indices += chosen.tolist()
    assert sorted(indices) == list(range(5))


def test_evaluation_is_of_whole_images_and_only_equal_sizes_share_a_batch(root):
    data = module(root, val_batch_size=4)
    loader = data.val_dataloader()
    batches = list(loader)
    assert [batch[2].tolist() for batch in batches] == [[0, 1], [2], [3, 4]]
    assert len(loader) == 3
    for images, masks, indices in batches:
        assert images.shape[-2:] == masks.shape[1:]
        assert torch.equal(as_bytes(images)[..., 1], masks * GREY)
        for mask, index in zip(masks, indices.tolist(), strict=True):
            with Image.open(root / "val" / "masks" / f"{index}.png") as stored:
                assert np.array_equal(mask, np.asarray(stored))
    assert [len(batch[2]) for batch in module(root).val_dataloader()] == [1] * 5


def test_resized_data_are_evaluated_small_or_against_their_own_masks(root):
    small = module(root, resize=(6, 8), crop_size=None, val_batch_size=4)
    assert [(tuple(images.shape), tuple(masks.shape)) for images, masks, _ in small.val_dataloader()] == [
        ((4, 3, 6, 8), (4, 6, 8)),
        ((1, 3, 6, 8), (1, 6, 8)),
    ]
    assert next(iter(small.train_dataloader()))[0].shape == (2, 3, 6, 8)
    full = module(root, resize=(6, 8), full_size_masks=True, val_batch_size=4)
    assert [(tuple(images.shape), tuple(masks.shape)) for images, masks, _ in full.val_dataloader()] == [
        ((2, 3, 6, 8), (2, 9, 13)),
        ((1, 3, 6, 8), (1, 13, 9)),
        ((2, 3, 6, 8), (2, 9, 13)),
    ]


def test_results_do_not_depend_on_workers_or_the_cache(root):
    state = torch.get_rng_state()
    alone = list(module(root, augmentation=EVERYTHING).train_dataloader())
    same(alone, list(module(root, augmentation=EVERYTHING, num_workers=1).train_dataloader()))
    kept = module(root, augmentation=EVERYTHING, cache="memory").train_dataloader()
    same(alone, list(kept))
    same(alone, list(kept))  # the augmentation of one epoch leaves what is kept as it was
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_kept_is_not_read_again(root):
    data = module(root, cache="memory", num_workers=None)
    assert data.num_workers == 0
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    for path in root.rglob("*.png"):
        path.unlink()
    same(train, list(data.train_dataloader()))
    same(val, list(data.val_dataloader()))


def test_epochs_differ_and_repeat(root):
    loader = module(root, augmentation=EVERYTHING).train_dataloader()
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
    loader.set_epoch(0)
    same(list(loader), first)


@pytest.mark.parametrize("start", [1, 2])
def test_a_resume_sees_the_rest(root, start):
    data = module(root, augmentation=EVERYTHING, batch_size=2)
    whole = list(data.train_dataloader())
    data.start_batch = start
    if start < len(whole):
        same(list(data.train_dataloader()), whole[start:])
    else:
        assert list(data.train_dataloader()) == []


def test_two_ranks_equal_one_process(root):
    def batches(rank, world_size, batch_size, shuffle):
        dataset = getattr(module(root, augmentation=EVERYTHING)._loaders, "train" if shuffle else "val")
        return list(
            FolderLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffle,
                seed=3,
                rank=rank,
                world_size=world_size,
                sizes=None if shuffle else dataset.sizes(),
            )
        )

    for whole, *shards in zip(batches(0, 1, 4, True), batches(0, 2, 2, True), batches(1, 2, 2, True), strict=False):
        for part in range(3):
            together = torch.stack([shard[part] for shard in shards], dim=1).flatten(0, 1)
            assert torch.equal(together, whole[part][: len(together)])
    seen = [index for rank in (0, 1) for batch in batches(rank, 2, 4, False) for index in batch[2].tolist()]
    assert sorted(seen) == list(range(5))


def test_val_is_chosen_and_test_stands_in(root):
    pair(root, "test", "only", (5, 6))
    assert len(list(module(root, val="test").val_dataloader())) == 1
    assert module(root).val == "val"
    (root / "val").rename(root / "dev")
    assert module(root).val == "test"
    pair(root, "valid", "only", (5, 6))
    assert module(root).val == "valid"
    assert len(list(module(root, val="dev").test_dataloader())) == 5
    with pytest.raises(FileNotFoundError, match=r"nope/images: no such folder"):
        module(root, val="nope")


def test_folders_may_lie_the_other_way_round(root, tmp_path):
    (root / "img").mkdir()
    (root / "seg").mkdir()
    for split in ("train", "val"):
        (root / split / "images").rename(root / "img" / split)
        (root / split / "masks").rename(root / "seg" / split)
    data = module(root, images="img/{split}", masks="seg/{split}", mask_suffix=".png")
    assert len(data.val_dataloader()) == 5


def test_a_name_for_the_ignored_id_is_no_class(root):
    (root / "classes.txt").write_text("sky\nroad\nvoid\n")
    data = module(root, classes="classes.txt", num_classes=None, ignore_index=2)
    assert data.classes == ("sky", "road")
    assert data.num_classes == 2
    masks = torch.cat([batch[1].flatten() for batch in data.val_dataloader()])
    assert masks.unique().tolist() == [0, 1, 2]
    padded = torch.cat(
        [
            batch[1].flatten()
            for batch in module(
                root, classes=["a", "b"], num_classes=None, ignore_index=2, crop_size=(40, 40)
            ).train_dataloader()
        ]
    )
    assert padded.unique().tolist() == [0, 1, 2]


def test_other_ids_are_mapped(root):
    data = module(root, num_classes=2, id_map={"2": 0, "1": 1})
    images, masks, _ = next(iter(data.val_dataloader()))
    grey = as_bytes(images)[..., 0]
    assert torch.equal(masks == 0, grey == 2 * GREY)
    assert torch.equal(masks == 1, grey == GREY)
    assert torch.equal(masks == 255, grey == 0)


def test_masks_of_colours(root):
    for path in root.glob("*/masks/*.png"):
        with Image.open(path) as image:
            ids = np.asarray(image)
        Image.fromarray(np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], dtype=np.uint8)[ids]).save(path)
    colors = {"a": (9, 0, 0), "b": (0, 9, 0), "c": (0, 0, 9)}
    data = module(root, num_classes=None, colors=colors)
    assert data.classes == ("a", "b", "c")
    images, masks, _ = next(iter(data.val_dataloader()))
    assert torch.equal(as_bytes(images)[..., 0], masks * GREY)
    (root / "colors.json").write_text(json.dumps(colors))
    data = module(root, num_classes=None, colors="colors.json", classes=["c", "a"])
    images, masks, _ = next(iter(data.val_dataloader()))
    assert torch.equal(as_bytes(images)[..., 0], torch.tensor([GREY * 2, 0] + [0] * 253 + [GREY])[masks])
    del colors["b"]
    with pytest.raises(ValueError, match=r"masks/.*png holds colour \(0, 9, 0\)"):
        list(module(root, num_classes=None, colors=colors).val_dataloader())
    ignoring = module(root, num_classes=None, colors=colors, unknown_colors="ignore")
    assert set(next(iter(ignoring.val_dataloader()))[1].unique().tolist()) == {0, 1, 255}
    with pytest.raises(ValueError, match="mode RGB where class ids are expected"):
        module(root)
    with pytest.raises(ValueError, match="colors: none for 'd'"):
        module(root, num_classes=None, colors=colors, classes=["a", "d"])


def test_three_hundred_classes_need_another_ignored_id(root):
    for split in ("train", "val"):
        for path in (root / split / "masks").iterdir():
            with Image.open(path) as image:
                ids = np.asarray(image)
            Image.fromarray(np.array([0, 299, 65535], dtype=np.uint16)[ids]).save(path)
    with pytest.raises(ValueError, match="ignore_index=255 is one of the 300 classes"):
        module(root, num_classes=300)
    data = module(root, num_classes=300, ignore_index=65535, resize=(6, 7), crop_size=None)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))[1].unique().tolist() == [0, 299, 65535]


def test_masks_in_which_nothing_counts_are_noticed_at_the_start(root):
    for index, size in enumerate([(9, 13), (9, 13), (13, 9), (9, 13)]):
        pair(root, "val", str(index), size, np.full(size, 255, dtype=np.uint8))
    module(root)  # one of five will do
    pair(root, "val", "4", (9, 13), np.full((9, 13), 255, dtype=np.uint8))
    with pytest.warns(UserWarning, match=r"nothing to evaluate on: every pixel of every mask is ignored \(id 255\)"):
        module(root)
    with pytest.raises(ValueError, match=r"nothing to train on: .* is ignored \(id 255\), .*0.png. Check num_classes"):
        module(root, id_map={7: 0, 8: 1, 9: 2})


def test_masks_of_a_single_class_are_refused_at_the_start(root):
    binary = np.zeros((9, 13), dtype=np.uint8)
    binary[:4] = 255
    for index in range(5):
        pair(root, "train", str(index), (9, 13), binary)
    with pytest.raises(ValueError, match=r"every pixel .* is of class 0 or ignored \(id 255\).*id_map={0: 0, 255: 1}"):
        module(root, num_classes=2)
    module(root, num_classes=2, id_map={0: 0, 255: 1})
    pair(root, "train", "3", (9, 13), binary // 255)  # one of five will do
    module(root)


@pytest.mark.parametrize("options", [{"verify": True}, {"on_bad_image": "skip"}])
def test_classes_that_no_training_mask_holds_are_told_of_where_all_masks_are_read(root, options):
    pair(root, "train", "4", (9, 13), np.full((9, 13), 4, dtype=np.uint8))
    module(root, num_classes=8)
    with pytest.warns(
        UserWarning, match=r"no training mask holds class\(es\) 3, 5, 6, 7, which cannot be learned"
    ) as seen:
        module(root, num_classes=8, **options)
    assert len(seen) == 1


def test_bad_ids_stop_with_their_file_or_before_with_verify(root):
    ids = np.full((9, 13), 7, dtype=np.uint8)
    path = pair(root, "val", "bad", (9, 13), ids)
    with pytest.raises(ValueError, match=rf"{path} holds id 7 at row 0, column 0"):
        list(module(root).val_dataloader())
    broken = root / "train" / "images" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"2 of 11 pairs are broken") as error:
        module(root, verify=True)
    assert f"image {broken} cannot be read" in str(error.value)
    assert f"mask {path} holds id 7" in str(error.value)


def test_skip_leaves_broken_pairs_out_and_says_so(root):
    (root / "train" / "images" / "0.png").write_bytes(b"")  # found by its head
    cut = root / "train" / "masks" / "3.png"
    cut.write_bytes(cut.read_bytes()[:-40])  # when it is decoded
    bad = pair(root, "val", "4", (9, 13), np.full((9, 13), 7, dtype=np.uint8))
    with pytest.warns(UserWarning, match="pairs are left out") as warned:
        data = module(root, on_bad_image="skip", val_batch_size=2)
    assert [str(one.message).split(" left")[0] for one in warned] == [
        "2 of 5 training pairs are",
        "1 of 5 evaluation pairs are",
    ]
    assert len(data.skipped) == 3
    assert f"mask {bad} holds id 7" in data.skipped[2]
    assert [len(batch[2]) for batch in data.train_dataloader()] == [2]  # the last, alone, is dropped
    assert [len(batch[2]) for batch in data.val_dataloader()] == [2, 1, 1]
    with pytest.raises(
        ValueError, match=r"5 of 5 training pairs are broken, so that none is left:[\s\S]*colour \(1, 1, 1\)"
    ):
        module(root, on_bad_image="skip", num_classes=None, colors={"a": (0, 0, 0)})


def test_a_mask_that_changed_its_size_is_noticed(root):
    data = module(root)
    pair(root, "val", "0", (4, 4))
    (root / "val" / "images" / "0.png").unlink()
    Image.new("RGB", (5, 4)).save(root / "val" / "images" / "0.png")
    with pytest.raises(ValueError, match=r"images/0.png is \(4, 5\) .*masks/0.png is \(4, 4\)"):
        next(iter(data.val_dataloader()))


def test_a_record_makes_the_same_data_again(root):
    (root / "classes.txt").write_text("a\nb\nvoid\n")
    data = module(root, classes="classes.txt", num_classes=None, ignore_index=2, resize=(8, 9), augmentation=EVERYTHING)
    assert all(hasattr(data, name) for name in inspect.signature(MaskFolder).parameters)
    record = json.loads(json.dumps(describe(data)))
    assert record["class_path"] == "diffkd.data.segmentation.mask_folder.MaskFolder"
    arguments = record["init_args"]
    again = MaskFolder(**arguments | {"augmentation": SegmentationAugmentation(**arguments["augmentation"])})
    assert again.classes == data.classes
    same(list(again.train_dataloader()), list(data.train_dataloader()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": None}, "nothing says which classes"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"classes": ["a", "b"]}, "num_classes=3, but there are 2 names"),
        ({"classes": ["a"], "num_classes": None, "ignore_index": 0}, "the only class, 0, is ignored"),
        ({"ignore_index": 2}, "ignore_index=2 is one of the 3 classes"),
        ({"crop_size": (0, 5)}, r"crop_size=\(0, 5\)"),
        ({"resize": (5,)}, r"resize=\(5,\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_batch_size": 0}, "val_batch_size=0"),
        ({"cache": "disk"}, "cache='disk'"),
        ({"std": (1, 0, 1)}, "std above 0"),
        ({"mean": (123.7, 116.3, 103.5)}, "divided by 255"),
        ({"id_map": {4: 3}}, "id_map: 4 becomes 3"),
    ],
)
def test_options_out_of_range_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        module(root, **options)


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; give a root with train/images"):
        MaskFolder(tmp_path / "nowhere", num_classes=2)


def test_what_lacks_its_other_part_is_left_out_where_bad_images_are_skipped(root):
    expected = module(root).train_dataloader().sampler.size
    Image.new("RGB", (4, 4)).save(root / "train" / "images" / "alone.png")
    Image.new("L", (4, 4)).save(root / "train" / "masks" / "other.png")
    with pytest.raises(ValueError, match="without the other part of their pair; add it"):
        module(root)
    with pytest.warns(UserWarning, match=r"2 file\(s\) .* are left out:\s.*alone.png has no mask"):
        data = module(root, on_bad_image="skip")
    assert data.train_dataloader().sampler.size == expected
