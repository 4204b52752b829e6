"""Teacher and student see images as they were trained with, and classes in the order of the data."""

import io
import json
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from diffkd import TeacherOptions, save_student
from diffkd.models import load_model
from diffkd.tasks.classification import Classification, other_order
from diffkd.tasks.data_facts import DataFacts
from diffkd.training.callbacks import report
from diffkd.training.lightning_module import Training
from diffkd.training.models import build_student, build_teacher
from diffkd.training.optimization import Schedule

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = (0.5, 0.5, 0.5)
PIXELS = torch.rand(2, 3, 32, 32)
CLASSES = ("ant", "bee", "cat")


def facts(classes=CLASSES, size=32):
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    pixels = torch.rand(2, 3, size, size)
    return DataFacts(len(classes), 3, (size, size), *IMAGENET, tuple(classes), (pixels - mean) / std)


def built(name, data=None, weights=None, **options):
    notes = []
    pretrained = options.pop("pretrained", False)
    options = {"options": TeacherOptions(**options)}
    data = facts() if data is None else data
    weights = None if weights is None else str(weights)
    return *build_teacher(name, data, weights=weights, pretrained=pretrained, notes=notes, **options), notes


def seen(view):
    """What a teacher sees of `PIXELS`, brought back to [0, 1] if it is normalised by 0.5."""
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return view((PIXELS - mean) / std) * 0.5 + 0.5


@pytest.fixture
def timm_file(tmp_path):
    """A state dict of timm without a card; the test network is published for a mean of 0.5."""
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pt")
    return tmp_path / "vit.pt"


def tiny(size=32, **options):
    return ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=size,
        patch_size=16,
        **({"num_labels": 3} | options),
    )


def test_weights_without_a_card_get_what_is_published_for_the_model(timm_file):
    _, view, notes = built("timm/test_vit", facts(size=160), timm_file)
    torch.testing.assert_close(seen(view), PIXELS)
    assert "mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5), as published for timm/test_vit" in notes[-1]


def test_an_option_says_it_first(timm_file):
    options = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "image_size": 160}
    _, view, notes = built("timm/test_vit", facts(), timm_file, **options)
    assert view.size == (160, 160)
    assert "mean (0.1, 0.2, 0.3)" in notes[-1]
    assert "as --teacher_options says; resized to 160x160" in notes[-1]
    with pytest.raises(ValueError, match="2 values, the images have 3 channels"):
        built("timm/test_vit", facts(), timm_file, mean=(0.1, 0.2), std=(1.0, 1.0))


@pytest.mark.parametrize(
    "options",
    [{"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)}, {"image_size": 0}, {"classes": ("a", "a")}],
)
def test_options_that_cannot_be_meant(options):
    with pytest.raises(ValueError, match="teacher's"):
        TeacherOptions(**options)


@pytest.mark.parametrize("beside", [True, False])
def test_models_of_transformers_with_and_without_a_processor(tmp_path, beside):
    ViTForImageClassification(tiny()).save_pretrained(tmp_path)
    if beside:
        ViTImageProcessor(image_mean=[0.4] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    for options in ({"pretrained": True}, {"weights": tmp_path}):
        _, view, notes = built(f"hf/{tmp_path}", **options)
        torch.testing.assert_close(seen(view), PIXELS + (0.1 if beside else 0) * 1.0)
        assert ("(0.4, 0.4, 0.4)" if beside else "(0.5, 0.5, 0.5)") in notes[-1]


def test_where_nothing_is_known_that_is_said(tmp_path):
    torch.save(load_model("cifar/compact_resnet8", num_classes=3).state_dict(), tmp_path / "net.pt")
    _, view, notes = built("cifar/compact_resnet8", weights=tmp_path / "net.pt")
    assert view is None
    assert "as the data's, since nothing says otherwise; --teacher_options.mean and .std would" in notes[-1]


def test_a_card_says_the_size_of_its_training(tmp_path):
    net = load_model("cifar/compact_resnet8", num_classes=3)
    path = save_student(net, tmp_path / "net.safetensors", {"num_classes": 3, "image_size": [64, 64]})
    _, view, notes = built("cifar/compact_resnet8", weights=path)
    assert view(facts().example).shape == (2, 3, 64, 64)
    assert "resized to 64x64, which its card says" in notes[-1]
    assert built("cifar/compact_resnet8", facts(size=64), path)[1] is None


def test_a_model_of_one_size_gets_it(tmp_path):
    name = "timm/vit_tiny_patch16_224"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "vit.pt")
    teacher, view, notes = built(name, weights=tmp_path / "vit.pt")
    assert teacher(view(facts().example)).shape == (2, 3)
    assert "resized to 224x224, the only size that it takes" in notes[-1]
    (tmp_path / "mine.py").write_text(
        "from torchvision.models import VisionTransformer\n"
        "def vit(num_classes): return VisionTransformer(48, 16, 1, 2, 16, 16, num_classes=num_classes)\n"
    )
    torch.save(VisionTransformer(48, 16, 1, 2, 16, 16, num_classes=3).state_dict(), tmp_path / "tv.pt")
    assert built(f"{tmp_path}/mine.py:vit", weights=tmp_path / "tv.pt")[1].size == (48, 48)
    ViTForImageClassification(tiny(48)).save_pretrained(tmp_path)
    assert built(f"hf/{tmp_path}", weights=tmp_path)[1].size == (48, 48)


def test_a_student_with_weights_of_other_images_is_warned_about(tmp_path, timm_file):
    ViTForImageClassification(tiny()).save_pretrained(tmp_path)
    for name, options in (
        (f"hf/{tmp_path}", {"weights": None, "pretrained": True}),
        ("timm/test_vit", {"weights": str(timm_file), "pretrained": False}),
    ):
        notes = []
        data = facts(size=160 if "timm" in name else 32)
        build_student(name, data, seed=0, notes=notes, **options)
        assert "give --data.mean=[0.5,0.5,0.5] --data.std=[0.5,0.5,0.5]" in notes[-1]
        notes.clear()
        build_student(name, replace(data, mean=HALF, std=HALF), seed=0, notes=notes, **options)
        assert not any("warning" in note for note in notes)


NAMED = {"id2label": {0: "cat", 1: "bee", 2: "ant"}, "label2id": {"cat": 0, "bee": 1, "ant": 2}}


def test_classes_of_transformers_are_brought_into_the_order_of_the_data(tmp_path):
    model = ViTForImageClassification(tiny(**NAMED)).eval()
    model.save_pretrained(tmp_path)
    expected = model(PIXELS).logits[:, [2, 1, 0]]
    teacher, _, notes = built(f"hf/{tmp_path}", pretrained=True)
    torch.testing.assert_close(teacher.eval()(PIXELS).logits, expected)
    assert "its classes are brought into the order of the data" in notes
    student = build_student(f"hf/{tmp_path}", facts(), weights=None, pretrained=True, seed=0)
    torch.testing.assert_close(student.eval()(PIXELS).logits, expected)


def test_the_user_may_name_the_teachers_classes(tmp_path):
    net = load_model("cifar/compact_resnet8", num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    teacher, *_ = built("cifar/compact_resnet8", weights=tmp_path / "net.pt", classes=("cat", "ant", "bee"))
    torch.testing.assert_close(teacher.eval()(PIXELS), net(PIXELS)[:, [1, 2, 0]])


NUMBERS = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, ...


@pytest.mark.parametrize(
    ("classes", "order", "kind"),
    [
        (NUMBERS, [int(name) for name in NUMBERS], "numeric order"),
        (("Ape", "Bee", "Cow", "Dog", "Fox", "eel"), [0, 1, 2, 3, 5, 4], "upper and lower case alike"),
    ],
)
def test_a_teacher_with_the_usual_other_orders_is_recognised(classes, order, kind):
    labels = [*range(len(classes))] * 3
    found = other_order([order[label] for label in labels], labels, classes)
    assert kind in found
    assert "100.0 % right: give them as --teacher_options.classes" in found
    assert other_order(labels, labels, classes) is None


def test_classes_that_change_places_are_named_and_chance_is_not():
    labels = [0, 1, 2] * 4
    assert "'ant' for 'cat' (4 of 4)" in other_order([2, 1, 0] * 4, labels, CLASSES)
    draw = torch.Generator().manual_seed(0)
    answers = torch.randint(0, 3, (60,), generator=draw).tolist()
    assert other_order(answers, [0, 1, 2] * 20, CLASSES) is None


def test_the_start_report_says_all_of_this():
    labels = torch.arange(12)
    answers = torch.tensor([int(name) for name in NUMBERS])

    def teacher(images):
        return nn.functional.one_hot(answers, 12).float()

    task = Classification(12, classes=NUMBERS)
    training = Training(
        nn.Linear(3, 12), task, optimizer=torch.optim.SGD, schedule=Schedule(), epochs=1, teacher=teacher
    )
    training.notes = ["teacher x sees images [0, 1]"]
    console = Console(file=io.StringIO(), width=200)
    report(training, (torch.randn(12, 3), labels, labels), console)
    said = console.file.getvalue()
    assert "teacher x sees images [0, 1]" in said
    assert "the teacher may have its classes in another order" in said
    assert "in numeric order" in said


def test_a_card_in_another_order_is_still_believed_against_the_configuration(tmp_path):
    ViTForImageClassification(tiny(**NAMED)).save_pretrained(tmp_path)
    model = load_model(f"hf/{tmp_path}", num_classes=3)
    path = save_student(model, tmp_path / "own.safetensors", {"classes": list(CLASSES), "num_classes": 3})
    teacher, *_ = built(f"hf/{tmp_path}", weights=path)
    assert torch.equal(teacher.classifier.weight, model.classifier.weight)
    assert json.loads(path.with_suffix(".json").read_text())["classes"] == list(CLASSES)
