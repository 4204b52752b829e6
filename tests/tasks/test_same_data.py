"""Runs go on with the data that they began with."""

import signal

import pytest
import torch
from short_trainings import arrays, signal_self, train

from diffkd.data.classification.image_folder import FolderDataset
from diffkd.data.detection.annotated_files import Annotations, ImageBoxes
from diffkd.data.detection.dataset import DetectionDataset
from diffkd.data.folders import FolderSamples
from diffkd.data.loaders import FolderLoader
from diffkd.data.segmentation.dataset import PairDataset
from diffkd.data.segmentation.pairs import Pairs
from diffkd.tasks.data_facts import describe_samples
from diffkd.training.checkpointing import Interrupted

NAMES = ("ant", "bee", "cat", "dog", "emu", "fox")


CHANGES = [
    ({"names": ("ant", "bee", "cow", "dog", "emu", "fox")}, "class 2 is 'cat' there, 'cow' here"),
    ({"names": (*NAMES, "gnu"), "count": 63}, "class 6 is None there, 'gnu' here"),
    ({"count": 61}, "training images is 60 there, 61 here"),
    ({"shift": 1}, "other names or labels"),
]


@pytest.mark.parametrize("trip", [2, 8])
def test_other_data_are_refused(tmp_path, model_file, named_files, trip):
    with pytest.raises(Interrupted):
        train(arrays(named_files(NAMES), trip, signal_self(signal.SIGTERM)), tmp_path / "run", model_file)
    for change, message in CHANGES:
        with pytest.raises(ValueError, match=rf"{message}.*give another --out"):
            train(arrays(named_files(**({"names": NAMES} | change))), tmp_path / "run", model_file, resume=True)
    assert train(arrays(named_files(NAMES)), tmp_path / "run", model_file, resume=True)["last"]["epoch"] == 3


def annotations(label: int) -> Annotations:
    box = ImageBoxes(torch.ones(1, 4), torch.tensor([label]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return Annotations(torch.tensor([7]), torch.tensor([0, 1]), box)


@pytest.mark.parametrize(
    "build",
    [
        lambda name: FolderDataset(FolderSamples([name], [0]), torch.nn.Identity()),
        lambda name: PairDataset(Pairs([name], ["mask"], [(1, 1)]), None, None),
        lambda name: DetectionDataset(annotations(len(name)), None),
    ],
)
def test_files_tell_their_samples_apart(build):
    def seen(name):
        return describe_samples(FolderLoader(build(name), batch_size=1, shuffle=False))

    assert seen("a")["training images"] == 1
    assert seen("a") == seen("a") != seen("bb")


def test_loaders_that_tell_nothing_are_believed():
    loader = torch.utils.data.DataLoader([0, 1, 2])
    assert describe_samples(loader) == {"training images": 3, "digest": None}
    assert describe_samples(iter(())) == {"training images": None, "digest": None}
