"""The teacher, the student, copies and compiled twins: nobody touches what is not theirs."""

import copy
import pickle
from functools import partial

import pytest
import torch
from small_distillers import IMAGES, backward, distil
from small_nets import ConvNet
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffkd import DIST, KD, DiffKD, FitNet, Pair, TeacherInput, save_student


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
        assert not any(module.training for module in teacher.modules())
        teacher.train()  # somebody wakes it
        state = copy.deepcopy(teacher.state_dict())
        holder = nn.Sequential(distiller)
        for _ in range(2):
            holder.train()
            assert distiller.student.training
            assert not any(module.training for module in teacher.modules())
            backward(distiller)
            holder.eval()
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())

    def test_is_put_to_sleep_again_whoever_wakes_it(self):
        teacher = ConvNet(12)
        distiller = distil(teacher=teacher)
        state = copy.deepcopy(teacher.state_dict())
        teacher.train()
        backward(distiller)
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())

    def test_gets_no_gradients_even_if_it_switches_them_on(self):
        class Graded(ConvNet):
            def forward(self, images):
                with torch.enable_grad():
                    return super().forward(images)

        distiller = distil(teacher=Graded(12), method=[DiffKD, FitNet, KD, DIST])
        backward(distiller)
        assert all(parameter.grad is None for parameter in distiller.teacher.parameters())

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
        assert distiller._sources[0].recorder.outputs == {}
        distiller.teacher(IMAGES)
        assert distiller._sources[0].recorder.outputs == {}

    def test_hooks_come_off(self):
        distiller = distil()
        copied = copy.deepcopy(distiller)
        distiller.release()
        for model in (distiller.student, distiller.teacher):
            assert not any(module._forward_hooks for module in model.modules())
        assert b"diffkd" not in pickle.dumps(nn.Sequential(*distiller.student.children()))
        with pytest.raises(ValueError, match="released"):
            distiller(IMAGES)
        assert copied(IMAGES)[1]  # a copy keeps its own
        copied.release()
        assert not any(module._forward_hooks for module in copied.student.modules())

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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestCompiled:
    def test_models_come_plain_if_their_layers_are_wanted(self):
        compiled = torch.compile(ConvNet(4), backend="eager")
        for pair in ((compiled, ConvNet(4)), (ConvNet(4), compiled)):
            with pytest.raises(ValueError, match=r"ConvNet is compiled already.*compile the distiller"):
                distil(*pair)
            assert list(backward(distil(*pair, method=KD))[1]) == ["output/kd"]  # what they return needs no hook

    @pytest.mark.parametrize("part", ["", "stage"])
    def test_models_compiled_in_place_likewise(self, part):
        student = ConvNet(4)
        student.get_submodule(part).compile(backend="eager")
        for layer in ("stage", "stage.0"):
            with pytest.raises(ValueError, match=rf"compiled already, as a whole or around its layer '{layer}'"):
                distil(student, pairs=[Pair(layer, "stage")])
        assert list(backward(distil(student, method=KD))[1]) == ["output/kd"]

    def test_a_compiled_part_is_a_layer_but_has_none(self):
        student = ConvNet(4)
        student.stage = torch.compile(student.stage, backend="eager")
        backward(distil(student, pairs=[Pair("stage", "stage")]))
        with pytest.raises(ValueError, match=r"around its layer 'stage\._orig_mod\.0'"):
            distil(student, pairs=[Pair("stage._orig_mod.0", "stage")])

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
