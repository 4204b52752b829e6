from functools import partial

import pytest
import torch
from rounding import EXACT
from small_distillers import IMAGES, backward, distil
from small_nets import MLP, ChannelsLastNet, ConvNet, Pyramid, TokenNet, Twice, TwoInputs, Wrapped
from torch import nn

from diffkd import DIST, KD, DiffKD, Distiller, FitNet, Layout, Pair


class TestFirstSteps:
    def test_losses_by_pair_and_term(self):
        distiller = distil(method=partial(DiffKD, ae_channels=5))
        _, losses = backward(distiller)
        terms = ("diffusion", "kd", "reconstruction")
        assert sorted(losses) == [f"{pair}/{term}" for pair in ("output", "stage") for term in terms]
        assert all(loss.ndim == 0 for loss in losses.values())
        assert {name: tuple(gamma.shape) for name, gamma in distiller.gammas.items()} == {"stage": (4,), "output": (4,)}
        assert not any(gamma.requires_grad for gamma in distiller.gammas.values())

    def test_every_method_parameter_learns_and_the_teacher_does_not(self):
        distiller = distil(method=[partial(DiffKD, ae_channels=5), FitNet, KD])
        backward(distiller)
        assert all(parameter.grad is not None for parameter in distiller.parameters())
        assert all(parameter.grad is None for parameter in distiller.teacher.parameters())

    def test_the_table_names_pairs_and_shapes(self):
        text = str(distil(TokenNet(8), ConvNet(12)))
        assert text.splitlines()[0] == "TokenNet learns from ConvNet"
        assert "blocks" in text
        assert "8x4x4 tokens+1" in text
        assert "24x4x4" in text
        (first, second) = distil(TokenNet(8), ConvNet(12)).rows()
        assert first[:6] == ("blocks", "blocks", "8x4x4 tokens+1", "stage", "24x4x4", "DiffKD")
        assert second[:6] == ("output", "output", "10", "output", "10", "DiffKD")

    @pytest.mark.parametrize(
        ("student", "teacher", "shapes"),
        [
            (TokenNet(8), ConvNet(12), ("8x8x8 tokens+1", "24x8x8")),
            (ConvNet(12), TokenNet(5, prefix=2), ("24x8x8", "5x8x8 tokens+2")),
            (
                nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.Flatten(), nn.Linear(1280, 10)),
                ConvNet(12),
                ("5x16x16", "24x8x8"),
            ),
            (ConvNet(12), MLP(3072), ("24x8x8", "8")),
        ],
    )
    def test_the_table_shows_what_each_model_returns_itself(self, student, teacher, shapes):
        row = Distiller(student, teacher, example=torch.randn(2, 3, 32, 32)).rows()[0]
        assert (row[2], row[4]) == shapes

    def test_logits_are_compared_by_kl_and_features_by_mse(self):
        distiller = distil()
        observed = distiller.eval().observe(IMAGES)
        _, losses = distiller(IMAGES)
        assert sorted(observed) == ["output", "stage"]
        result = observed["output"].result
        torch.testing.assert_close(
            result.losses["kd"],
            nn.functional.kl_div(
                result.denoised.log_softmax(1), result.target.log_softmax(1), log_target=True, reduction="batchmean"
            ),
        )
        assert torch.equal(observed["stage"].teacher, observed["stage"].result.target)
        assert set(losses) == {"output/kd", "output/diffusion", "stage/kd", "stage/diffusion"}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (ConvNet, partial(TokenNet, 12, prefix=2)),
        (partial(TokenNet, 8, prefix=5, tell=True), ConvNet),
        (ChannelsLastNet, TokenNet),
        (lambda: Wrapped(ConvNet()), ChannelsLastNet),
        (Pyramid, lambda: Wrapped(TokenNet())),
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_families_mix(student, teacher, size):
    images = torch.randn(4, 3, *size)
    distiller = distil(student(), teacher(), example=images, method=[DiffKD, FitNet, DIST])
    for _ in range(2):
        backward(distiller, images)
    assert all(parameter.grad.isfinite().all() for parameter in distiller.methods.parameters())


def test_tokens_may_come_before_the_batch():
    class Sequences(nn.Module):
        """Attends to its patches as PyTorch's transformers do by default, or with the batch first."""

        def __init__(self, batch_first):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=batch_first)

        def forward(self, images):
            tokens = self.patches(images).flatten(2)
            if self.layer.self_attn.batch_first:
                return self.head(self.layer(tokens.transpose(1, 2)).mean(dim=1))
            return self.head(self.layer(tokens.permute(2, 0, 1)).mean(dim=0))

    models = Sequences(False), Sequences(True)
    models[1].load_state_dict(models[0].state_dict())
    distiller = Distiller(*models, example=IMAGES, method=FitNet).double()
    assert distiller.rows()[0][1:5] == ("layer", "8x4x4 sequence", "layer", "8x4x4 tokens")
    for images in (IMAGES.double(), IMAGES[:1].double()):
        (seen,) = distiller.observe(images).values()
        assert seen.student.shape == (len(images), 8, 4, 4)
        torch.testing.assert_close(seen.student, seen.teacher, **EXACT)


def test_flat_vectors():
    x = torch.randn(4, 12)
    distiller = distil(MLP(width=8), MLP(width=32), example=x)
    assert [row[1] for row in distiller.rows()] == ["second", "output"]
    backward(distiller, x)
    assert all(parameter.grad is not None for parameter in distiller.parameters())


@pytest.mark.parametrize("as_mapping", [True, False])
def test_several_inputs(as_mapping):
    inputs = (IMAGES, torch.randn(4, 5))
    if as_mapping:
        inputs = dict(zip(("pixels", "extra"), inputs, strict=True))
    distiller = distil(TwoInputs(), TwoInputs(), example=inputs)
    output, _ = backward(distiller, inputs)
    assert output.shape == (4, 10)
    assert all(parameter.grad is not None for parameter in distiller.methods.parameters())


class TestPairs:
    def test_elements_of_outputs(self):
        pairs = [
            Pair("levels[0]", "stem", FitNet),
            Pair("levels[-1]", "stage", FitNet),
            Pair("named[coarse]", "stage", FitNet),
            Pair("output[features]", "stage", FitNet),
            Pair("output", "output", KD),
        ]
        distiller = distil(Pyramid(), ConvNet(12), pairs)
        output, losses = backward(distiller)
        assert set(output) == {"features", "logits"}
        assert [name.rpartition("/")[0] for name in losses] == [pair.student for pair in pairs]

    def test_weights_and_names(self):
        student, teacher = ConvNet(4).eval(), ConvNet(12)
        method = FitNet(8, 24)
        pairs = [Pair("stage", method=method), Pair("stage", method=method, weight=2.5, name="again")]
        _, losses = distil(student, teacher, pairs).eval()(IMAGES)
        torch.testing.assert_close(losses["again/kd"], 2.5 * losses["stage/kd"])

    def test_names_that_repeat_are_numbered(self):
        distiller = distil(pairs=[Pair("stage"), Pair("stage", method=FitNet), Pair("output", method=KD, name="stage")])
        assert distiller.names == ("stage", "stage#2", "stage#3")
        assert len(distiller(IMAGES)[1]) == 2 + 1 + 1

    def test_maps_are_resized_to_the_teachers(self):
        distiller = distil(pairs=[Pair("stem", "stage"), Pair("stage", "stem", FitNet)])
        observed = distiller.observe(IMAGES)
        assert observed["stem"].student.shape[2:] == observed["stem"].teacher.shape[2:] == (4, 4)
        assert observed["stage"].student.shape[2:] == observed["stage"].teacher.shape[2:] == (8, 8)

    @pytest.mark.parametrize(("ours", "theirs"), [("stage", "fc"), ("fc", "stage")])
    def test_a_map_beside_a_vector_is_averaged(self, ours, theirs):
        observed = distil(pairs=[Pair(ours, theirs)]).observe(IMAGES)[ours]
        assert observed.student.ndim == observed.teacher.ndim == 2

    def test_the_layout_may_be_told(self):
        pairs = [Pair("blocks", "stage", student_layout=Layout("tokens", 3, (1, 14)))]
        observed = distil(TokenNet(8), ConvNet(12), pairs).observe(IMAGES)["blocks"]
        assert observed.student.shape == (4, 8, 4, 4)

    def test_lists_go_to_methods_that_take_several(self):
        class Several(nn.Module):
            def __init__(self, student, teacher):
                super().__init__()
                self.shapes = [tuple(map(str, student)), tuple(map(str, teacher))]

            def forward(self, student, teacher):
                return {"kd": sum((a.mean() - b.mean()) ** 2 for a, b in zip(student, teacher, strict=True))}

        distiller = distil(pairs=[Pair(["stem", "stage"], ["stem", "stage"], Several)])
        assert distiller.methods[0].shapes == [("4x8x8", "8x4x4"), ("12x8x8", "24x4x4")]
        assert list(backward(distiller)[1]) == ["stem,stage/kd"]

    def test_a_list_of_methods_is_paired_each_as_it_wants(self):
        distiller = distil(ConvNet(classes=10), ConvNet(12, classes=10), method=[DiffKD, DIST])
        assert [(row[0], row[5]) for row in distiller.rows()] == [
            ("stage", "DiffKD"),
            ("output", "DiffKD"),
            ("output#2", "DIST"),
        ]


class TestErrors:
    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ([Pair("stag")], r"layer 'stag' is not in student ConvNet; nearest: 'stage' \(8x4x4\)"),
            ([Pair("stage", "stem.7")], r"layer 'stem.7' is not in teacher ConvNet; nearest: 'stem"),
            ([Pair("stem.1")], r"'stem.1' of student ConvNet has its output overwritten in place.*take 'stem.2'"),
            ([Pair("stage[0]")], "layer 'stage\\[0\\]' of ConvNet returned no tensor"),
            ([], "pairs is empty"),
            ("all", "pairs must be 'auto' or a list of Pair, got 'all'"),
        ],
    )
    def test_pairs(self, pairs, message):
        with pytest.raises(ValueError, match=message):
            distil(pairs=pairs)

    def test_several_methods_beside_a_pair_without_one(self):
        with pytest.raises(ValueError, match="pair 'stage' must name its own method, since 2 are given"):
            distil(pairs=[Pair("output", method=KD), Pair("stage")], method=[FitNet, KD])
        assert len(distil(pairs=[Pair("output", method=KD)], method=[FitNet, KD]).methods) == 1

    def test_the_layer_to_take_instead_works(self):
        backward(distil(pairs=[Pair("stem.2", "stem")]))

    def test_a_layer_that_runs_twice(self):
        with pytest.raises(ValueError, match=r"runs several times in one forward.*take 'around' instead"):
            distil(Twice(), ConvNet(), [Pair("shared", "stem")])
        backward(distil(Twice(), ConvNet(), [Pair("around", "stem")]))

    def test_other_classes(self):
        student, teacher = ConvNet(classes=10), ConvNet(classes=7)
        assert distil(student, teacher).names == ("stage",)
        for options in ({"method": KD}, {"pairs": [Pair("output", method=KD)]}):
            with pytest.raises(ValueError, match="classes"):
                distil(student, teacher, **options)

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_weights_of_pairs(self, weight):
        with pytest.raises(ValueError, match="of pair 'stage' is no factor of a loss: give 0 or more"):
            Pair("stage", weight=weight)

    def test_an_example_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"ConvNet cannot take an example of shape \(2, 1, 8, 8\)"):
            distil(example=torch.randn(2, 1, 8, 8))


class TestNeeds:
    class Labelled(nn.Module):
        needs = ("labels", "indices")

        def __init__(self, student, teacher):
            super().__init__()

        def forward(self, student, teacher, labels, indices):
            return {"kd": student.sum() * 0 + (labels * indices).sum()}

    def test_are_handed_over_and_others_ignored(self):
        distiller = distil(pairs=[Pair("stage"), Pair("output", method=self.Labelled)])
        assert distiller.needs == {"labels", "indices"}
        labels, indices = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 1, 1, 2])
        _, losses = distiller(IMAGES, labels=labels, indices=indices, boxes=None)
        assert float(losses["output/kd"].detach()) == 14

    def test_that_are_missing_are_named(self):
        distiller = distil(pairs=[Pair("output", method=self.Labelled)])
        with pytest.raises(
            TypeError, match=r"Labelled of pair 'output' needs indices: call distiller\(images, indices"
        ):
            distiller(IMAGES, labels=torch.ones(4))


def test_an_optimiser_that_misses_parameters_is_refused():
    distiller = distil()
    distiller.check_optimizer(torch.optim.SGD(distiller.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"misses \d+ trainable parameters, first 'methods.0"):
        distiller.check_optimizer(torch.optim.SGD(distiller.student.parameters(), lr=0.1))
    distiller.methods.requires_grad_(False)
    distiller.check_optimizer(torch.optim.SGD(distiller.student.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_three_steps(dtype):
    torch.manual_seed(0)
    distiller = distil(method=[partial(DiffKD, ae_channels=5), FitNet, DIST])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            _, losses = distiller(IMAGES)
            total = sum(losses.values())
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())
        optimizer.step()


def test_a_student_in_half_precision_from_the_start():
    distiller = distil(ConvNet(4).bfloat16(), ConvNet(12).bfloat16(), method=[DiffKD, FitNet, KD])
    backward(distiller, IMAGES.bfloat16())


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batch_sizes_than_the_examples(batch):
    student = ConvNet(4, norm=False)
    distiller = distil(student, method=[partial(DiffKD, ae_channels=5), FitNet, KD, DIST])
    backward(distiller, IMAGES[:batch])
    backward(distiller, torch.randn(batch, 3, 24, 20))
