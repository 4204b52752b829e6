"""The recipes of COCO, Cityscapes and ImageNet, a step with small networks on data in the layout that they name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd import save_student
from diffkd.commands import cli
from diffkd.models import load_detector, load_model, load_segmenter


def picture(path, height, width, channels=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, channels) if channels > 1 else (height, width)
    Image.fromarray(np.random.default_rng(0).integers(0, 20, shape, dtype=np.uint8)).save(path)


def coco(root):
    categories = [{"id": number, "name": f"thing {number}"} for number in (1, 2, 90)]
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 16), ("val2017", 2)):
        images, boxes = [], []
        for number in range(count):
            name = f"{number:012}.jpg"
            picture(root / split / name, 48, 64)
            images.append({"id": number, "file_name": name, "height": 48, "width": 64})
            box = {"category_id": (1, 2, 90)[number % 3], "bbox": [4.5, 6, 30, 24], "area": 720.0, "iscrowd": 0}
            boxes.append({"id": number + 1, "image_id": number, **box})
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def cityscapes(root):
    for split, city, count in (("train", "aachen", 16), ("val", "bonn", 1)):
        for number in range(count):
            stem = f"{city}/{city}_{number:06}_000019"
            picture(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", 32, 64)
            picture(root / "gtFine" / split / f"{stem}_gtFine_labelIds.png", 32, 64, channels=1)


def imagenet(root):
    for split, count in (("train", 8), ("val", 1)):
        for wnid in ("n01440764", "n01443537", "n15075141"):
            for number in range(count):
                picture(root / split / wnid / f"{wnid}_{number}.JPEG", 40, 48)


FAMILIES = {
    "coco": (
        *(coco, "coco/retinanet_resnet101-retinanet_resnet50", "retinanet/timm/test_resnet", 5),
        ["--pretrained_backbone=false", "--detection.fpn_channels=32", "--data.min_size=48", "--data.max_size=64"],
        lambda name: load_detector(name, num_classes=3, fpn_channels=32, min_size=(48,), max_size=64),
    ),
    "cityscapes": (
        *(cityscapes, "cityscapes/deeplabv3_resnet101-deeplabv3_resnet18", "smp/pspnet/timm/test_resnet", 1),
        ["--pretrained_backbone=false", "--data.crop_size=[32,64]"],
        lambda name: load_segmenter(name, num_classes=19),
    ),
    "imagenet": (
        *(imagenet, "imagenet/resnet34-resnet18", "timm/test_resnet", 2),
        ["--teacher_pretrained=false", "--method.init_args.ae_channels=16", "--data.batch_size=8"],
        lambda name: load_model(name, num_classes=3),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_goes_from_its_data_to_a_measured_student(family, tmp_path, monkeypatch, capsys):
    make_data, recipe, model, pairs, options, build = FAMILIES[family]
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data" / family)
    torch.manual_seed(0)
    save_student(build(model), tmp_path / "teacher.safetensors")
    words = ["fit", recipe, f"--student={model}", f"--teacher={model}", "--teacher_weights=teacher.safetensors"]
    words += [*options, "--max_steps=1", "--precision=32-true", "--accelerator=cpu", "--out=run", "--progress=false"]
    assert cli.main(words) == 0, capsys.readouterr().err
    metrics = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert len([name for name in metrics if name.startswith("gamma/")]) == pairs
    assert cli.main(["test", "run"]) == 0
