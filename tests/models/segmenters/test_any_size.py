import copy
from collections import OrderedDict

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import assert_rounded, units_of
from torch import Tensor, nn
from torch.export import Dim
from transformers import SegformerConfig, SegformerForSemanticSegmentation, ViTConfig, ViTModel

from diffkd.models import AnySize, load_segmenter, stride_of, upsample
from diffkd.models.segmenters.any_size import pad_to_multiple


class Blocks(nn.Module):
    """Refuses images that are no multiple of 8, and returns a map of an eighth of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, 4, 8, 8)  # called so as the part of the wrapper is
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[-2] % 8 == 0
        assert images.shape[-1] % 8 == 0
        return OrderedDict(aux=images, out=self.model(images) * self.scale)


@given(height=st.integers(1, 40), width=st.integers(1, 40), batch=st.integers(0, 2))
@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_every_size(padding: str, height: int, width: int, batch: int) -> None:
    images = torch.randn(batch, 3, height, width)
    model = Blocks()
    logits = AnySize(model, stride=8, padding=padding)(images)
    assert logits.shape == (batch, 4, height, width)
    if height % 8 == width % 8 == 0 and batch:
        whole = nn.functional.interpolate(model(images)["out"], (height, width), mode="bilinear", align_corners=False)
        assert torch.equal(logits, whole)


def test_pixels_stay_in_place() -> None:
    images = torch.randn(2, 3, 13, 7)
    for padding in ("zeros", "reflect"):
        assert torch.equal(AnySize(nn.Identity(), stride=32, padding=padding)(images), images)


def test_padding() -> None:
    images = torch.tensor([[1.0, 2.0, 3.0]]).reshape(1, 1, 1, 3)
    assert pad_to_multiple(images, 4).tolist() == [[[[1, 2, 3, 0], *[[0] * 4] * 3]]]
    assert pad_to_multiple(images, 8, "reflect")[0, 0].tolist() == [[1, 2, 3, 2, 1, 2, 3, 2]] * 8
    larger = torch.randn(2, 3, 10, 11)
    expected = nn.functional.pad(larger, (0, 5, 0, 6), mode="reflect")
    assert torch.equal(pad_to_multiple(larger, 16, "reflect"), expected)


def test_the_state_is_that_of_the_model() -> None:
    model, other = Blocks(), AnySize(Blocks())
    state = model.state_dict()
    assert list(AnySize(model).state_dict()) == list(state)
    other.load_state_dict(state)
    assert all(torch.equal(value, other.model.state_dict()[key]) for key, value in state.items())
    inside = nn.Sequential(AnySize(Blocks()))
    inside.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert inside.state_dict().keys() == {f"0.{key}" for key in state}
    with pytest.raises(RuntimeError, match="scale"):
        other.load_state_dict({key: value for key, value in state.items() if key != "scale"})


def test_strides() -> None:
    strides = {
        "smp/Unet/timm/test_resnet": 32,  # takes other sizes, but none below
        "smp/DeepLabV3Plus/resnet18": 16,
        "smp/PSPNet/resnet18": 8,
        "smp/PAN/resnet18": 128,
        "smp/DPT/timm/test_vit": 32,
        "torchvision/lraspp_mobilenet_v3_large": 1,
    }
    models = {name: load_segmenter(name, num_classes=2) for name in strides}
    assert {name: stride_of(model) for name, model in models.items()} == strides
    for model in models.values():
        assert AnySize(model).eval()(torch.randn(1, 3, 37, 5)).shape == (1, 2, 37, 5)
    psp = models["smp/PSPNet/resnet18"]
    assert stride_of(nn.Sequential(nn.Identity(), psp)) == 8
    assert stride_of(AnySize(psp)) == 1
    assert stride_of(nn.Conv2d(3, 2, 1)) == 32


def test_strides_of_transformers() -> None:
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    assert stride_of(SegformerForSemanticSegmentation(SegformerConfig(**sizes))) == 32
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, patch_size=14)
    assert stride_of(ViTModel(config)) == 224


def test_upsample() -> None:
    logits = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    assert upsample(logits, (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert upsample(logits, (1, 2)) is logits


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stride 0 is no multiple"):
        AnySize(nn.Identity(), stride=0)
    with pytest.raises(ValueError, match="padding 'mirror' is unknown"):
        AnySize(nn.Identity(), padding="mirror")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="instead of a class map"):
        AnySize(nn.Flatten())(torch.randn(1, 3, 5, 5))


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_exported_program_takes_every_size(padding: str) -> None:
    model = AnySize(nn.Conv2d(3, 4, 3, 2, 1), padding=padding).eval()  # type: ignore[arg-type]
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=dynamic)
    session = onnx_session(program)
    for size in [(2, 3, 71, 45), (1, 3, 33, 64), (1, 3, 7, 5)]:
        images = torch.randn(size)
        for found in (program.module()(images), run(session, images)):
            assert_rounds(model, images, found)


def assert_rounds(model: nn.Module, images: Tensor, found: Tensor) -> None:
    """Assert that this is what the model returns, but for rounding: without gradients, two draws say enough."""
    wide = copy.deepcopy(model).double()
    assert_rounded({"logits": found}, lambda: {"logits": wide(images.double())}, units_of(torch.float32), 2)


def onnx_session(program: torch.export.ExportedProgram) -> onnxruntime.InferenceSession:
    exported = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), options)


def run(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
