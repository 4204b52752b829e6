"""Teachers teach the classes that they have learned."""

import pytest
from short_trainings import arrays, built

from diffkd import KD, FitNet
from diffkd.training.fit import fit

NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]


@pytest.fixture
def taught(tmp_path, model_file, named_files):
    """Build what learns from a run that was trained on `NAMES`."""
    options = {"progress": False, "accelerator": "cpu", "epochs": 1, "max_steps": 1}
    fit(f"{model_file}:large", arrays(named_files(NAMES)), tmp_path / "teacher", **options)

    def build(names, method):
        return built(
            f"{model_file}:small",
            arrays(named_files(names)),
            teacher=f"{model_file}:large",
            teacher_weights=str(tmp_path / "teacher"),
            method=method,
            accelerator="cpu",
        )

    return build


def test_a_teacher_with_its_classes_in_another_order_is_refused_where_scores_are_paired(taught):
    taught(NAMES, KD)
    with pytest.raises(ValueError, match=r"another order: class 0 is 'ant' there, 'fox' here.*features alone"):
        taught(NAMES[::-1], KD)
    taught(NAMES[::-1], FitNet)


def test_a_teacher_of_other_names_is_warned_about(taught):
    with pytest.warns(UserWarning, match="class 1 is 'bee' there, 'bat' here"):
        taught(["ant", "bat", *NAMES[2:]], KD)
    taught(["ant", "bat", *NAMES[2:]], FitNet)
