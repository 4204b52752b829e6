"""Which process writes, by what has started it."""

import json

import pytest
from short_trainings import arrays, train

from diffkd.tasks.distributed import Launcher, is_first_process, launcher, single_process

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.fixture
def environ(monkeypatch):
    for name in {*TORCHRUN, *SRUN, *SBATCH, *MPIRUN, "NODE_RANK", "PMI_RANK", "PMI_SIZE"}:
        monkeypatch.delenv(name, raising=False)

    def given(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        ({"SLURM_PROCID": "1"}, None),
        (TORCHRUN, Launcher("torchrun", 1, 2)),
        (SRUN, Launcher("srun", 1, 2)),
        (SBATCH, None),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SRUN | TORCHRUN | {"RANK": "0"}, Launcher("torchrun", 0, 2)),
        (MPIRUN, Launcher("mpirun", 1, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, Launcher("mpirun", 0, 4)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
    ],
)
def test_launchers_are_told_apart(environ, values, found):
    environ(values)
    assert launcher() == found


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, True),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        (SBATCH, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        # On each node one torchrun, whose ranks need not follow the order of the nodes.
        (SRUN | TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        # Left over from elsewhere: the trainer starts its processes itself.
        ({"SLURM_PROCID": "3"}, True),
    ],
)
def test_one_of_several_processes_writes(environ, values, first):
    environ(values)
    assert is_first_process(2, 1) is first


def test_whether_a_training_takes_one_process():
    assert all(single_process(devices, 1) for devices in (1, "1", [3], "0,"))
    assert not any(single_process(devices, 1) for devices in (2, "2", [0, 1], "0,1"))
    assert not single_process(1, 2)


def test_several_processes_for_a_training_of_one_are_refused_where_they_are_meant_as_one(environ):
    environ(TORCHRUN)
    with pytest.raises(ValueError, match=r"torchrun started 2 processes.*--devices and --num_nodes .* product is 2"):
        is_first_process(1, 1)


def test_processes_that_the_trainer_does_not_see_are_refused(environ, monkeypatch):
    environ(MPIRUN)
    monkeypatch.setattr("diffkd.tasks.distributed.find_spec", lambda name: None)
    assert is_first_process(1, 1)  # runs of their own
    with pytest.raises(ValueError, match=r"mpirun started 2 processes.*torchrun"):
        is_first_process(2, 1)


@pytest.mark.parametrize("values", [{"SLURM_PROCID": "1"}, {"RANK": "1"}, SRUN, SBATCH, MPIRUN, {"LOCAL_RANK": "1"}])
def test_a_training_on_one_device_is_written_whatever_the_environment_says(
    environ, values, tmp_path, model_file, image_files
):
    environ(values)
    train(arrays(image_files), tmp_path / "run", model_file, epochs=1)
    assert json.loads((tmp_path / "run/result.json").read_text())["last"]["epoch"] == 1
    assert (tmp_path / "run/student.safetensors").is_file()
    assert list((tmp_path / "run/tensorboard").iterdir())
