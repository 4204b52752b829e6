from functools import partial

import pytest
import torch
from small_nets import MLP, ChannelsLastNet, ConvNet, Pyramid, TokenNet, Wrapped
from tiny_segmenters import Segmenter
from torch import nn

from diffkd import CWD, DIST, DKD, KD, DiffKD, FitNet, Pair, list_layers, match_layers
from diffkd.distill.matching import DEFAULT_WANTS, unique_names, wants_of
from diffkd.distill.stages import last_feature, stages

IMAGES = torch.randn(2, 3, 16, 16)


def names(pairs):
    return [(pair.student_names, pair.teacher_names) for pair in pairs]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (ConvNet(), "stage"),
        (Wrapped(ConvNet()), "net.0.0.stage"),
        (Wrapped(Wrapped(ConvNet())), "net.0.0.net.0.0.stage"),
        (nn.Sequential(nn.InstanceNorm2d(3), ConvNet()), "1.stage"),  # normalises its images first
        (nn.Sequential(nn.Upsample(scale_factor=0.5), Wrapped(TokenNet())), "1.net.0.0.blocks"),
        (TokenNet(), "blocks"),
        (ChannelsLastNet(), "block"),
        (Wrapped(ChannelsLastNet()), "net.0.0.block"),
        (Pyramid(), "named"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)), "1"),
        (nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.LazyLinear(10)), "0"),
    ],
)
def test_the_last_feature_is_the_last_map_before_pooling(net, expected):
    assert last_feature(list_layers(net, IMAGES)).name == expected


def test_without_maps_it_is_the_last_hidden_vector():
    assert last_feature(list_layers(MLP(), torch.randn(2, 12))).name == "second"
    assert last_feature(list_layers(nn.Linear(4, 3), torch.randn(2, 4))) is None


def test_heads_are_no_features():
    class AttentionPooled(nn.Module):
        """Its head looks at a map of its own."""

        def __init__(self):
            super().__init__()
            self.trunk = nn.Conv2d(3, 8, 3, 2, 1)
            self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

        def forward(self, x):
            return self.head(self.trunk(x))

    class ScoresThenPools(nn.Module):
        """Classifies every position with a 1x1 convolution."""

        def __init__(self):
            super().__init__()
            self.trunk, self.score = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 10, 1)

        def forward(self, x):
            return self.score(self.trunk(x)).mean(dim=(2, 3))

    assert last_feature(list_layers(AttentionPooled(), IMAGES)).name == "trunk"
    assert last_feature(list_layers(ScoresThenPools(), IMAGES)).name == "trunk"


def test_feature_and_logits_are_paired_for_diffkd():
    pairs = match_layers(ConvNet(4), TokenNet(), IMAGES, method=DiffKD)
    assert names(pairs) == [(("stage",), ("blocks",)), (("output",), ("output",))]
    assert all(pair.method is DiffKD for pair in pairs)


def test_other_classes_leave_the_feature_alone():
    assert names(match_layers(ConvNet(classes=10), ConvNet(classes=7), IMAGES)) == [(("stage",), ("stage",))]


def test_logits_may_have_a_single_position():
    def convolutional(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 10, 1))

    expected = [(("1",), ("1",)), (("output",), ("output",))]
    assert names(match_layers(convolutional(4), convolutional(8), IMAGES)) == expected
    assert names(match_layers(convolutional(4), ConvNet(), IMAGES)) == [(("1",), ("stage",)), expected[1]]


def test_methods_get_what_they_want():
    assert names(match_layers(ConvNet(), ConvNet(), IMAGES, method=KD)) == [(("output",), ("output",))]
    assert names(match_layers(ConvNet(), ConvNet(), IMAGES, method=FitNet)) == [(("stage",), ("stage",))]
    tau = partial(partial(DIST, temperature=4.0), weight=2.0)
    assert wants_of(tau) == DIST.wants == {"logits"}
    assert wants_of(None) == wants_of(lambda student, teacher: nn.Identity()) == DEFAULT_WANTS


def test_logits_methods_say_why_they_cannot_be_paired():
    with pytest.raises(ValueError, match=r"nothing to pair for KD, which wants logits: .* 10 and 7 classes.*give pair"):
        match_layers(ConvNet(classes=10), ConvNet(classes=7), IMAGES, method=KD)


class Shaped(nn.Module):
    """A method that says nothing of classes, so that it is given single logits too."""

    wants = frozenset({"logits"})


@pytest.mark.parametrize("method", [DiffKD, partial(DiffKD, ae_channels=4), None])
def test_a_single_logit_is_left_out_with_a_warning(method):
    with pytest.warns(UserWarning, match="not paired with the models' scores, which are of 1 class: .* from 2 or more"):
        pairs = match_layers(ConvNet(classes=1), ConvNet(classes=1), IMAGES, method=method)
    assert names(pairs) == [(("stage",), ("stage",))]


def test_methods_of_logits_alone_say_that_they_need_several():
    for method in (KD, DIST, DKD):
        with pytest.raises(ValueError, match=r"wants logits of 2 or more classes: .* have 1 and 1 classes"):
            match_layers(ConvNet(classes=1), ConvNet(classes=1), IMAGES, method=method)
    assert names(match_layers(ConvNet(classes=1), ConvNet(classes=1), IMAGES, method=Shaped)) == [
        (("output",), ("output",))
    ]


def test_a_class_map_of_a_single_class_is_for_methods_that_compare_positions():
    models = Segmenter(1, 3, 6, 4), Segmenter(1, 3, 12, 4)
    assert names(match_layers(*models, IMAGES, method=CWD)) == [(("scorer",), ("scorer",))]
    with pytest.warns(UserWarning, match="DiffKD is not paired with the models' scores"):
        assert names(match_layers(*models, IMAGES, method=DiffKD)) == [(("body",), ("body",))]
    with pytest.raises(ValueError, match="wants logits of 2 or more classes"):
        match_layers(*models, IMAGES, method=KD)


def test_models_without_anything_say_so():
    with pytest.raises(ValueError, match="last features are missing and missing"):
        match_layers(nn.Linear(4, 3), nn.Linear(4, 2), torch.randn(2, 4))


class Deep(nn.Module):
    """Four resolutions, two blocks each."""

    def __init__(self, depth=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)) for _ in range(depth - 1))
        )
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.stages(self.stem(x)).mean(dim=(2, 3)))


class PerStage(nn.Module):
    wants = frozenset({"stages"})


class PerLevels(nn.Module):
    wants = frozenset({"levels"})


def test_stages_go_from_large_to_small():
    layers = list_layers(Deep(), torch.randn(1, 3, 32, 32))
    assert [str(layer.feature_shape) for layer in stages(layers)] == ["4x16x16", "4x8x8", "4x4x4"]  # not the stem
    assert stages(layers)[-1].shape == last_feature(layers).shape
    assert stages(list_layers(MLP(), torch.randn(2, 12))) == []


def test_stages_are_found_at_any_depth():
    class Encoder(nn.Module):
        """Embeds its images, and keeps its stages in a list in a module of its own."""

        def __init__(self):
            super().__init__()
            self.embedder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2))
            self.layers = nn.ModuleDict({"stages": nn.ModuleList([nn.Conv2d(4, 4, 1), *Deep().stages])})

        def forward(self, x):
            x = self.embedder(x)
            for stage in self.layers["stages"]:
                x = stage(x)
            return x

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.fc = nn.ModuleDict({"encoder": Wrapped(Encoder())}), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.model["encoder"](x).mean(dim=(2, 3)))

    inside = "model.encoder.net.0.0"
    found = stages(list_layers(Classifier(), torch.randn(1, 3, 64, 64)))
    assert [layer.name.removeprefix(f"{inside}.") for layer in found] == [
        f"layers.stages.{index}" for index in range(1, 4)
    ]


def test_stages_are_not_inside_of_what_comes_to_a_smaller_map():
    class Fused(nn.Module):
        """Its last feature is larger than what its last stage returns."""

        def __init__(self):
            super().__init__()
            self.stem, self.stage = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.small = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 4, 4))
            self.fuse, self.fc = nn.Sequential(nn.Upsample(6), nn.Conv2d(4, 4, 1)), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.fuse(self.small(self.stage(self.stem(x)))).mean(dim=(2, 3)))

    found = stages(list_layers(Fused(), torch.randn(2, 3, 32, 32)))
    assert [layer.name for layer in found] == ["stem", "stage", "fuse"]


def test_stages_have_the_batch_of_the_model():
    class Windows(nn.Module):
        """Attends in windows, each of which is an image to the layers inside."""

        def __init__(self):
            super().__init__()
            self.down, self.inside, self.last = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 4, 4)
            self.fc = nn.Linear(4, 10)

        def forward(self, x):
            x = self.down(x)
            batch, _, side, _ = x.shape
            windows = x.unflatten(3, (2, side // 2)).permute(0, 3, 1, 2, 4).flatten(0, 1)  # halves of the images
            windows = self.inside(windows[:, :, : side // 2]).repeat(1, 1, 2, 1)
            x = x + windows.unflatten(0, (batch, 2)).permute(0, 2, 3, 1, 4).flatten(3)
            return self.fc(self.last(x).mean(dim=(2, 3)))

    assert [layer.name for layer in stages(list_layers(Windows(), torch.randn(2, 3, 32, 32)))] == ["down", "last"]


def test_stages_pair_from_the_deepest_on():
    example = torch.randn(1, 3, 32, 32)
    each = match_layers(Deep(3), Deep(4), example, method=PerStage)
    assert [len(pair.student_names) for pair in each] == [1, 1]
    assert names(each)[-1] == (("stages.1",), ("stages.2",))
    (together,) = match_layers(Deep(3), Deep(4), example, method=PerLevels)
    assert together.name == "levels"
    assert list(zip(together.student_names, together.teacher_names, strict=True)) == [
        (a[0], b[0]) for a, b in names(each)
    ]


def test_the_teacher_may_see_another_size():
    pairs = match_layers(ConvNet(), TokenNet(), IMAGES, teacher_example=torch.randn(2, 3, 32, 32))
    assert len(pairs) == 2


def test_a_pair_names_its_layers():
    assert Pair("a").teacher_names == ("a",)
    assert Pair("a", "b").teacher_names == ("b",)
    assert Pair(["a", "b"]).student_names == Pair(["a", "b"]).teacher_names == ("a", "b")


def test_names_of_pairs_are_never_shared():
    pairs = [Pair("x", name=name) for name in ("a", "a", "a#2", "a", "b")]
    assert unique_names(pairs) == ("a", "a#2", "a#2#2", "a#3", "b")
