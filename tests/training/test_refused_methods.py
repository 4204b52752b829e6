"""Methods that cannot serve the data's task are refused before anything is trained, with what to take instead."""

from functools import partial

import pytest
import tiny_models
import tiny_segmenters
from short_trainings import arrays, train
from small_detectors import detector, facts
from torch import nn

from diffkd import CIRKD, CRD, DKD, FGD, KD, PKT, RKD, SP, SRRL, BoxKD, FitNet, MasKD, Pair, Shared
from diffkd.data import Augmentation, SegmentationScenes
from diffkd.tasks.data_facts import facts_of
from diffkd.training.models import build_distiller


class Boxed(FitNet):
    """Of a user, who says what it needs but not what for."""

    needs = ("boxes",)


class Onward(FitNet):
    needs = ("teacher_head",)


def classify(images, method, pairs="auto", teacher=tiny_models.large, **options):
    data = facts_of(arrays(images, **options))
    models = tiny_models.small(6, 3), teacher(6, 3)
    return build_distiller(*models, None, data=data, pairs=pairs, method=method, seed=0)


def segment(method, pairs="auto"):
    data = facts_of(SegmentationScenes(train_count=4, val_count=2, size=(32, 32), batch_size=2))
    models = tiny_segmenters.small(11, 3), tiny_segmenters.large(11, 3)
    return build_distiller(*models, None, data=data, pairs=pairs, method=method, seed=0)


def detect(method):
    return build_distiller(detector(), detector(seed=1), None, data=facts(), pairs="auto", method=method, seed=0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CIRKD, "CIRKD is for segmentation, the data are for classification: take DiffKD"),
        (FGD, "FGD is for detection, the data are for classification: take DiffKD"),
        (partial(FGD, temperature=0.8), "FGD is for detection"),
        (partial(Shared, method=partial(FGD, temperature=0.8)), "FGD is for detection"),
        ([KD, BoxKD], "BoxKD is for detection"),
        (Boxed, "Boxed of pair '0' needs boxes, which data for classification do not give: take DiffKD"),
    ],
)
def test_classification(image_files, method, message):
    with pytest.raises(ValueError, match=message):
        classify(image_files, method)
    own = method[-1] if isinstance(method, list) else method
    with pytest.raises(ValueError, match=message):
        classify(image_files, None, [Pair(["0"] if isinstance(own, partial) else "0", method=own)])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CRD, "CRD is for classification, the data are for segmentation: take DiffKD, FitNet, CWD"),
        (SRRL, "SRRL is for classification"),
        (FGD, "FGD is for detection"),
        (MasKD, "MasKD of pair 'body' needs teacher_head, .* on the class map itself it may need none"),
    ],
)
def test_segmentation(method, message):
    with pytest.raises(ValueError, match=message):
        segment(method)


def test_where_methods_serve_nothing_is_said():
    segment(None, [Pair("scorer", method=MasKD)])
    for method in (CIRKD, DKD):
        segment(method)
    detect(FGD)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CIRKD, "CIRKD is for segmentation, the data are for detection: take .* BoxKD for the outputs"),
        (CRD, "CRD is for classification"),
        (MasKD, r"MasKD of pair 'backbone\[0\]' needs labels, teacher_head, which data for detection do not give"),
        (KD, "nothing to pair for KD, which wants logits: .* detectors score boxes, which BoxKD compares"),
    ],
)
def test_detection(method, message):
    with pytest.raises(ValueError, match=message):
        detect(method)


@pytest.mark.parametrize("method", [RKD, SP, PKT, partial(Shared, method=SP)])
def test_relations_want_several_images(image_files, method):
    with pytest.raises(ValueError, match=r"learns nothing from batches of 1: give --data.batch_size 2 or more"):
        classify(image_files, method, batch_size=1)
    classify(image_files, method, batch_size=2)
    classify(image_files, KD, batch_size=1)


def test_mixed_images_have_no_class(image_files):
    for mixed in ({"mixup": 0.2}, {"cutmix": 1.0}):
        for method in (DKD, CRD):
            with pytest.raises(ValueError, match=r"needs the class of each image, but the data mix them.* set both to"):
                classify(image_files, method, augmentation=Augmentation(**mixed))
        classify(image_files, KD, augmentation=Augmentation(**mixed))


class Convolutional(nn.Sequential):
    """Has no linear layer, and an activation that no module shows."""

    def __init__(self, classes, channels):
        super().__init__(nn.Conv2d(channels, 12, 3, 2, 1), nn.Conv2d(12, classes, 4))

    def forward(self, images):
        return self[1](self[0](images).relu()).flatten(1)


def test_the_teachers_head_must_go_on_from_the_feature(image_files):
    message = "Onward of pair '0' needs the teacher's classifier, but the teacher's last linear layer is missing; pair"
    with pytest.raises(ValueError, match=message):
        classify(image_files, Onward, teacher=Convolutional)


def test_dkd_takes_class_maps_coarser_than_the_masks(tmp_path):
    file = tiny_segmenters.__file__
    data = SegmentationScenes(train_count=4, val_count=2, size=(16, 16), batch_size=2)
    result = train(data, tmp_path, file, method=DKD, epochs=1)
    assert result["last"]["train/scorer/kd"] > 0
