"""Trainings that read their teacher from a cache learn what they would have learned from the teacher itself."""

import numpy as np
import pytest
import tiny_segmenters
import torch
from PIL import Image
from short_trainings import Tripwire, arrays, fail, same_weights, train
from two_processes import run_in_two

from diffkd import KD, FitNet, TeacherOptions, read_weights, save_student
from diffkd.data import Arrays, Augmentation, MaskFolder, SegmentationAugmentation
from diffkd.distill.distiller import Distiller
from diffkd.models import load_model
from diffkd.training.cached_teacher import random_parts

PLAIN = Augmentation()
FLIPS = Augmentation(crop_padding=1, flip=True)
WIDE = {"precision": "64-true"}  # of float32 there is then only what the cache stores


@pytest.fixture(scope="module")
def teacher_file(model_file, tmp_path_factory):
    """Weights, since a teacher without is another one in every run."""
    torch.manual_seed(7)
    model = load_model(f"{model_file}:large", num_classes=6, in_channels=3)
    return str(save_student(model, tmp_path_factory.mktemp("teacher") / "teacher.safetensors"))


@pytest.fixture
def passes(monkeypatch):
    """The sizes of the batches that teachers have run on."""
    seen = []
    run = Distiller._teach

    def counted(self, inputs, calls):
        seen.append(len(inputs))
        return run(self, inputs, calls)

    monkeypatch.setattr(Distiller, "_teach", counted)
    return seen


@pytest.fixture
def learn(image_files, model_file, teacher_file):
    def start(out, augmentation=PLAIN, data=None, **options):
        data = arrays(image_files, augmentation=augmentation) if data is None else data
        options = {"method": FitNet, "teacher_weights": teacher_file} | options
        return train(data, out, model_file, **options)

    return start


def weights(folder):
    return read_weights(folder / "student.safetensors")


def close(one, other, **tolerances):
    torch.testing.assert_close(weights(one), weights(other), **tolerances)


def test_fixed_images_teach_the_same_from_one_pass(tmp_path, learn, passes):
    learn(tmp_path / "without", **WIDE)
    assert sum(passes) == 3 * 60
    passes.clear()
    learn(tmp_path / "exact", teacher_cache=tmp_path / "exact-cache", teacher_cache_storage="float32", **WIDE)
    assert sum(passes) == 60 + 2  # two for the shapes
    close(tmp_path / "exact", tmp_path / "without", rtol=1e-5, atol=1e-6)
    learn(tmp_path / "rounded", teacher_cache=tmp_path / "cache", **WIDE)
    close(tmp_path / "rounded", tmp_path / "without", rtol=1e-2, atol=1e-2)
    passes.clear()
    learn(tmp_path / "again", teacher_cache=tmp_path / "cache", **WIDE)  # a second student of the same kind
    assert passes == [2]
    assert same_weights(tmp_path / "again" / "student.safetensors", tmp_path / "rounded" / "student.safetensors")
    learn(tmp_path / "other", teacher_cache=tmp_path / "cache", seed=5, epochs=1, data=None, **WIDE)
    assert passes == [2, 2]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Twenty images for training, twelve for evaluation, with masks of two classes."""
    root, draw = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 12)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = draw.integers(0, 2, (32, 32), dtype=np.uint8)
            image = (120 * mask[..., None] + draw.integers(0, 90, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{index:02}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index:02}.png")
    return root


def test_a_split_drawn_by_another_seed_finds_no_feature_of_another_image(tmp_path, masked, passes):
    models = tiny_segmenters.__file__
    torch.manual_seed(7)
    weights = save_student(tiny_segmenters.large(2, 3), tmp_path / "teacher.safetensors")

    def run(name, seed, **options):
        plain = SegmentationAugmentation()
        data = MaskFolder(masked, num_classes=2, resize=(32, 32), augmentation=plain, seed=seed, **options)
        how = {"teacher_cache": tmp_path / f"{len(options)}-cache", "teacher_weights": str(weights), "epochs": 1}
        train(data, tmp_path / name, models, method=KD, seed=seed, **how)

    run("first", 0, num_workers=0, val_share=0.2)
    with pytest.raises(ValueError, match=r"data\.samples is '\w+' there, '\w+' here; give another folder"):
        run("second", 1, num_workers=0, val_share=0.2)
    run("fixed", 0, num_workers=0)
    passes.clear()
    run("again", 1, num_workers=0)  # of the same images, in another order
    assert passes == [2]


def test_other_images_of_the_same_labels_find_no_feature(tmp_path, learn, image_files):
    files = image_files | {"train": str(tmp_path / "train.npz")}
    cache = {"teacher_cache": tmp_path / "cache", "epochs": 1}
    content = dict(np.load(image_files["train"]))
    np.savez(files["train"], **content)
    learn(tmp_path / "first", data=arrays(files, augmentation=PLAIN), **cache)
    content["images"][30] = 255 - content["images"][30]
    np.savez(files["train"], **content)
    with pytest.raises(ValueError, match=r"data\.samples is"):
        learn(tmp_path / "second", data=arrays(files, augmentation=PLAIN), **cache)


class Undigested(Arrays):
    """Data of one's own, whose loader does not say which samples it has."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader = Tripwire(loader, -1, fail)
        loader.digest = loader.image_digest = None
        return loader


def test_without_a_digest_the_seed_stands_for_the_samples(tmp_path, learn, image_files):
    def run(name, seed):
        data = Undigested(image_files["train"], image_files["test"], augmentation=PLAIN, batch_size=10, seed=seed)
        learn(tmp_path / name, data=data, teacher_cache=tmp_path / "cache", epochs=1)

    run("first", 0)
    run("second", 0)
    with pytest.raises(ValueError, match=r"data\.seed is 0 there, 1 here"):
        run("third", 1)


def test_augmented_views_are_repeated_and_cached(tmp_path, learn, passes):
    options = {"augmentation": FLIPS, "teacher_views": 2, "epochs": 5} | WIDE
    learn(tmp_path / "without", **options)
    passes.clear()
    cached = options | {"teacher_cache": tmp_path / "cache", "teacher_cache_storage": "float32"}
    learn(tmp_path / "with", **cached)
    assert sum(passes) == 2 * 60 + 2
    close(tmp_path / "with", tmp_path / "without", rtol=1e-5, atol=1e-6)
    learn(tmp_path / "anew", augmentation=FLIPS, epochs=5, **WIDE)
    assert not same_weights(tmp_path / "anew" / "student.safetensors", tmp_path / "with" / "student.safetensors")


def test_interruptions(tmp_path, learn, image_files, passes):
    options = {"teacher_cache": tmp_path / "cache", "save_every_steps": 1}
    learn(tmp_path / "whole", **options | {"teacher_cache": tmp_path / "other-cache"})
    passes.clear()
    broken = arrays(image_files, augmentation=PLAIN)
    broken.train_dataloader = lambda: Tripwire(arrays(image_files, augmentation=PLAIN).train_dataloader(), 3, fail)
    with pytest.raises(ConnectionError):
        learn(tmp_path / "run", data=broken, **options)
    assert passes == [2, 10, 10, 10]
    passes.clear()
    learn(tmp_path / "run", data=arrays(image_files, augmentation=PLAIN), resume=True, **options)
    assert passes == [2, 10, 10, 10]
    assert same_weights(tmp_path / "run" / "student.safetensors", tmp_path / "whole" / "student.safetensors")


def test_mismatches_are_named(tmp_path, learn, image_files, model_file):
    options = {"teacher_cache": tmp_path / "cache", "epochs": 1}
    learn(tmp_path / "first", **options)
    torch.manual_seed(8)
    other = save_student(load_model(f"{model_file}:large", num_classes=6, in_channels=3), tmp_path / "x.safetensors")
    for number, (changes, message) in enumerate(
        [
            ({"teacher_weights": str(other)}, "teacher.weights is"),
            ({"teacher_options": TeacherOptions(precision="bf16")}, "teacher.options.precision is 'same' there"),
            (
                {"data": arrays({**image_files, "train": image_files["test"]}, augmentation=PLAIN)},
                "samples is 60 there",
            ),
            ({"method": KD}, "layer 'output' is not there"),
            ({"precision": "bf16-mixed"}, "precision is '32-true' there"),
            ({"teacher_views": 1}, "views is None there, .*'seed': 0"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            learn(tmp_path / str(number), **options | changes)


@pytest.mark.parametrize(
    ("augmentation", "changes", "message"),
    [
        (FLIPS, {}, r"crop_padding=1, flip=True.*teacher_views"),
        (Augmentation(mixup=0.2), {"teacher_views": 2}, "mixup=0.2"),
        (Augmentation(cutmix=1.0), {}, "cutmix=1.0"),
        (PLAIN, {"teacher_views": 0}, "teacher_views=0"),
        (PLAIN, {"num_nodes": 2}, "2 machines"),
    ],
)
def test_what_cannot_be_cached(tmp_path, learn, augmentation, changes, message):
    with pytest.raises(ValueError, match=message):
        learn(tmp_path / "run", augmentation, teacher_cache=tmp_path / "cache", **changes)
    assert not (tmp_path / "cache").exists()


def test_a_teacher_whose_state_is_more_than_tensors(tmp_path, learn, image_files, model_file, passes):
    """Its extra state decides about it as its weights do; what cannot be compared is refused."""
    file = tmp_path / "models.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from tiny_models import small, large as plain\n"
        "class Extra(nn.Identity):\n"
        "    state = {'scale': torch.ones(2), 'names': ['a', 1, None]}\n"
        "    def get_extra_state(self): return self.state\n"
        "    def set_extra_state(self, state): pass\n"
        "def large(num_classes, in_channels):\n"
        "    torch.manual_seed(3)\n"
        "    net = plain(num_classes, in_channels)\n"
        "    net.append(Extra())\n"
        "    return net\n"
    )

    def run(name):
        data = arrays(image_files, augmentation=PLAIN)
        options = {"method": FitNet, "epochs": 1, "teacher_cache": tmp_path / "cache"}
        return train(data, tmp_path / name, str(file), **options)

    run("first")
    passes.clear()
    run("second")
    assert len(passes) <= 1  # to see the shapes
    for state, message in (("{'names': ['b']}", "weights"), ("{'names': object()}", "'5._extra_state' .* is a object")):
        file.write_text(file.read_text() + f"Extra.state = {state}\n")
        with pytest.raises(ValueError, match=message):
            run("third")


def test_random_parts_are_found(image_files):
    class Folder:
        augmentation, min_crop_area = Augmentation(random_erasing=0.5), 0.3

    assert random_parts(arrays(image_files, augmentation=PLAIN)) == []
    assert random_parts(Folder()) == ["random_erasing=0.5", "the random crop of min_crop_area=0.3"]
    assert random_parts(object()) is None


def train_half(files, out, models, teacher, folder):
    data = arrays(files, augmentation=Augmentation(), batch_size=5)
    options = {"teacher_cache": folder, "teacher_weights": teacher, "devices": 2, "epochs": 1}
    train(data, out, models, method=FitNet, **options)


def test_two_processes_share_it(tmp_path, learn, image_files, model_file, teacher_file, passes):
    folder = tmp_path / "cache"
    given = (image_files, tmp_path / "run", model_file, teacher_file, folder)
    codes, said = run_in_two(tmp_path / "log", train_half, *given)
    assert codes == [0, 0], said
    assert sorted(path.name for path in folder.glob("valid-*")) == ["valid-0.bin", "valid-1.bin"]
    marks = [(folder / f"valid-{rank}.bin").read_bytes() for rank in (0, 1)]
    assert [max(pair) for pair in zip(*marks, strict=True)] == [1] * 60
    assert all(0 < sum(mark) < 60 for mark in marks)
    learn(tmp_path / "alone", teacher_cache=folder)  # reads what the two have written
    assert passes == [2]


def test_layers_that_do_not_have_the_images_first_cannot_be_cached(tmp_path, learn):
    file = tmp_path / "sequences.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.patches, self.head = nn.Conv2d(in_channels, 4, 2, 2), nn.Linear(4, num_classes)\n"
        "        self.layer = nn.TransformerEncoderLayer(4, 1, 4)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.layer(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0))\n"
        "def net(num_classes, in_channels): return Net(num_classes, in_channels)\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"teacher's layer 'layer' returns \(.*\) for 2 images, and features are kept"):
        learn(
            tmp_path / "run",
            teacher=f"{file}:net",
            teacher_weights=None,
            teacher_cache=tmp_path / "cache",
        )
