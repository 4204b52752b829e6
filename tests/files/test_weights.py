import argparse
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_nets import ConvNet, Wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffkd import load_weights, read_weights, save_student
from diffkd.files import pickles
from diffkd.files.weights import is_partial, remove_partial, unwrap, write_whole


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class TestHostileFiles:
    @pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "model.bin", "model"])
    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path, name):
        marker = tmp_path / "ran"
        torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Bomb(marker)}, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as plain weights.*never run"):
            read_weights(tmp_path / name)
        assert not marker.exists()

    def test_neither_is_a_bare_pickle(self, tmp_path):
        marker, path = tmp_path / "ran", tmp_path / "model.pt"
        path.write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(ValueError, match="never run"):
            read_weights(path)
        assert not marker.exists()
        pickle.loads(path.read_bytes())  # the bomb is a live one
        assert marker.exists()

    def test_whole_models_are_not_unpickled(self, tmp_path):
        torch.save(ConvNet(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match="save its state dict"):
            read_weights(tmp_path / "model.pt")


class TestBrokenFiles:
    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
    def test_truncated(self, tmp_path, name, share):
        path = tmp_path / name
        state = {"w": torch.randn(100, 10)}
        save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=str(path)):
            read_weights(path)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
    def test_garbage(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\xff" * 4000)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)

    @pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"a": 1}, {"a": {"b": 1}}])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="holds no state dict"):
            read_weights(tmp_path / "model.pt")

    @pytest.mark.parametrize("name", ["nothing.pt", "."])
    def test_missing(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match="no weights at"):
            read_weights(tmp_path / name)


class TestReading:
    @pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_wrappers_and_prefixes_come_off(self, tmp_path, wrapper, prefix):
        net = ConvNet()
        state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
        torch.save({wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}} if wrapper else state, tmp_path / "model.pt")
        assert equal_states(read_weights(tmp_path / "model.pt"), net.state_dict())

    def test_a_model_whose_entries_all_lie_under_module_is_read_back(self, tmp_path):
        net, other = (nn.ModuleDict({"module": ConvNet()}) for _ in range(2))
        load_weights(other, save_student(net, tmp_path / "net.safetensors"))
        assert equal_states(other.state_dict(), net.state_dict())
        torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "wrapped.pt")
        for model in (nn.ModuleDict({"module": ConvNet()}), ConvNet()):
            load_weights(model, tmp_path / "wrapped.pt")
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True))

    def test_a_prefix_that_only_some_have_stays(self, tmp_path):
        torch.save({"module.w": torch.ones(1), "v": torch.ones(1)}, tmp_path / "model.pt")
        assert sorted(read_weights(tmp_path / "model.pt")) == ["module.w", "v"]

    def test_legacy_torch_files(self, tmp_path):
        torch.save({"w": torch.ones(2)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
        assert torch.equal(read_weights(tmp_path / "model.pt")["w"], torch.ones(2))


class TestLoading:
    def test_restores_a_saved_student(self, tmp_path):
        net, other = ConvNet(), ConvNet()
        path = save_student(net, tmp_path / "deep" / "er" / "net.safetensors", {"accuracy": 0.5})
        load_weights(other, path)
        assert equal_states(net.state_dict(), other.state_dict())
        card = json.loads(path.with_suffix(".json").read_text())
        assert card == {"accuracy": 0.5, "parameters": sum(p.numel() for p in net.parameters())}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("fc.bias"), "missing fc.bias"),
            (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
            (lambda s: s.update({"fc.weight": torch.ones(7, 8)}), r"fc.weight is \(7, 8\) there, \(10, 8\) here"),
        ],
    )
    def test_is_strict_and_changes_nothing_on_failure(self, tmp_path, change, message):
        state = {name: value + 1 for name, value in ConvNet().state_dict().items()}
        change(state)
        torch.save(state, tmp_path / "net.pt")
        net = ConvNet()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(ValueError, match=rf"net.pt does not fit ConvNet: {message}"):
            load_weights(net, tmp_path / "net.pt")
        assert equal_states(net.state_dict(), before)

    def test_lists_no_more_than_a_few_problems(self, tmp_path):
        torch.save({"w": torch.ones(1)}, tmp_path / "net.pt")
        with pytest.raises(ValueError, match="and 11 more") as error:
            load_weights(ConvNet(), tmp_path / "net.pt")
        assert len(str(error.value)) < 600

    def test_a_prefix_of_somebody_elses_comes_off_if_all_else_fits(self, tmp_path):
        net, other = ConvNet(), ConvNet()
        state = {f"model.{name}": value for name, value in net.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.ckpt")
        load_weights(other, tmp_path / "net.ckpt")
        assert equal_states(net.state_dict(), other.state_dict())
        torch.save(state | {"model.extra": torch.ones(1)}, tmp_path / "net.ckpt")
        with pytest.raises(ValueError, match=r"unexpected model\.extra"):
            load_weights(other, tmp_path / "net.ckpt")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_parameters_that_are_not_finite_are_named(self, tmp_path, value):
        state = ConvNet().state_dict()
        state["fc.bias"] = torch.full_like(state["fc.bias"], value)
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"net\.pt holds NaN or infinity in fc\.bias"):
            load_weights(ConvNet(), tmp_path / "net.pt")

    def test_statistics_that_are_not_numbers_are_named_and_infinite_masks_are_not(self, tmp_path):
        state = ConvNet().state_dict()
        state["stem.1.running_mean"] = torch.full_like(state["stem.1.running_mean"], float("nan"))
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"net\.pt holds NaN or infinity in stem\.1\.running_mean"):
            load_weights(ConvNet(), tmp_path / "net.pt")
        masked = nn.Linear(2, 2)
        masked.register_buffer("mask", torch.full((2,), -torch.inf))
        load_weights(masked, save_student(masked, tmp_path / "masked.safetensors"))

    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (["m/archive_format", "m/models/model.json"], "of torch.export, a program"),
            (["config.json", "model.weights.h5"], "of Keras"),
            (["images.npy"], "of arrays of NumPy"),
            (["best.pt"], r"around other files, such as best\.pt: unpack it first"),
            (["a.txt"], "without data.pkl"),
        ],
    )
    def test_other_archives_are_called_by_their_kind(self, tmp_path, names, kind):
        with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
            for name in names:
                archive.writestr(name, b"{}")
        with pytest.raises(ValueError, match=f"zip archive {kind}"):
            read_weights(tmp_path / "net.pt")

    @pytest.mark.parametrize(
        ("name", "content", "kind"),
        [
            ("a.gguf", b"GGUF\3\0\0\0", "is GGUF"),
            ("a.tflite", b"\x1c\0\0\0TFL3", "is a program of TensorFlow Lite"),
            ("a.onnx", b"\x08\x08\x12\x07pytorch", "is a program of ONNX"),
        ],
    )
    def test_programs_of_others_are_called_by_their_name(self, tmp_path, name, content, kind):
        (tmp_path / name).write_bytes(content + bytes(100))
        with pytest.raises(ValueError, match=kind):
            read_weights(tmp_path / name)

    def test_what_is_there_instead_of_tensors_is_named(self, tmp_path):
        arrays = {name: value.numpy() for name, value in ConvNet().state_dict().items()}
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"model": arrays}))
        with pytest.raises(ValueError, match=r"only model\.stem\.0\.weight \(numpy.* and \d+ like it; save"):
            load_weights(ConvNet(), tmp_path / "net.pkl")


class TestSaving:
    def test_tied_and_non_contiguous_entries(self, tmp_path):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(3, 4, 3))
        net[1].weight = net[0].weight
        net[2].weight = nn.Parameter(net[2].weight.detach().to(memory_format=torch.channels_last))
        net[0].bias = nn.Parameter(torch.randn(4, 4)[:, 1])
        other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(3, 4, 3))
        load_weights(other, save_student(net, tmp_path / "net.safetensors"))
        assert equal_states(other.state_dict(), net.state_dict())

    def test_wrappers_come_off(self, tmp_path):
        net = ConvNet()
        wrapped = nn.DataParallel(torch.compile(net, backend="eager"))
        assert unwrap(wrapped) is net
        assert equal_states(read_weights(save_student(wrapped, tmp_path / "net.safetensors")), net.state_dict())

    def test_only_as_safetensors(self, tmp_path):
        with pytest.raises(ValueError, match=r"saved as .safetensors, got 'net.pt'"):
            save_student(ConvNet(), tmp_path / "net.pt")

    def test_a_card_that_is_no_json_leaves_everything_as_it_was(self, tmp_path):
        path = save_student(ConvNet(), tmp_path / "net.safetensors")
        before = path.read_bytes()
        with pytest.raises(TypeError):
            save_student(ConvNet(), path, {"net": ConvNet()})
        assert path.read_bytes() == before

    def test_readable_as_the_umask_says(self, tmp_path):
        path = save_student(ConvNet(), tmp_path / "net.safetensors")
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestWritingWhole:
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("short write")])
    def test_failing_midway_leaves_the_old_file(self, tmp_path, error):
        path = tmp_path / "file"
        path.write_text("old")

        def write(file):
            file.write_text("half of the ne")
            raise error

        with pytest.raises(OSError, match=rf"could not write {path}.*free some space"):
            write_whole(path, write)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=rf"could not write {tmp_path}/file/new .*\); choose another folder"):
            write_whole(tmp_path / "file" / "new", Path.touch)

    def test_an_interrupt_passes_through_and_leaves_no_litter(self, tmp_path):
        def write(file):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", write)
        assert list(tmp_path.iterdir()) == []

    def test_what_a_killed_process_was_writing_is_found_and_removed(self, tmp_path):
        (tmp_path / "deep").mkdir()
        seen = []

        def write(file):
            seen.append(file)
            (tmp_path / "deep" / file.name).write_text("half of an earlier one")

        write_whole(tmp_path / "file", write)
        assert is_partial(seen[0])
        assert not is_partial(tmp_path / "file")
        (tmp_path / ".hidden").touch()
        remove_partial(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".hidden", "deep", "file"]

    def test_writers_that_do_not_say_what_is_wrong_are_told_of_with_the_free_space(self, tmp_path):
        def write(file):
            raise RuntimeError("enforce fail at inline_container.cc")

        with pytest.raises(OSError, match=r"inline_container.cc; [\d,.]+ MiB are free there\)"):
            write_whole(tmp_path / "file", write)

    def test_a_full_disk_is_called_so_whoever_found_it(self, tmp_path, monkeypatch):
        def write(file):
            raise RuntimeError("enforce fail at inline_container.cc")

        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(OSError, match=r"file \(No space left on device; 0.0 MiB are free there\); free some space"):
            write_whole(tmp_path / "file", write)

    def test_a_full_disk(self, tmp_path):
        """A limit on the size of files stands in for a disk that is full."""
        script = textwrap.dedent(
            f"""
            import resource, torch
            from torch import nn
            from diffkd import save_student, read_weights
            path = "{tmp_path}/net.safetensors"
            save_student(nn.Linear(4, 4), path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            try:
                save_student(nn.Linear(400, 400), path)
            except OSError as error:
                assert "could not write" in str(error), error
            else:
                raise SystemExit("the limit was not felt")
            assert read_weights(path)["weight"].shape == (4, 4)
            """
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


NESTED = b")" + b"2\x86" * 60  # tuples of twice the tuple before, 2**60 in all


def held(folder, content, name="weights.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


class TestCheckpointsOfTrainers:
    """The weights of one network, as the programs of many authors save them."""

    @pytest.fixture
    def net(self):
        return ConvNet()

    @pytest.fixture
    def state(self, net):
        return net.state_dict()

    def prefixed(self, prefix, state):
        return {f"{prefix}{name}": value for name, value in state.items()}

    def other(self, state):
        return {name: value + 1 for name, value in state.items()}

    def taken(self, path, state, **options):
        net = ConvNet()
        report = load_weights(net, path, **options)
        assert equal_states(net.state_dict(), state)
        return report

    def test_exactly_its_own_entries_need_no_word(self, tmp_path, state):
        assert self.taken(held(tmp_path, state), state).plain

    def test_batch_counters_may_be_missing(self, tmp_path, state):
        older = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
        assert "2 num_batches_tracked, which it lacks, stay 0" in str(self.taken(held(tmp_path, older), state))

    @pytest.mark.parametrize("legacy", [False, True])
    def test_objects_beside_the_tensors_are_skipped_and_named(self, tmp_path, state, legacy):
        content = {
            "model": state,
            "args": argparse.Namespace(lr=0.1),
            "best": np.float64(0.9),
            "path": Path("somewhere"),
            "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9).state_dict(),
        }
        path = held(tmp_path, content, _use_new_zipfile_serialization=not legacy)
        report = str(self.taken(path, state))
        for named in ("args (argparse.Namespace)", "best (numpy", "path (pathlib."):
            assert named in report

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_logs_that_refer_to_methods_and_nested_classes(self, tmp_path, state, monkeypatch, legacy, protocol):
        """As mmengine's HistoryBuffer does, which saves its own functions beside its numbers."""
        code = """
            class Buffer:
                class Kind:
                    pass
                def mean(self):
                    return 0.0
                def __getstate__(self):
                    return {"statistics": {"mean": Buffer.mean, "bound": self.last}, "kinds": [Buffer.Kind()]}
                def last(self):
                    return 1.0
        """
        (tmp_path / "logging_of_others.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(tmp_path)
        logs = importlib.import_module("logging_of_others")
        content = {"state_dict": state, "message_hub": {"loss": logs.Buffer()}, "kind": logs.Buffer.Kind()}
        path = held(tmp_path, content, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
        monkeypatch.delitem(sys.modules, "logging_of_others")
        (tmp_path / "logging_of_others.py").write_text("raise SystemExit('imported')")
        assert "kind (logging_of_others.Buffer.Kind" in str(self.taken(path, state))
        assert "logging_of_others" not in sys.modules

    def test_averaged_models(self, tmp_path, net, state):
        averaged = AveragedModel(net).state_dict()
        assert "left out: n_averaged" in str(self.taken(held(tmp_path, averaged), state))

    def test_losses_with_weights_of_their_own_are_left_out(self, tmp_path, state):
        entries = {**self.prefixed("model.", state), "criterion.weight": torch.ones(3)}
        report = str(self.taken(held(tmp_path, {"state_dict": entries, "epoch": 3}), state))
        assert "under 'state_dict.model'; left out: state_dict.criterion.weight" in report
        self.taken(held(tmp_path, {**state, "criterion.weight": torch.ones(3)}), state)

    @pytest.mark.parametrize(
        "prefix", ["model._orig_mod.", "net.module.", "trainer.algorithm.model.module.", "_fsdp_wrapped_module."]
    )
    def test_prefixes_of_several_levels(self, tmp_path, state, prefix):
        self.taken(held(tmp_path, {"state_dict": self.prefixed(prefix, state)}), state)

    def test_wrappers_in_the_middle(self, tmp_path, state):
        compiled = {name.replace("stage.", "stage._orig_mod."): value for name, value in state.items()}
        self.taken(held(tmp_path, compiled), state)

    @pytest.mark.parametrize(
        "beside", [{"best_acc": torch.tensor(0.5)}, {"steps": torch.tensor(3), "class_weights": torch.ones(10)}]
    )
    @pytest.mark.parametrize("key", ["model", "net"])
    def test_a_few_tensors_beside_a_state_dict_do_not_hide_it(self, tmp_path, state, key, beside):
        path = held(tmp_path, {key: state, **beside})
        assert equal_states(read_weights(path), state)
        assert self.taken(path, state).key == key
        averaged = held(tmp_path, {key: self.other(state), "ema": state, **beside})
        assert equal_states(read_weights(averaged), state)
        self.taken(averaged, state)

    def test_a_state_dict_with_tensors_in_a_mapping_is_one(self, tmp_path, state):
        path = held(tmp_path, {**state, "extra": {"scale": torch.ones(1)}})
        assert read_weights(path).keys() == {*state, "extra.scale"}

    @pytest.mark.parametrize("key", ["net", "state_dict_ema", "ema", "params", "anything"])
    def test_the_only_weights_are_taken_whatever_their_key(self, tmp_path, state, key):
        assert self.taken(held(tmp_path, {key: state, "epoch": 2}), state).key == key
        assert equal_states(read_weights(tmp_path / "weights.pt"), state)

    def test_of_several_one_is_chosen_by_its_key(self, tmp_path, state):
        path = held(tmp_path, {"student": self.other(state), "teacher": state})
        with pytest.raises(ValueError, match=r"several weights that fit.*teacher_weights_key.*'student', 'teacher'"):
            load_weights(ConvNet(), path)
        with pytest.raises(ValueError, match=r"several state dicts.*'student', 'teacher'"):
            read_weights(path)
        with pytest.raises(ValueError, match=r"no weights under the key 'best'; there are 'student', 'teacher'"):
            load_weights(ConvNet(), path, key="best")
        self.taken(path, state, key="teacher")
        assert equal_states(read_weights(path, key="teacher"), state)
        inside = {**self.prefixed("student.", self.other(state)), **self.prefixed("teacher.", state)}
        self.taken(held(tmp_path, {"state_dict": inside}), state, key="teacher")

    @pytest.mark.parametrize("keys", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema")])
    def test_of_weights_and_their_average_the_average(self, tmp_path, state, keys):
        raw, averaged = keys
        path = held(tmp_path, {raw: self.other(state), averaged: self.prefixed("module.", state)})
        report = self.taken(path, state)
        assert f"under '{averaged}', the average; not taken: '{raw}'" in str(report)
        self.taken(path, self.other(state), key=raw)
        assert equal_states(read_weights(path), state)

    def test_the_same_weights_twice_are_no_choice(self, tmp_path, state):
        self.taken(held(tmp_path, {"model": state, "state_dict": dict(state)}), state)

    def test_networks_that_are_wrapped_themselves(self, tmp_path, state):
        path = held(tmp_path, state)
        for wrapped in (nn.DataParallel(ConvNet()), torch.compile(ConvNet(), backend="eager")):
            load_weights(wrapped, path)
            assert equal_states(unwrap(wrapped).state_dict(), state)
        inside = Wrapped(ConvNet())
        load_weights(inside, path)
        assert equal_states(inside.net[0][0].state_dict(), state)

    def test_tied_and_lazy_entries(self, tmp_path):
        tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        tied["b"].weight = tied["a"].weight
        state = {name: value + 1 for name, value in tied.state_dict().items() if name != "b.weight"}
        load_weights(tied, held(tmp_path, state))
        assert torch.equal(tied["b"].weight, state["a.weight"])
        lazy, used = (nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2)) for _ in range(2))
        used(torch.ones(1, 3, 8, 8))
        load_weights(lazy, held(tmp_path, used.state_dict()))
        assert equal_states(lazy.state_dict(), used.state_dict())

    def test_half_precision_is_said_and_integers_are_refused(self, tmp_path, state):
        half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        assert "converted from float16" in str(load_weights(ConvNet(), held(tmp_path, half)))
        whole = {name: value.to(torch.int8) for name, value in state.items()}
        with pytest.raises(ValueError, match=r"stem\.0\.weight is of torch\.int8 there, torch\.float32 here"):
            load_weights(ConvNet(), held(tmp_path, whole))

    def test_a_larger_network_of_the_same_names_is_refused(self, tmp_path):
        smaller, larger = (nn.Sequential(*(nn.Linear(3, 3) for _ in range(count))) for count in (2, 3))
        with pytest.raises(ValueError, match=r"unexpected 2\.weight"):
            load_weights(smaller, held(tmp_path, larger.state_dict()))

    def test_a_classifier_beside_the_network_is_taken(self, tmp_path, state):
        backbone = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
        head = {f"head.{name}": value for name, value in state.items() if name.startswith("fc.")}
        report = self.taken(held(tmp_path, {"state_dict": backbone | head}), state)
        assert "fc from state_dict.head.fc" in str(report)
        averaged = {f"module.{name}": value for name, value in (backbone | head).items()}
        both = {"state_dict": self.other(backbone | head), "ema_state_dict": averaged}
        assert "fc from ema_state_dict.head.fc" in str(self.taken(held(tmp_path, both), state))
        wider = head | {"head.fc.weight": torch.ones(7, 8)}
        with pytest.raises(ValueError, match=r"fc\.weight is \(7, 8\) there, \(10, 8\) here"):
            load_weights(ConvNet(), held(tmp_path, {"state_dict": backbone | wider}))
        two = {f"other.{name}": value for name, value in state.items() if name.startswith("fc.")}
        with pytest.raises(ValueError, match=r"missing fc\.weight"):
            load_weights(ConvNet(), held(tmp_path, {"state_dict": backbone | head | two}))

    @pytest.mark.parametrize(
        "change", [lambda s: s.pop("fc.weight"), lambda s: s.update({"fc.weight": torch.ones(7, 8)})]
    )
    def test_only_the_classifier_may_stay_random_and_only_with_a_warning(self, tmp_path, state, change):
        change(state)
        path = held(tmp_path, state)
        with pytest.warns(UserWarning, match=r"fc\.weight of ConvNet start from random weights"):
            report = load_weights(ConvNet(), path, head=lambda: frozenset({"fc.weight"}))
        assert report.random == ("fc.weight",)
        state.pop("stem.1.running_mean")
        with pytest.raises(ValueError, match=r"missing stem\.1\.running_mean"):
            load_weights(ConvNet(), held(tmp_path, state), head=lambda: frozenset({"fc.weight"}))


class TestKindsOfFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "pointer of Git LFS.*git lfs pull"),
            (b"<!DOCTYPE html><html></html>", "is a web page"),
            (b"\x1f\x8b\x08\x00", "compressed by gzip"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
        ],
    )
    def test_others_are_called_by_their_names(self, tmp_path, content, message):
        for name in ("model.pt", "model.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=message):
                read_weights(tmp_path / name)

    def test_the_content_counts_not_the_name(self, tmp_path):
        save_file({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        held(tmp_path, {"w": torch.ones(2)}, "model.safetensors")
        for name in ("pytorch_model.bin", "model.safetensors"):
            assert torch.equal(read_weights(tmp_path / name)["w"], torch.ones(2))

    def test_programs_of_torchscript(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
        with pytest.raises(ValueError, match="TorchScript program"):
            read_weights(tmp_path / "model.pt")

    def test_a_model_in_several_files(self, tmp_path):
        net, other = ConvNet(), ConvNet()
        parts = [{}, {}]
        for index, (name, value) in enumerate(net.state_dict().items()):
            parts[index % 2][name] = value
        names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, tmp_path / name)
        index = tmp_path / "model.safetensors.index.json"
        lies = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index.write_text(json.dumps({"weight_map": lies}))
        load_weights(other, index)
        assert equal_states(net.state_dict(), other.state_dict())
        with pytest.raises(ValueError, match=rf"one of several files of a model: give their folder, {tmp_path}"):
            load_weights(ConvNet(), tmp_path / names[0])
        for elsewhere in ("../secret", "9" * 300):
            index.write_text(json.dumps({"weight_map": {"a": elsewhere}}))
            with pytest.raises(ValueError, match="which is not beside it"):
                load_weights(other, index)
        index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
        with pytest.raises(ValueError, match="which is not beside it"):
            read_weights(index)

    def test_compressed_parts_are_not_unpacked(self, tmp_path):
        plain = held(tmp_path, {"w": torch.zeros(10_000)})
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            for name in source.namelist():
                bomb.writestr(name, source.read(name))
        with pytest.raises(ValueError, match="its parts are compressed"):
            read_weights(tmp_path / "bomb.pt")

    def test_long_logs_beside_the_weights_are_passed_over(self, tmp_path):
        log = {"loss": np.random.default_rng(0).random(2**21), "text": "epoch 1, loss 0.5\n" * 500_000}
        content = {"state_dict": {"w": torch.ones(2)}, "logs": [log, dict(log)]}
        for name, options in (("new", {}), ("old", {"_use_new_zipfile_serialization": False})):
            path = held(tmp_path, content, f"{name}.pt", **options)
            assert path.stat().st_size > 2**25
            assert torch.equal(read_weights(path)["w"], torch.ones(2))

    def test_too_many_objects_are_refused(self, tmp_path, monkeypatch):
        content = {"w": torch.ones(2), "log": [0.5] * 1000}
        paths = [held(tmp_path, content, f"{new}.pt", _use_new_zipfile_serialization=new) for new in (True, False)]
        monkeypatch.setattr(pickles, "_MOST_OBJECTS", 500)
        for path in paths:
            with pytest.raises(ValueError, match="it holds more objects than a file of weights does"):
                read_weights(path)

    def test_the_objects_of_an_older_file_are_counted_together(self, tmp_path, monkeypatch):
        path = held(tmp_path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        assert content.count(b"\x80\x02") == 5
        path.write_bytes(content.replace(b"\x80\x02", b"\x80\x02" + b"N0" * 200))
        assert read_weights(path)
        monkeypatch.setattr(pickles, "_MOST_OBJECTS", 1000)
        with pytest.raises(ValueError, match="it holds more objects than a file of weights does"):
            read_weights(path)

    @pytest.mark.parametrize(
        "stream",
        [
            b"\x80\x04r\xff\xff\xff\x7fN.",  # a memo of two thousand million entries
            b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00.",  # a bytearray of a terabyte
            b"\x80\x04B\xff\xff\xff\x7f.",
            b"\x80\x04" + b"]" * 100_000 + b".",
            b"cbuiltins\neval\n(V1+1\ntR.",
            b"cos\nsystem\n(Vtouch ran\ntR.",
            b"c__builtin__\ngetattr\n.",
            b"cbuiltins\ngetattr\n(ctorch._utils\n_rebuild_tensor\nV__globals__\ntR.",
            b"cbuiltins\ngetattr\n(cbuiltins\nset\nV__subclasses__\ntR.",
            b"c__builtin__\ngetattr\n(cbuiltins\ngetattr\nV__self__\ntR.",
            b"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR.",
            b"cbuiltins\ngetattr\n(]V__class__\ntR.",
            b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00N.",  # a frame of a terabyte
            b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00a.",  # bytes of a terabyte
            b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00a.",  # a text of a terabyte
            b"\x80\x04}" + NESTED + b"Ns.",  # a key, and a member, whose hash takes for ever
            b"\x80\x04(" + NESTED + b"Nd.",
            b"\x80\x04}(" + NESTED + b"Nu.",
            b"\x80\x04\x8f(" + NESTED + b"\x90.",
            b"\x80\x04(" + NESTED + b"\x91.",
            b"\x80\x02cbuiltins\nset\n](" + NESTED + b"e\x85R.",
            b"\x80\x02ccollections\nOrderedDict\n](" + NESTED + b"N\x86e\x85R.",
            b"\x80\x02" + NESTED + b"Q.",  # a storage of that name, and a reference of that kind
            b"\x80\x02Vstorage\nN" + NESTED + b"\x87Q.",
            b"\x80\x02" + NESTED + b"NVname\n\x87Q.",
            b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
            + b"a" * 2**20
            + b"\x85q\x010"
            + b"h\x00h\x01R" * 2000
            + b".",
            b"\x80\x02X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x000(" + b"h\x00h\x00\x93" * 100_000 + b"t.",
        ],
        ids=lambda stream: repr(stream[:40]),
    )
    def test_hostile_streams_cost_neither_memory_nor_safety(self, tmp_path, stream):
        (tmp_path / "model.pt").write_bytes(stream)
        with pytest.raises(ValueError, match=r"model\.pt"):
            read_weights(tmp_path / "model.pt")
        assert not (tmp_path / "ran").exists()

    def test_attributes_of_what_is_skipped_are_skipped_too_and_never_run(self, tmp_path):
        got = b"cbuiltins\ngetattr\n(" * 2 + b"csome.where\nRunner\nVrun\ntRVsystem\ntR"
        (tmp_path / "model.pt").write_bytes(got + b"(Vtouch ran\ntR.")
        with pytest.raises(ValueError, match=r"whole object of class some\.where\.Runner\.run\.system"):
            read_weights(tmp_path / "model.pt")
        eval_of_it = b"cbuiltins\ngetattr\n(csome.where\nbuiltins\nVeval\ntR(V__import__('os').mkdir('ran')\ntR."
        (tmp_path / "model.pt").write_bytes(eval_of_it)
        with pytest.raises(ValueError, match=r"whole object of class some\.where\.builtins\.eval"):
            read_weights(tmp_path / "model.pt")
        (tmp_path / "model.pt").write_bytes(b"cbuiltins\ngetattr\n(csome.where\nRunner\n]tR.")
        with pytest.raises(ValueError, match=r"would run builtins\.getattr"):
            read_weights(tmp_path / "model.pt")
        assert not (tmp_path / "ran").exists()

    def test_a_tensor_larger_than_its_numbers(self, tmp_path):
        held(tmp_path, {"w": torch.zeros(1).expand(10**9)})
        with pytest.raises(ValueError, match="larger than its numbers"):
            read_weights(tmp_path / "weights.pt")
