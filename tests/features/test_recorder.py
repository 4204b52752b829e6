import copy
import pickle
import re

import pytest
import torch
from small_nets import ConvNet, Pyramid, TwoInputs
from torch import nn

from diffkd.features.recorder import Recorder, split_selector

IMAGES = torch.randn(2, 3, 16, 16)


def recorder_on(model, *names):
    recorder = Recorder(names)
    recorder.attach(model)
    return recorder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer4", ("layer4", None)),
        ("blocks.3.mlp", ("blocks.3.mlp", None)),
        ("fpn[0]", ("fpn", "0")),
        ("fpn[-1]", ("fpn", "-1")),
        ("backbone.body[layer 4]", ("backbone.body", "layer 4")),
        ("[0]", ("[0]", None)),
    ],
)
def test_selectors(name, expected):
    assert split_selector(name) == expected


def test_records_what_the_layers_return():
    model = ConvNet().eval()
    recorder = recorder_on(model, "stage", "output")
    output, outputs, _ = recorder.record(model, IMAGES)
    assert sorted(outputs) == ["output", "stage"]
    assert outputs["output"] is output
    assert torch.equal(outputs["stage"], model.stage(model.stem(IMAGES)))


def test_elements_of_tuples_and_mappings():
    model = Pyramid().eval()
    recorder = recorder_on(model, "levels[0]", "levels[-1]", "named[coarse]", "output[features]", "output")
    output, outputs, _ = recorder.record(model, IMAGES)
    assert outputs["levels[0]"].shape == (2, 4, 8, 8)
    assert outputs["levels[-1]"].shape == (2, 8, 4, 4)
    assert torch.equal(outputs["named[coarse]"], outputs["levels[-1]"])
    assert outputs["output[features]"] is output["features"]
    assert outputs["output"] is output["logits"]


def test_inputs_may_be_tuples_or_mappings():
    model = TwoInputs().eval()
    recorder = recorder_on(model, "vector")
    extra = torch.randn(2, 5)
    by_position = recorder.record(model, (IMAGES, extra))[1]["vector"]
    by_name = recorder.record(model, {"extra": extra, "pixels": IMAGES})[1]["vector"]
    assert torch.equal(by_position, by_name)


def test_nothing_is_recorded_outside_nor_held_after():
    model = ConvNet()
    recorder = recorder_on(model, "stage")
    model(IMAGES)
    assert recorder.outputs == {}
    recorder.record(model, IMAGES)
    assert recorder.outputs == {}
    assert not recorder.active
    with pytest.raises(RuntimeError):
        recorder.record(model, torch.randn(2, 1, 4, 4))
    assert recorder.outputs == {}
    assert not recorder.active


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_do_not_report_here(copied):
    model = ConvNet()
    recorder = recorder_on(model, "stage")
    twin = copied(model)
    recorder.active = True
    twin(IMAGES)
    assert recorder.outputs == {}


def test_unknown_layers():
    with pytest.raises(ValueError, match="layer 'nothing' is not in ConvNet"):
        recorder_on(ConvNet(), "nothing")


@pytest.mark.parametrize(
    ("model", "name"), [(Pyramid, "levels[5]"), (Pyramid, "named[x]"), (ConvNet, "stage[0]"), (Pyramid, "output[x]")]
)
def test_layers_that_leave_nothing(model, name):
    model = model()
    recorder = recorder_on(model, name)
    with pytest.raises(ValueError, match=rf"'{re.escape(name)}' of {type(model).__name__} returned no tensor"):
        recorder.record(model, IMAGES)


def test_layers_that_do_not_run():
    class Skips(nn.Module):
        """Leaves a block out in training, as layer drop does now and then."""

        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x):
            return x if self.training else self.block(x)

    model = Skips()
    recorder = recorder_on(model, "block")
    recorder.record(model.eval(), IMAGES)
    with pytest.raises(ValueError, match=r"'block' of Skips did not run this time: .*layer drop.*switch that off"):
        recorder.record(model.train(), IMAGES)
    recorder.detach()
    with pytest.raises(ValueError, match="'block' of Skips is recorded no longer, since the distiller was released"):
        recorder.record(model.eval(), IMAGES)


class DropsInPlace(nn.Module):
    """Overwrites the output of `bn` in place, in training only, where no module shows it."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return nn.functional.dropout(self.bn(x), 0.5, self.training, inplace=True).mean(dim=(2, 3))


def test_a_feature_that_is_overwritten_after_it_was_recorded():
    model = DropsInPlace()
    recorder = recorder_on(model, "bn")
    recorder.record(model.eval(), IMAGES)
    with pytest.raises(
        ValueError, match=r"'bn' of DropsInPlace is overwritten in place by a later layer.*inplace=False"
    ):
        recorder.record(model.train(), IMAGES)
    with torch.inference_mode():  # where changes are not counted
        recorder.record(model.eval(), IMAGES)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
def test_torchscript_is_told_how_to_script_a_recorded_model():
    model = nn.Sequential(nn.Identity())
    recorder = recorder_on(model, "0")
    with pytest.raises(AttributeError, match=r"torch.jit.script .*call distiller.release\(\) first.*state_dict"):
        torch.jit.script(model)
    recorder.detach()
    assert torch.equal(torch.jit.script(model)(IMAGES), IMAGES)
