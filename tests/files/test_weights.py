import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_nets import ConvNet
from torch import nn

from diffkd import load_weights, read_weights, save_student
from diffkd.files.weights import unwrap, write_whole


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

    @pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"a": 1}, {"a": {"b": torch.ones(1)}}])
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
        with pytest.raises(ValueError, match="and 13 more") as error:
            load_weights(ConvNet(), tmp_path / "net.pt")
        assert len(str(error.value)) < 600

    def test_a_prefix_of_somebody_elses_comes_off_if_all_else_fits(self, tmp_path):
        net, other = ConvNet(), ConvNet()
        state = {f"model.{name}": value for name, value in net.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.ckpt")
        load_weights(other, tmp_path / "net.ckpt")
        assert equal_states(net.state_dict(), other.state_dict())
        torch.save(state | {"model.extra": torch.ones(1)}, tmp_path / "net.ckpt")
        with pytest.raises(ValueError, match=r"missing .*; unexpected model\."):
            load_weights(other, tmp_path / "net.ckpt")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_parameters_that_are_not_finite_are_named(self, tmp_path, value):
        state = ConvNet().state_dict()
        state["fc.bias"] = torch.full_like(state["fc.bias"], value)
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(ValueError, match=r"net\.pt holds NaN or infinity in fc\.bias"):
            load_weights(ConvNet(), tmp_path / "net.pt")


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
        with pytest.raises(OSError, match=rf"could not write {tmp_path}/file/new .*choose another folder"):
            write_whole(tmp_path / "file" / "new", Path.touch)

    def test_an_interrupt_passes_through_and_leaves_no_litter(self, tmp_path):
        def write(file):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "file", write)
        assert list(tmp_path.iterdir()) == []

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
