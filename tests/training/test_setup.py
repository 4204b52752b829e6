"""Teachers: their weights, classes and normalisation."""

import json

import pytest
import torch

from diffkd import KD, FitNet, TeacherInput, read_weights, save_student
from diffkd.export.student_file import find_weights
from diffkd.models import load_model
from diffkd.tasks.data_facts import DataFacts
from diffkd.training.models import build_distiller, build_student, build_teacher
from diffkd.training.start_checks import check_teacher_head

FACTS = DataFacts(5, 1, (32, 32), (0.5,), (0.25,), tuple("abcde"), torch.zeros(2, 1, 32, 32))
NAME = "cifar/compact_resnet8"


@pytest.fixture
def weights(tmp_path):
    """A teacher with seven classes."""
    return save_student(load_model(NAME, num_classes=7, in_channels=1), tmp_path / "teacher.safetensors")


def test_classes_are_read_off_the_weights(weights):
    weights.with_suffix(".json").unlink()
    teacher, view = build_teacher(NAME, FACTS, weights=str(weights), pretrained=False)
    assert teacher.fc.out_features == 7
    assert view is None


def test_the_card_says_how_images_are_normalised(weights):
    weights.with_suffix(".json").write_text(json.dumps({"num_classes": 7, "mean": [0.0], "std": [1.0]}))
    _, view = build_teacher(NAME, FACTS, weights=str(weights), pretrained=False)
    assert isinstance(view, TeacherInput)
    pixels = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(view((pixels - 0.5) / 0.25), pixels)


def test_the_same_normalisation_needs_nothing(weights):
    weights.with_suffix(".json").write_text(json.dumps({"num_classes": 7, "mean": [0.5], "std": [0.25]}))
    assert build_teacher(NAME, FACTS, weights=str(weights), pretrained=False)[1] is None


def test_teachers_with_other_classes_teach_features(weights):
    teacher, view = build_teacher(NAME, FACTS, weights=str(weights), pretrained=False)
    student = build_student(NAME, FACTS, weights=None, pretrained=False, seed=0)
    options = {"data": FACTS, "pairs": "auto", "seed": 0}
    distiller = build_distiller(student, teacher, view, method=None, **options)
    assert [pair.student for pair in distiller.pairs] == ["layer3"]
    with pytest.raises(ValueError, match="5 and 7 classes"):
        build_distiller(student, teacher, view, method=KD, **options)


def test_an_untrained_teacher_is_refused():
    with pytest.raises(ValueError, match="--teacher_weights"):
        build_teacher(NAME, FACTS, weights=None, pretrained=False)


def test_weights_of_another_model_are_refused(weights):
    with pytest.raises(ValueError, match="does not fit"):
        build_teacher("cifar/compact_resnet14", FACTS, weights=str(weights), pretrained=False)


def test_weights_are_found_by_file_and_by_run(weights):
    assert find_weights(weights) == weights
    weights.rename(weights.with_name("student.safetensors"))
    assert find_weights(weights.parent).name == "student.safetensors"
    with pytest.raises(FileNotFoundError, match="nothing"):
        find_weights("nothing")


def test_the_seed_decides_about_student_and_methods(weights):
    def build(seed):
        teacher, view = build_teacher(NAME, FACTS, weights=str(weights), pretrained=False)
        torch.manual_seed(99 - seed)  # what happened before must not matter
        student = build_student(NAME, FACTS, weights=None, pretrained=False, seed=seed)
        distiller = build_distiller(student, teacher, view, data=FACTS, pairs="auto", method=FitNet, seed=seed)
        return distiller.state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["student.fc.weight"], other["student.fc.weight"])
    projections = [name for name in first if "student_projection" in name and name.endswith("weight")]
    assert not torch.equal(first[projections[0]], other[projections[0]])


def test_a_student_that_cannot_be_saved_is_refused_at_the_start(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Extra(nn.Linear):\n"
        "    def get_extra_state(self): return {'version': 1}\n"
        "    def set_extra_state(self, state): pass\n"
        "def extra(): return nn.Sequential(nn.Flatten(), Extra(32 * 32, 5))\n"
        "def sparse():\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 5))\n"
        "    model.register_buffer('graph', torch.eye(3).to_sparse())\n"
        "    return model\n",
        encoding="utf-8",
    )
    for name, message in {"extra": "'1._extra_state' .* is a dict", "sparse": "'graph' .* is a sparse tensor"}.items():
        with pytest.raises(ValueError, match=f"{message}.*dense tensors alone: "):
            build_student(f"{file}:{name}", FACTS, weights=None, pretrained=False, seed=0)


def test_a_student_trains_whatever_mode_its_function_leaves_it_in(tmp_path):
    """Whole models that come asleep are woken; what a function puts to sleep inside of one stays so."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32 * 32), nn.Linear(32 * 32, 5))\n"
        "def asleep(): return net().eval()\n"
        "def partly():\n"
        "    model = net()\n"
        "    model[1].eval()\n"
        "    return model\n",
        encoding="utf-8",
    )
    for name, expected in {"net": True, "asleep": True, "partly": False}.items():
        student = build_student(f"{file}:{name}", FACTS, weights=None, pretrained=False, seed=0)
        assert student.training
        assert student[1].training == expected


def test_functions_without_arguments_build_students(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def fits(): return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 5))\n"
        "def small(): return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 4))\n"
        "def named(): return Named(nn.Flatten(), nn.Linear(32 * 32, 5))\n"
        "class Named(nn.Sequential):\n"
        "    def forward(self, x): return {'flat': self[0](x), 'scores': super().forward(x)}\n"
        "def colour(): return nn.Sequential(nn.Conv2d(3, 5, 32), nn.Flatten())\n",
        encoding="utf-8",
    )
    student = build_student(f"{file}:fits", FACTS, weights=None, pretrained=False, seed=0)
    assert student.training
    with pytest.raises(ValueError, match="the data have 5 classes"):
        build_student(f"{file}:small", FACTS, weights=None, pretrained=False, seed=0)
    with pytest.raises(
        ValueError, match=r"its class scores as output\[scores\].*scores first, or in a mapping as 'log"
    ):
        build_student(f"{file}:named", FACTS, weights=None, pretrained=False, seed=0)
    with pytest.raises(ValueError, match="cannot take an example of shape"):
        build_student(f"{file}:colour", FACTS, weights=None, pretrained=False, seed=0)


def test_a_teacher_without_a_classifier_teaches_features_alone(weights):
    state = {name: value for name, value in read_weights(weights).items() if not name.startswith("fc.")}
    file = weights.with_name("body.pt")
    torch.save({"state_dict": state}, file)
    with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias .* random"):
        teacher, view = build_teacher(NAME, FACTS, weights=str(file), pretrained=False)
    student = build_student(NAME, FACTS, weights=None, pretrained=False, seed=0)
    options = {"data": FACTS, "pairs": "auto", "seed": 0}
    check_teacher_head(build_distiller(student, teacher, view, method=FitNet, **options), teacher)
    distiller = build_distiller(student, teacher, view, method=KD, **options)
    with pytest.raises(ValueError, match=r"holds no classifier \(fc\.weight, fc\.bias\)"):
        check_teacher_head(distiller, teacher)


def test_a_student_starts_from_weights_of_other_classes(weights):
    with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias .* random"):
        student = build_student(NAME, FACTS, weights=str(weights), pretrained=False, seed=0)
    assert torch.equal(student.state_dict()["conv1.weight"], read_weights(weights)["conv1.weight"])


def test_the_key_of_the_weights_reaches_teacher_and_student(weights):
    state = read_weights(weights)
    other = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    file = weights.with_name("both.pt")
    torch.save({"student": other, "teacher": state}, file)
    with pytest.raises(ValueError, match=r"several weights .*'student', 'teacher'"):
        build_teacher(NAME, FACTS, weights=str(file), pretrained=False)
    teacher, _ = build_teacher(NAME, FACTS, weights=str(file), pretrained=False, weights_key="teacher")
    assert torch.equal(teacher.state_dict()["fc.weight"], state["fc.weight"])
