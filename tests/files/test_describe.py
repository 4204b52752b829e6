"""Python values in words."""

import functools
import json
from pathlib import Path

import torch

from diffkd import DiffKD, FeatureShape
from diffkd.data import Arrays, Augmentation, FashionSubset
from diffkd.distill.matching import wants_of
from diffkd.files.config import class_path, describe, unwrap_factory


def test_everything_becomes_json():
    value = {
        "method": functools.partial(DiffKD, ae_channels=4),
        "optimizer": torch.optim.SGD,
        "augmentation": Augmentation(flip=True),
        "path": Path("a/b"),
        "numbers": (1, 2.5, None, True),
    }
    described = describe(value)
    assert json.loads(json.dumps(described)) == described
    assert described["method"] == {"class_path": "diffkd.methods.diffkd.DiffKD", "init_args": {"ae_channels": 4}}
    assert described["augmentation"]["flip"] is True
    assert described["path"] == "a/b"
    assert described["numbers"] == [1, 2.5, None, True]


def test_a_data_module_is_named():
    described = describe(FashionSubset(batch_size=7))
    assert described["class_path"] == class_path(FashionSubset)
    assert json.dumps(described)


def test_a_parsers_factory_shows_its_class():
    def helper(instantiate, kind, *args, **options):
        return instantiate(kind, *args, **options)

    hidden = functools.partial(helper, lambda kind, *args, **options: kind(*args, **options), DiffKD, ae_channels=3)
    assert wants_of(unwrap_factory(hidden)) == DiffKD.wants
    built = unwrap_factory(hidden)(FeatureShape(4, (2, 2)), FeatureShape(5, (2, 2)))
    assert built.latent_channels == 3


def test_other_factories_are_left_as_they_are():
    assert unwrap_factory(DiffKD) is DiffKD
    usual = functools.partial(DiffKD, ae_channels=2)
    assert unwrap_factory(usual) is usual


def test_data_of_a_run_from_python_can_be_made_again(image_files):
    data = Arrays(image_files["train"], image_files["test"], batch_size=7, seed=3, mean=(0.1,) * 3, std=(0.3,) * 3)
    arguments = describe(data)["init_args"]
    assert {name: arguments[name] for name in ("train", "test", "batch_size", "seed", "layout")} == {
        **{name: image_files[name] for name in ("train", "test")},
        **{"batch_size": 7, "seed": 3, "layout": "auto"},
    }
