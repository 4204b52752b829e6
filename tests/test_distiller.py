import copy
import pickle
from functools import partial

import pytest
import torch
from small_nets import MLP, ChannelsLastNet, ConvNet, Pyramid, TokenNet, Twice, TwoInputs, Wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffkd import DIST, KD, DiffKD, Distiller, FitNet, Layout, Pair, TeacherInput, save_student

IMAGES = torch.randn(4, 3, 16, 16)


def distil(student=None, teacher=None, pairs="auto", **options):
    options.setdefault("example", IMAGES)
    student = ConvNet(4) if student is None else student
    return Distiller(student, ConvNet(12) if teacher is None else teacher, pairs, **options)


def backward(distiller, *inputs, **context):
    output, losses = distiller(*(inputs or (IMAGES,)), **context)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    return output, losses


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

    def test_one_model_twice(self):
        net = ConvNet()
        with pytest.raises(ValueError, match=r"share parameters: .* copy.deepcopy one of them"):
            distil(net, nn.DataParallel(net))

    def test_shared_parameters_must_be_frozen(self):
        student, teacher = ConvNet(4), ConvNet(4)
        teacher.stem = student.stem
        with pytest.raises(ValueError, match="share parameters"):
            distil(student, teacher)
        student.stem.requires_grad_(False)
        backward(distil(student, teacher))

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


class TestTeacher:
    def test_is_in_no_state_or_parameter_list(self):
        distiller = distil()
        held = {p.data_ptr() for p in distiller.teacher.parameters()}
        assert not held & {p.data_ptr() for p in [*distiller.parameters(), *distiller.buffers()]}
        assert all(name.startswith(("student.", "methods.")) for name in distiller.state_dict())
        assert not any(module is distiller.teacher for module in distiller.modules())

    def test_moves_along(self):
        distiller = distil().to(torch.float64)
        assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
        backward(distiller, IMAGES.double())
        parent = nn.Sequential(distiller).to("meta")
        assert {p.device.type for p in parent[0].teacher.parameters()} == {"meta"}

    def test_never_trains(self):
        teacher = ConvNet(12).train()
        distiller = distil(teacher=teacher)
        state = copy.deepcopy(teacher.state_dict())
        holder = nn.Sequential(distiller)
        for _ in range(2):
            holder.train()
            assert distiller.student.training
            assert not any(module.training for module in teacher.modules())
            backward(distiller)
            holder.eval()
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_may_have_a_type_of_its_own(self, dtype):
        distiller = distil(teacher=ConvNet(12).to(dtype), method=[DiffKD, FitNet, KD, DIST])
        backward(distiller)
        assert {p.dtype for p in distiller.teacher.parameters()} == {dtype}
        assert {p.grad.dtype for p in distiller.parameters()} == {torch.float32}

    def test_may_see_the_images_otherwise(self):
        half = (0.5,) * 3
        turn = TeacherInput((0.0,) * 3, (1.0,) * 3, half, half, size=(32, 32))
        distiller = distil(teacher_input=turn)
        assert distiller.rows()[0][4] == "24x8x8"
        expected = copy.deepcopy(distiller.teacher)(turn(IMAGES))
        torch.testing.assert_close(distiller.observe(IMAGES)["output"].teacher, expected)
        backward(distiller)
        assert not any("teacher_input" in name for name in distiller.state_dict())


class TestStudentIsUntouched:
    @pytest.mark.parametrize("training", [True, False])
    def test_output_is_bit_equal(self, training):
        alone = nn.Sequential(ConvNet(4), nn.Dropout(0.5))
        student = copy.deepcopy(alone)
        distiller = distil(student)
        alone.train(training)
        distiller.train(training)
        torch.manual_seed(3)
        expected = alone(IMAGES)
        torch.manual_seed(3)
        output, _ = distiller(IMAGES)
        assert torch.equal(output, expected)
        assert all(torch.equal(student.state_dict()[name], value) for name, value in alone.state_dict().items())

    def test_gradient_of_the_task_is_bit_equal(self):
        alone = ConvNet(4)
        student = copy.deepcopy(alone)
        alone(IMAGES).square().sum().backward()
        distil(student)(IMAGES)[0].square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(alone.parameters(), student.parameters(), strict=True))

    def test_its_file_holds_its_own_keys(self, tmp_path):
        distiller = distil()
        save_student(distiller.student, tmp_path / "student.safetensors")
        assert distiller.student.state_dict().keys() == ConvNet(4).state_dict().keys()

    def test_hooks_are_silent_outside(self):
        distiller = distil()
        average = AveragedModel(distiller.student, use_buffers=True)
        backward(distiller)
        average.update_parameters(distiller.student)
        recorder = distiller._student_recorder
        for model in (distiller.student, average, average.module):
            model(IMAGES)
            assert recorder.outputs == {}
        assert distiller._teacher_recorder.outputs == {}
        distiller.teacher(IMAGES)
        assert distiller._teacher_recorder.outputs == {}

    def test_two_distillers_on_one_student(self):
        student = ConvNet(4)
        first, second = distil(student, pairs=[Pair("stage")]), distil(student, pairs=[Pair("stem"), Pair("output")])
        assert sorted(first(IMAGES)[1]) == ["stage/diffusion", "stage/kd"]
        assert len(second(IMAGES)[1]) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda distiller: pickle.loads(pickle.dumps(distiller))])
def test_copies_are_independent(copied):
    distiller = distil(pairs=[Pair("stage", method=partial(DiffKD, ae_channels=5)), Pair("output", method=KD)])
    twin = copied(distiller)
    torch.manual_seed(1)
    _, expected = backward(distiller)
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert twin.gammas == {}
    torch.manual_seed(1)
    _, losses = backward(twin)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    for ours, theirs in zip(distiller.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.data_ptr() != theirs.data_ptr()
    assert twin.teacher is not distiller.teacher


def test_states_go_from_one_distiller_to_another():
    distiller, other = distil(), distil()
    other.load_state_dict(distiller.state_dict())
    other.teacher.load_state_dict(distiller.teacher.state_dict())
    torch.manual_seed(1)
    expected = distiller(IMAGES)[1]
    torch.manual_seed(1)
    assert all(torch.equal(loss, expected[name]) for name, loss in other(IMAGES)[1].items())


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


class TestCompiled:
    def test_models_come_plain_if_their_layers_are_wanted(self):
        compiled = torch.compile(ConvNet(4), backend="eager")
        for pair in ((compiled, ConvNet(4)), (ConvNet(4), compiled)):
            with pytest.raises(ValueError, match=r"ConvNet is compiled already.*compile the distiller"):
                distil(*pair)
            assert list(backward(distil(*pair, method=KD))[1]) == ["output/kd"]  # what they return needs no hook

    def test_equals_eager_with_gradients(self):
        torch.compiler.reset()
        distiller = distil(method=[partial(DiffKD, ae_channels=5), KD], pairs="auto").double()
        twin = copy.deepcopy(distiller)
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        images = IMAGES.double()
        for _ in range(2):
            distiller.zero_grad()
            twin.zero_grad()
            torch.manual_seed(1)
            output, losses = backward(distiller, images)
            torch.manual_seed(1)
            twin_output, twin_losses = backward(compiled, images)
            close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
            close(twin_output, output)
            close(twin_losses, losses)
            for ours, theirs in zip(distiller.parameters(), twin.parameters(), strict=True):
                close(theirs.grad, ours.grad)
        assert sorted(twin.gammas) == sorted(distiller.gammas)
        torch.compiler.reset()
