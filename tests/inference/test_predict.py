"""Predictions for image files: as in the evaluation, from weights and programs, in files that others read."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.commands import cli
from diffkd.commands.evaluate import evaluate
from diffkd.commands.export import export
from diffkd.commands.predict import predict
from diffkd.data import Arrays, CocoDetection, DetectionScenes, FashionSubset, SegmentationScenes
from diffkd.data.images import read_rgb
from diffkd.export.student_file import find_weights, read_card
from diffkd.files.weights import save_student
from diffkd.inference.predictor import Predictor, find_images, predict_files
from diffkd.inference.results import PredictionFiles
from diffkd.inference.students import load_student
from diffkd.models import load_backbone

QUIET = {"accelerator": "cpu", "progress": False}
TEACHERS = {
    "classification": "fashion_mnist/teacher.safetensors",
    "detection": "scenes/detection-teacher.safetensors",
    "segmentation": "scenes/teacher.safetensors",
}
RUNTIMES = {".safetensors": "pytorch", ".onnx": "onnxruntime", ".pt2": "torch.export"}


def pixels(image, data):
    mean, std = (torch.tensor(one)[:, None, None] for one in (data.mean, data.std))
    values = (image * std + mean).mul(255).round().clamp(0, 255).byte()
    return values.movedim(0, -1).squeeze().numpy()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six evaluation images of each task as PNG, one of them in a folder of its own, one larger than the others."""
    top = tmp_path_factory.mktemp("pictures")
    size = {"train_count": 2, "val_count": 6}
    data = {
        "classification": FashionSubset(),
        "detection": DetectionScenes(size=(80, 80), classes=(1, 7, 8), **size),
        "segmentation": SegmentationScenes(size=(96, 96), **size),
    }
    for task, module in data.items():
        images = [image for batch in module.val_dataloader() for image in batch[0]][:6]
        for index, image in enumerate(images):
            path = top / task / ("more" if index == 5 else "") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels(image, module))
            if index == 4:
                picture = picture.resize((picture.width + 24, picture.height + 9))
            picture.save(path)
    return top


def ids_of(path):
    """Return the pixels of a file as stored, (H, W) or (H, W, 3)."""
    with Image.open(path) as image:
        return np.array(image)


def table(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("task", list(TEACHERS))
def test_files_are_predicted_as_the_model_predicts(pictures, tmp_path, task):
    out = predict(TEACHERS[task], [str(pictures / task)], tmp_path / "out", pictures=True, batch_size=4, **QUIET)
    student = load_student(TEACHERS[task])
    found = table(out)
    key = "file_name" if task == "detection" else "file"
    assert [one[key] for one in found["images"]] == ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png"]
    image = torch.from_numpy(ids_of(pictures / task / "2.png")).float() / 255
    image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
    with torch.no_grad():
        if task == "detection":
            (expected,) = student.module([image])
            sure = expected["scores"] >= 0.3
            stated = [one for one in found["annotations"] if one["image_id"] == 3]
            assert [one["category_id"] for one in stated] == expected["labels"][sure].tolist()
            corners = torch.tensor([one["bbox"] for one in stated]).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            assert torch.allclose(corners, expected["boxes"][sure], atol=0.02)
            assert [one["name"] for one in found["categories"]] == list(student.facts.classes)
        else:
            mean, std = (torch.tensor(one)[:, None, None] for one in (student.mean, student.std))
            logits = student.module(((image - mean) / std)[None])[0]
            if task == "classification":
                best = int(logits.argmax())
                one = found["images"][2]
                assert (one["class"], one["label"]) == (student.facts.classes[best], best)
                assert one["score"] == pytest.approx(float(logits.softmax(0)[best]), abs=1e-4)
                assert [each["score"] for each in one["top"]] == sorted((e["score"] for e in one["top"]), reverse=True)
            else:
                with Image.open(tmp_path / "out" / found["images"][2]["mask"]) as mask:
                    assert mask.mode == "P"
                    assert np.array_equal(np.array(mask), logits.argmax(0).numpy())
                assert sum(found["images"][2]["share"].values()) == pytest.approx(1, abs=1e-4)
    if task == "segmentation":
        shapes = [ids_of(tmp_path / "out" / one["mask"]).shape for one in found["images"]]
        assert shapes == [(96, 96)] * 4 + [(105, 120), (96, 96)]
    drawn = sorted(
        path.relative_to(tmp_path / "out" / "pictures") for path in (tmp_path / "out").rglob("pictures/**/*.png")
    )
    assert [str(path) for path in drawn] == ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png"]


@pytest.fixture(scope="module", params=[("classification", ".pt2"), *((task, ".onnx") for task in TEACHERS)], ids=str)
def program(request, tmp_path_factory):
    """A task, a packaged teacher's weights, and the same as a program that has its card only inside."""
    task, suffix = request.param
    weights = find_weights(TEACHERS[task])
    out = tmp_path_factory.mktemp("program") / f"student{suffix}"
    export(str(weights), out, normalize=suffix == ".onnx")
    out.with_name(f"{out.name}.json").unlink()
    return task, weights, out


def test_a_program_predicts_as_its_student(pictures, program):
    task, weights, file = program
    files = find_images([str(pictures / task)])
    del files["4.png"]  # of another size, which a fixed program resizes
    results = {}
    for source in (weights, file):
        student = load_student(source)
        assert student.runtime == RUNTIMES[source.suffix]
        results[source] = [one.found for one in predict_files(Predictor(student), files, batch_size=3)]
    for ours, theirs in zip(results[weights], results[file], strict=True):
        if task == "classification":
            assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-4)
        elif task == "segmentation":
            assert (ours["ids"] == theirs["ids"]).float().mean() > 0.999
        else:
            sure = ours["scores"] > 0.2  # below, near ties may come in another order
            assert torch.allclose(ours["boxes"][sure], theirs["boxes"][: int(sure.sum())], atol=1e-2)
            assert torch.equal(ours["labels"][sure], theirs["labels"][: int(sure.sum())])


def test_a_program_takes_images_of_any_size(pictures, program):
    task, weights, file = program
    path = pictures / task / "4.png"
    (prediction,) = predict_files(Predictor(load_student(file)), {"a": path})
    (plain,) = predict_files(Predictor(load_student(weights)), {"a": path})
    width, height = prediction.image.size
    if task == "detection":
        found = prediction.found["boxes"]
        assert len(found)
        assert (found >= 0).all()
        assert (found <= torch.tensor([width, height] * 2)).all()
        # The best box is found at the same place at either scale.
        assert float((found[0] - plain.found["boxes"][0]).abs().max()) < 0.25 * max(width, height)
    elif task == "segmentation":
        # This network pools to fixed cells, so its program is of one size, and images are resized.
        assert prediction.found["ids"].shape == plain.found["ids"].shape == (height, width)
    else:
        assert torch.allclose(prediction.found["scores"], plain.found["scores"], atol=1e-4)


def test_classification_is_measured_alike_by_test_and_predict(tmp_path):
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for level, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                noise = draw.integers(0, 150, (12, 10 + index, 3)) + 100 * level
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    run = tmp_path / "run"
    words = ["fit", "--student=cifar/compact_resnet8", "--data=ImageFolder", f"--data.root={tmp_path / 'data'}"]
    words += ["--data.image_size=8", "--data.batch_size=4", "--data.num_workers=0", "--data.min_crop_area=1"]
    assert cli.main([*words, f"--out={run}", "--epochs=1", "--progress=false", "--accelerator=cpu"]) == 0
    measured = evaluate(str(run), **QUIET)
    program = export(str(run), tmp_path / "student.onnx", normalize=True)
    shutil.rmtree(tmp_path / "data" / "train")  # neither needs the training images
    for source in (run, program):
        out = tmp_path / f"predicted-{source.name}"
        words = ["predict", str(source), str(tmp_path / "data"), f"--out={out}", "--format=csv", "--progress=false"]
        assert cli.main(words) == 0
        rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
        right = [row["file"].split("/")[0] == row["class1"] for row in rows]
        assert len(rows) == 12
        assert sum(right) / len(right) == pytest.approx(measured["top1"])
    assert evaluate(str(program), **QUIET)["top1"] == measured["top1"]


def of_floats(folder, scale):
    """Train a student on arrays of floats, write their evaluation images as PNG, and return the run."""
    draw = np.random.default_rng(1)
    folder.mkdir()
    words = ["fit", "--student=cifar/compact_resnet8", "--data=Arrays", "--data.batch_size=8", "--epochs=1"]
    for split in ("train", "test"):
        labels = np.arange(16) % 2
        images = draw.integers(0, 120, (16, 8, 8, 3)) + 100 * labels[:, None, None, None]
        np.savez(folder / f"{split}.npz", images=(images * scale).astype(np.float32), labels=labels)
        words.append(f"--data.{split}={folder / split}.npz")
    for index, image in enumerate(images):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{index:02}.png")
    assert cli.main([*words, f"--out={folder / 'run'}", "--accelerator=cpu", "--progress=false"]) == 0
    return folder / "run"


def test_a_student_of_floats_sees_files_in_the_range_of_its_training(tmp_path):
    run = of_floats(tmp_path / "data", 1.0)
    card = read_card(run / "student.safetensors")
    module = Arrays(*[tmp_path / "data" / f"{split}.npz" for split in ("train", "test")], batch_size=16)
    with torch.no_grad():
        expected = load_student(run).module(next(iter(module.val_dataloader()))[0]).softmax(dim=1)

    def scores(student, name):
        found = table(predict(str(student), [str(tmp_path / "data" / "*.png")], tmp_path / name, **QUIET))["images"]
        by_label = [{top["label"]: top["score"] for top in one["top"]} for one in found]
        return torch.tensor([[one[0], one[1]] for one in by_label])

    torch.testing.assert_close(scores(run, "predicted"), expected, atol=1e-4, rtol=0)
    program = export(str(run), tmp_path / "student.pt2", normalize=True)
    torch.testing.assert_close(scores(program, "by-program"), expected, atol=1e-4, rtol=0)
    # The card of an earlier version, whose mean and std were in the arrays' own unit.
    measured = evaluate(str(run), **QUIET)
    older = {name: value for name, value in card.items() if name != "scaled"} | {"mean": list(module.mean)}
    (run / "student.json").write_text(json.dumps(older | {"std": list(module.std)}))
    with pytest.warns(UserWarning, match=r"its mean \[.*\] is not of pixels in \[0, 1\]; .* divided by 255"):
        torch.testing.assert_close(scores(run, "by-older-card"), expected, atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="divided by 255"):
        assert evaluate(str(run), **QUIET) == measured


def test_a_student_of_floats_that_are_no_pixels_is_refused(tmp_path):
    run = of_floats(tmp_path / "data", 20.0)
    with pytest.raises(ValueError, match=r"trained on floats that are no pixels .* no image file can be prepared"):
        predict(str(run), [str(tmp_path / "data")], tmp_path / "out", **QUIET)
    with pytest.raises(ValueError, match="leave --normalize out"):
        export(str(run), tmp_path / "student.pt2", normalize=True)
    assert evaluate(str(run), **QUIET)["top1"] >= 0
    of_pixels = Arrays(*[save_bytes(tmp_path / "bytes.npz")] * 2)
    with pytest.raises(ValueError, match=r"was trained on floats that are no pixels in .*, the data are pixels: give"):
        evaluate(str(run), data=of_pixels, **QUIET)


def save_bytes(path):
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 2)
    return path


@pytest.mark.filterwarnings("ignore:.*no box of class", "ignore:.*no image has a box that counts")  # of so few images
@pytest.mark.filterwarnings("ignore:.*no training mask holds class")
@pytest.mark.parametrize("task", list(TEACHERS))
def test_pseudo_labels_are_trained_on(pictures, tmp_path, task, capsys):
    threshold = {"classification": 0.6, "detection": 0.3, "segmentation": 0.7}[task]
    source = pictures / task
    options = {"pseudo_labels": True, "threshold": threshold}
    out = predict(TEACHERS[task], [str(source)], tmp_path / "out", accelerator="cpu", **options)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "diffkd fit" in line)
    stated = line.split("diffkd fit ... ")[1].split()
    root = tmp_path / "out" / "pseudo_labels"
    student = {
        "classification": ["--student=cifar/compact_resnet8", "--data.image_size=28"],
        "detection": ["--student=fcos/timm/test_resnet", "--detection.fpn_channels=64", "--data.min_size=64"],
        "segmentation": ["--student=torchvision/lraspp_mobilenet_v3_large", "--data.crop_size=[64,64]"],
    }[task]
    found = table(out)
    if task == "classification":
        kept = [one for one in found["images"] if one["score"] >= threshold]
        names = {one["class"].replace("/", "_") for one in kept}
        assert {path.name for path in (root / "train").iterdir()} == names
        # Each class needs an image that is trained on, besides those that are held back.
        for name in names:
            for path in list((root / "train" / name).rglob("*.png")):
                shutil.copy(path, path.with_name(f"again-{path.name}"))
        stated[-1] = "--data.val_share=0.5"
    if task == "detection":
        data = CocoDetection(root, val="train.json", num_workers=0, min_size=64)
        assert data.classes == ("Trouser", "Sneaker", "Bag")
        boxes = sum(len(target["boxes"]) for batch in data.val_dataloader() for target in batch[1])
        assert boxes == len(found["annotations"]) > 0
    if task == "segmentation":
        mask = ids_of(root / "train" / "masks" / "0.png")
        whole = ids_of(tmp_path / "out" / "masks" / "0.png")
        assert 0 < (mask == 255).mean() < 0.9
        assert np.array_equal(mask[mask != 255], whole[mask != 255])
    words = ["fit", *stated, *student, "--data.num_workers=0", "--epochs=1", "--max_steps=1", "--progress=false"]
    assert cli.main([*words, f"--out={tmp_path / 'run'}", "--accelerator=cpu", "--data.batch_size=2"]) == 0
    classes = read_card(tmp_path / "run" / "student.safetensors")["classes"]
    assert set(classes) <= {name.replace("/", "_") for name in load_student(TEACHERS[task]).facts.classes}


def test_images_are_found_by_file_folder_and_pattern(pictures, tmp_path):
    folder = pictures / "detection"
    assert list(find_images([str(folder / "0.png")])) == ["0.png"]
    assert list(find_images([str(folder / "**" / "*.png")])) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "4.png",
        "more/5.png",
    ]
    assert list(find_images([str(folder / "more"), str(folder / "0.png"), str(folder / "0.png")])) == [
        "more/5.png",
        "0.png",
    ]
    odd = tmp_path / "[a].png"
    shutil.copy(folder / "0.png", odd)
    assert list(find_images([str(odd)])) == ["[a].png"]


def test_equal_stems_get_files_of_their_own(pictures, tmp_path):
    for suffix in ("png", "bmp"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"a.{suffix}")
    out = predict(TEACHERS["segmentation"], [str(tmp_path / "a.*")], tmp_path / "out", **QUIET)
    assert [one["mask"] for one in table(out)["images"]] == ["masks/a.png", "masks/a.png.png"]


def test_broken_images_are_left_out_and_named(pictures, tmp_path, capsys):
    shutil.copy(pictures / "classification" / "0.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = ["predict", TEACHERS["classification"], str(tmp_path), "--accelerator=cpu"]
    assert cli.main([*words, f"--out={tmp_path / 'out'}"]) == 0
    assert "1 image(s) were left out" in (said := capsys.readouterr().err)
    assert "bad.png cannot be read" in said
    assert len(table(tmp_path / "out" / "predictions.json")["images"]) == 1
    assert cli.main([*words, f"--out={tmp_path / 'other'}", "--on_bad_image=error"]) == 1
    (tmp_path / "good.png").unlink()
    assert cli.main([*words, f"--out={tmp_path / 'third'}"]) == 1
    assert "none of" in capsys.readouterr().err


def test_what_was_predicted_before_an_interruption_is_kept(pictures, tmp_path, monkeypatch):
    add = PredictionFiles.add

    def interrupted(self, prediction):
        if prediction.name == "3.png":
            raise KeyboardInterrupt
        add(self, prediction)

    monkeypatch.setattr(PredictionFiles, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(TEACHERS["detection"], [str(pictures / "detection")], tmp_path / "out", **QUIET)
    assert len(table(tmp_path / "out" / "predictions.json")["images"]) == 3


def test_masks_of_many_classes_have_16_bits(tmp_path):
    files = PredictionFiles(tmp_path / "out", "segmentation", [f"class {index}" for index in range(300)])
    ids = torch.full((4, 4), 299, dtype=torch.int32)
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    found = {"ids": ids, "confidence": torch.ones(4, 4)}
    from diffkd.inference.predictor import Prediction

    files.add(Prediction(image, "a.png", read_rgb(image), found))
    assert ids_of(tmp_path / "out" / "masks" / "a.png").max() == 299


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "{images}"], "there is no run and no file nowhere"),
        (["nowhere.onnx", "{images}"], r"there is no file nowhere.onnx"),
        (["hub:small", "{images}"], "'hub:small' is no name of the Hub: write hub:USER/NAME"),
        (["{backbone}", "{images}"], "is a backbone, which predicts no classes: fine-tune it first"),
        (["{images}/0.png", "{images}"], "has no card that says which model"),
        (["{student}", "{empty}"], "there is no image in"),
        (["{student}", "nothing/*.jpg"], "no image matches nothing/*.jpg"),
        (["{student}", "nothing.jpg"], "there is no image, folder or pattern nothing.jpg"),
        (["{student}", "{images}", "--threshold=2"], "threshold 2.0 is no score"),
        (["{student}", "{images}", "--batch_size=0"], "batch_size must be at least 1"),
        (["{student}", "{images}", "--crop_ratio=3"], "crop_ratio 3.0 must be"),
        (["{student}", "{images}", "--accelerator=tpu9"], "accelerator 'tpu9' is unknown"),
        (["{student}", "{images}", "--format=xml"], "format"),
        (["{damaged}", "{images}"], "cannot be read as ONNX"),
        (["{damaged2}", "{images}"], "cannot be read as a program"),
        (["{student}", "{images}", "--out={file}"], "is a file; give a folder"),
        (["{student}", "{images}", "--out={full}"], "is not empty; give another --out"),
    ],
)
def test_what_cannot_be_used_is_named(pictures, tmp_path, capsys, words, message):
    names = {"student": TEACHERS["classification"], "images": str(pictures / "classification")}
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
        names[name] = str(tmp_path / name)
    for name, file in {"file": "file", "damaged": "d.onnx", "damaged2": "d.pt2", "inside": "full/a"}.items():
        (tmp_path / file).write_bytes(b"damaged")
        names[name] = str(tmp_path / file)
    names["backbone"] = str(tmp_path / "backbone.safetensors")
    card = {"model": "cifar/resnet8", "task": "representation", "num_classes": 10, "in_channels": 3}
    save_student(load_backbone("cifar/resnet8"), names["backbone"], card | {"image_size": [32, 32]})
    words = [word.format(**names) for word in words]
    out = [] if any(word.startswith("--out") for word in words) else [f"--out={tmp_path / 'out'}"]
    assert cli.main(["predict", *words, *out, "--progress=false"]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "predictions.json").exists()
