"""Checkpoints: whole, harmless, and never of a broken state."""

import errno
import os
import pickle
import re
import signal
from functools import partial

import pytest
import torch
from short_trainings import METHODS, arrays, signal_self, train

from diffkd import KD, FitNet
from diffkd.training.checkpointing import AtomicCheckpointIO, Interrupted, Saver, read_checkpoint


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


def test_what_is_written_is_read(tmp_path):
    content = {"diffkd": {"history": [1.5, None]}, "state_dict": {"weight": torch.ones(2)}}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "deep" / "last.ckpt")
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert read["diffkd"] == content["diffkd"]
    assert torch.equal(read["state_dict"]["weight"], torch.ones(2))
    AtomicCheckpointIO().remove_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert list((tmp_path / "deep").iterdir()) == []


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"diffkd": {}, "state_dict": Hostile()}, "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is no whole checkpoint"):
        read_checkpoint("last.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"raw\.ckpt is no whole checkpoint"):
        read_checkpoint("raw.ckpt")
    assert not (tmp_path / "owned").exists()


class Remembering(FitNet):
    """Keeps a state beside its tensors."""

    def __init__(self, student, teacher, state):
        super().__init__(student, teacher)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_a_state_that_could_not_be_read_back_is_found_out_at_the_start(tmp_path, image_files, model_file):
    message = (
        r"'_extra_state' of the state of the Remembering of pair '0' is a Pattern that no checkpoint .* plain values"
    )
    method = partial(Remembering, state=re.compile("x"))
    with pytest.raises(ValueError, match=message):
        train(arrays(image_files), tmp_path / "refused", model_file, method=method)
    method = partial(Remembering, state={"seen": [1, torch.ones(2)]})
    train(arrays(image_files), tmp_path / "run", model_file, method=method, max_steps=1)
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.equal(state["model.methods.0._extra_state"]["seen"][1], torch.ones(2))


def test_damage_is_named(tmp_path):
    torch.save({"diffkd": {}, "weights": torch.randn(1000)}, tmp_path / "last.ckpt")
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt is no whole checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        read_checkpoint(tmp_path / "missing.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of this package"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_checkpoint_holds_everything_but_the_teacher(tmp_path, image_files, model_file):
    train(arrays(image_files), tmp_path, model_file, method=METHODS["diffkd"], ema=0.5, epochs=1)
    content = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    parts = {name.split(".")[1] for name in content["state_dict"]}
    assert parts == {"student", "methods"}
    assert content["diffkd"]["average"]["updates"] == 6
    shapes = {tuple(value.shape) for value in content["state_dict"].values()}
    assert (12, 3, 3, 3) not in shapes  # the teacher's first convolution
    assert (4, 3, 3, 3) in shapes  # the student's


def test_a_full_disk_ends_the_training_and_spoils_nothing(tmp_path, image_files, model_file, monkeypatch):
    real, calls = torch.save, []

    def save(content, file, *args, **options):
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, file, *args, **options)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"last\.ckpt.*No space left.*earlier files are whole"):
        train(arrays(image_files), tmp_path, model_file)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert len(read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["diffkd"]["history"]["rows"]) == 1
    assert train(arrays(image_files), tmp_path, model_file, resume=True)["last"]["epoch"] == 3


def test_broken_weights_are_not_saved(tmp_path, image_files, model_file):
    """Losses can be finite while the weights no longer are, since a loss is computed before the step."""

    def spoil():
        with torch.no_grad():
            saved["task"].student[4].weight[0, 0] = float("inf")

    saved, original = {}, Saver.on_train_batch_end

    def remember(self, trainer, module, outputs, batch, batch_idx):
        saved["task"] = module
        if trainer.global_step == 8:
            spoil()
        original(self, trainer, module, outputs, batch, batch_idx)

    patch = pytest.MonkeyPatch()
    patch.setattr(Saver, "on_train_batch_end", remember)
    try:
        with pytest.raises(FloatingPointError, match=r"weight '4\.weight' of the student was not finite after step 8"):
            train(arrays(image_files), tmp_path, model_file, save_every_steps=2, epochs=2)
    finally:
        patch.undo()
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


class Counting(KD):
    """Keeps something beside its tensors, as modules may."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.calls = 0
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, *features, **context):
        self.calls += 1
        return super().forward(*features, **context)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:Sparse invariant checks are implicitly disabled")
def test_methods_may_keep_more_than_dense_tensors(tmp_path, image_files, model_file):
    with pytest.raises(Interrupted):
        train(arrays(image_files, 8, signal_self(signal.SIGTERM)), tmp_path, model_file, method=Counting)
    train(arrays(image_files), tmp_path, model_file, method=Counting, resume=True)
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert state["model.methods.0._extra_state"] == {"calls": 18}


def test_signals_are_given_back(tmp_path, image_files, model_file):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        Interrupted, match=r"stopped after step 4 and saved .*last\.ckpt.*diffkd fit .*config\.yaml --resume"
    ):
        train(arrays(image_files, 3, signal_self(signal.SIGINT)), tmp_path, model_file)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    train(arrays(image_files), tmp_path, model_file, resume=True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("option", ["every_steps", "max_steps"])
def test_nonsense_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=option):
        Saver(tmp_path / "last.ckpt", **{option: 0})
