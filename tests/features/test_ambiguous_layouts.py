import pytest
import torch
from small_nets import ChannelsLastNet, ConvNet
from torch import Tensor, nn

from diffkd import Distiller, FitNet, Layout, Pair, list_layers
from diffkd.features.ambiguous_layouts import change_corner, most_local
from diffkd.features.layout import select_tensor


class Positions(nn.Module):
    """Patches as (B, H, W, C) or (B, C, H, W) of any proportions, or as tokens after `prefix` learned ones."""

    def __init__(self, channels: int, patch: int, kind: str = "nchw", prefix: int = 0) -> None:
        super().__init__()
        self.kind, self.patches = kind, nn.Conv2d(3, channels, patch, patch)
        self.extra = nn.Parameter(torch.randn(1, prefix, channels))
        self.body, self.head = nn.Identity(), nn.LazyLinear(10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        if self.kind == "nhwc":
            x = x.permute(0, 2, 3, 1)
        if self.kind == "tokens":
            x = torch.cat([self.extra.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.head(select_tensor(self.body(x + 0)).flatten(1))


def body(model: nn.Module, images: Tensor) -> Layout | None:
    return next(layer.layout for layer in list_layers(model, images) if layer.name == "body")


@pytest.mark.parametrize("kind", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("size", "channels", "patch"),
    [
        ((64, 64), 16, 4),  # 16x16x16
        ((256, 192), 36, 4),  # channels last, 64x48x36
        ((192, 144), 64, 4),  # channels first, 64x48x36
    ],
)
def test_maps_whose_channels_might_be_positions(kind, size, channels, patch):
    torch.manual_seed(0)
    assert body(Positions(channels, patch, kind), torch.randn(2, 3, *size)).kind == kind


@pytest.mark.parametrize("prefix", [0, 2, 5])
def test_tokens_that_fill_several_grids(prefix):
    torch.manual_seed(0)
    layout = body(Positions(12, 16, "tokens", prefix), torch.randn(2, 3, 200, 330))
    assert layout == Layout("tokens", prefix, (12, 20))


def test_what_is_found_is_what_is_distilled():
    torch.manual_seed(0)
    student, teacher = Positions(16, 4, "nhwc"), Positions(16, 4, "nchw")
    images = torch.randn(2, 3, 64, 64)
    distiller = Distiller(student, teacher, [Pair("body", method=FitNet)], example=images)
    assert [cell.split() for cell in distiller.rows()[0][2:5:2]] == [["16x16x16", "nhwc"], ["16x16x16"]]
    observed = distiller.observe(images)["body"]
    assert torch.equal(observed.student, student.patches(images))
    assert torch.equal(observed.teacher, teacher.patches(images))


class Several(nn.Module):
    """Returns the positions, and their mean beside them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0, x.mean(dim=1)


def test_elements_of_an_output_are_read_as_it_is():
    torch.manual_seed(0)
    teacher = Positions(16, 4, "nhwc")
    teacher.body = Several()
    distiller = Distiller(ConvNet(), teacher, [Pair("stage", "body[0]")], example=torch.randn(2, 3, 64, 64))
    assert distiller.readers[0][1].layouts == (Layout("nhwc"),)  # of 16x16x16


def test_changes_that_do_not_tell_decide_nothing():
    readings = [Layout("nchw"), Layout("nhwc")]
    before = torch.randn(2, 8, 8, 8)
    assert most_local(readings, before, before) is None
    assert most_local(readings, before, before + 1) is None
    assert most_local(readings, before, before[:1]) is None
    assert most_local(readings, before, before + torch.randn(2, 8, 8, 8)) is None


def test_only_one_corner_of_images_is_changed():
    image, flags, vector = torch.randn(2, 3, 8, 6), torch.ones(2, 8, 6, dtype=torch.int64), torch.randn(2, 5)
    changed = change_corner({"pixels": (image, flags), "vector": [vector]})
    assert changed["pixels"][1] is flags
    assert changed["vector"][0] is vector
    differs = changed["pixels"][0] != image
    assert differs[..., :4, :3].all()
    assert differs.sum() == 2 * 3 * 12
    assert (change_corner(torch.zeros(1, 3, 4, 4)) != 0).any()


@pytest.mark.parametrize("net", [ConvNet, ChannelsLastNet])
def test_one_run_is_enough_where_shapes_tell(net):
    model, runs = net(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    list_layers(model, torch.randn(2, 3, 16, 16))
    assert len(runs) == 1
