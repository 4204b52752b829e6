import pytest
import torch
from small_nets import ConvNet, TokenNet
from torch import Tensor, nn

from diffkd import KD, DiffKD, Distiller, FitNet, Pair, list_layers, match_layers
from diffkd.distill.stages import class_map, last_feature
from diffkd.features.shape import FeatureShape

IMAGES = torch.randn(2, 3, 16, 16)


class Backbone(ConvNet):
    """Returns what `gather` makes of its two maps."""

    def __init__(self, gather) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, images: Tensor):
        stem = self.stem(images)
        return self.gather(stem, self.stage(stem))


class Patches(TokenNet):
    """Returns its tokens, or its grid of them as a map."""

    def __init__(self, as_map: bool) -> None:
        super().__init__(tell=True)
        self.norm, self.as_map = nn.LayerNorm(8), as_map

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) if self.as_map else tokens


class Pooled(nn.Module):
    """A map and its mean, as backbones of transformers return them."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.pooler = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Softplus()), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.stage(images)
        return feature, self.pooler(feature)


@pytest.mark.parametrize(
    ("model", "last"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()), "2"),
        (nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True)), "1"),
        (Backbone(lambda stem, stage: stage), "stage"),
        (Backbone(lambda stem, stage: stage + 0), "stage"),
        (Backbone(lambda stem, stage: [stem, stage]), "stage"),
        (Backbone(lambda stem, stage: {"stem": stem, "stage": stage}), "stage"),
        (Backbone(lambda stem, stage: {"stage": stage, "pooled": stage.mean(dim=(2, 3))}), "stage"),
        (Pooled(), "stage"),
        (Patches(as_map=False), "norm"),
        (Patches(as_map=True), "norm"),
    ],
)
def test_backbones_score_no_positions(model, last):
    layers = list_layers(model, IMAGES)
    assert class_map(layers) is None
    assert last_feature(layers).name == last
    assert not any(layer.scores for layer in layers)
    pairs = match_layers(ConvNet(), model, IMAGES, method=DiffKD)
    assert [(pair.student, pair.teacher) for pair in pairs] == [("stage", last)]


class Prototypes(ConvNet):
    """Scores each position by its likeness to prototypes."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("bchw,kc->bkhw", self.stage(self.stem(images)), self.fc.weight)


class Probabilities(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.scorer = nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.scorer(self.stage(self.stem(images))).sigmoid()


@pytest.mark.parametrize(
    ("model", "scorer", "last"),
    [
        (Prototypes(), "output", "stage"),
        (Probabilities(), "output", "stage"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Sigmoid()), "3", "1"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)), "3", None),
        (nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 4, 4), nn.Upsample(scale_factor=4, mode="bilinear")), "1", None),
    ],
)
def test_scores_of_positions(model, scorer, last):
    layers = list_layers(model, IMAGES)
    assert class_map(layers).name == scorer
    assert layers[-1].feature_shape.role == "logits"
    assert last is None or last_feature(layers).name == last


class Several(ConvNet):
    """Returns what `gather` makes of its feature, the mean of that, and the scores."""

    def __init__(self, gather, width: int = 4) -> None:
        super().__init__(width)
        self.gather = gather

    def forward(self, images: Tensor):
        feature = self.stage(self.stem(images))
        pooled = feature.mean(dim=(2, 3))
        return self.gather(feature, pooled, self.fc(pooled))


@pytest.mark.parametrize(
    ("gather", "name"),
    [
        (lambda feature, pooled, scores: (scores, pooled), "output"),
        (lambda feature, pooled, scores: (scores, {"feats": [feature], "pooled": pooled}), "output"),
        (lambda feature, pooled, scores: ([feature, pooled], scores), "output"),
        (lambda feature, pooled, scores: (scores, 2 * scores), "output"),
        (lambda feature, pooled, scores: {"hidden": pooled, "logits": scores}, "output"),
        (lambda feature, pooled, scores: (pooled, scores), "output[1]"),
        (lambda feature, pooled, scores: [feature, scores], "output[1]"),
        (lambda feature, pooled, scores: ((feature, pooled), (scores,)), "output[1]"),
        (lambda feature, pooled, scores: {"embedding": pooled, "score": scores}, "output[score]"),
    ],
)
def test_class_scores_are_found_beside_features(gather, name):
    models = Several(gather), Several(gather)  # whose means are as long as one another
    distiller = Distiller(*models, example=IMAGES, method=KD)
    assert distiller.names == (name,)
    teacher = models[1].eval()
    scores = teacher.fc(teacher.stage(teacher.stem(IMAGES)).mean(dim=(2, 3)))
    assert torch.equal(distiller.observe(IMAGES)[name].teacher, scores)
    assert distiller.readers[0][0].shapes == (FeatureShape(10, role="logits"),)
    assert [pair.student for pair in match_layers(*models, IMAGES)] == ["stage", name]
    # What is asked for by name stays what it was.
    (named,) = Distiller(*models, [Pair("output", method=FitNet)], example=IMAGES).observe(IMAGES).values()
    assert len(named.teacher) == len(IMAGES)


def test_scores_that_no_layer_makes_are_the_first():
    class Free(Several):
        def forward(self, images: Tensor):
            _, pooled, _ = super().forward(images)
            return pooled, pooled @ self.fc.weight.T

    assert list_layers(Free(lambda *results: results), IMAGES)[-1].name == "output"
