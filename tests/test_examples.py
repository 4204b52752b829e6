"""Every example trains, and the student that it leaves is a plain one, as good as the example said."""

import importlib
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from diffkd.models import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 40  # enough to be far from chance, a tenth, whatever the processor rounds
LIMITS = {
    "accelerate_loop": {"max_steps": STEPS},
    "lightning_module": {"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False},
    "timm_task": {"max_steps": STEPS},
}


@pytest.fixture
def example(monkeypatch):
    """Import an example as its own script does, from the folder of the examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def student(file):
    return load_model("cifar/compact_resnet8", num_classes=10, in_channels=1, weights=file)


def test_own_loop_learns_and_leaves_a_plain_student(example, tmp_path, capsys):
    accuracy = example("own_loop").main(1, str(tmp_path / "student.safetensors"))
    assert accuracy > 0.3  # a tenth would be chance
    assert student(tmp_path / "student.safetensors")(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert "DiffKD" in capsys.readouterr().out


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_loop_of_another_library_learns_and_leaves_a_plain_student(name, example, tmp_path):
    file = tmp_path / "student.safetensors"
    accuracy = example(name).main(str(file), 1, **LIMITS[name])
    assert accuracy > 0.25
    packaged = example("packaged")
    assert packaged.accuracy(student(file), packaged.images()[1]) == pytest.approx(accuracy, abs=1e-6)


def test_the_trainer_of_transformers_learns_and_leaves_a_plain_student(example, tmp_path):
    from transformers import ResNetForImageClassification

    accuracy = example("transformers_trainer").main(str(tmp_path), max_steps=STEPS)
    assert accuracy > 0.25
    saved = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    inputs, labels = example("packaged").images()[1].tensors
    with torch.no_grad():
        right = (saved(inputs).logits.argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(accuracy, abs=2e-3)  # two ways of batching may round otherwise


def test_the_notebook_runs_from_the_first_to_the_last_cell(tmp_path):
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    first.source = "EPOCHS, IMAGES, TESTS = 1, 640, 200"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "layer3" in printed
    assert "from its file" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "student.safetensors").is_file()
