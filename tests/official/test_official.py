import pytest
import torch
from torch import nn

from diffkd import DiffKD
from diffkd.diffusion.distances import kl_divergence, mse
from diffkd.official import from_official, our_name, split_checkpoint, their_name, to_official_state

MAP = {"student_channels": 6, "teacher_channels": 16, "use_ae": True, "ae_channels": 9}
VECTOR = {"student_channels": 10, "teacher_channels": 10, "kernel_size": 1}


def shifted_state(config):
    """A state under the authors' names that no fresh module has."""
    state = to_official_state(from_official(config))
    return {n: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v + 3 for n, v in state.items()}


@pytest.mark.parametrize("config", [MAP, VECTOR, {**MAP, "kernel_size": 1}, {**VECTOR, "kernel_size": 3}])
def test_states_go_round(config):
    state = shifted_state(config)
    back = to_official_state(from_official(config, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert all(not value.requires_grad for value in back.values())


def test_names_and_shapes_are_the_authors():
    maps = to_official_state(from_official(MAP))
    expected = {
        "trans.weight": (9, 6, 1, 1),
        "ae.encoder.0.weight": (9, 16, 1, 1),
        "ae.encoder.1.running_var": (9,),
        "ae.decoder.0.weight": (16, 9, 1, 1),
        "model.time_embedding.weight": (1280, 9),
        "model.pred.0.block.0.weight": (2, 9, 1, 1),
        "model.pred.1.block.3.weight": (2, 2, 3, 3),
        "model.pred.2.bias": (9,),
        "model.pred.3.num_batches_tracked": (),
        "noise_adapter.feat.0.block.0.weight": (1, 9, 1, 1),
        "noise_adapter.pred.weight": (2, 9),
        "proj.0.weight": (9, 9, 1, 1),
        "proj.1.weight": (9,),
    }
    assert {name: tuple(maps[name].shape) for name in expected} == expected
    vectors = to_official_state(from_official(VECTOR))
    expected = {
        "trans.weight": (10, 10, 1, 1),
        "model.pred.0.weight": (40, 10, 1, 1),
        "model.pred.8.weight": (10, 40, 1, 1),
        "noise_adapter.feat.0.weight": (20, 10, 1, 1),
        "noise_adapter.pred.weight": (2, 10),
        "model.time_embedding.weight": (1280, 10),
    }
    assert {name: tuple(vectors[name].shape) for name in expected} == expected
    assert not any(name.startswith("ae.") for name in vectors)


def test_arguments_mean_what_they_mean_there():
    model = from_official({"student_channels": 6, "teacher_channels": 16, "use_ae": True})
    assert model.latent_channels == 8  # half of the teacher's where none is given
    assert from_official({"student_channels": 6, "teacher_channels": 16, "ae_channels": 4}).autoencoder is None
    assert not from_official(VECTOR).is_map
    assert len(from_official({**MAP, "inference_steps": 3}).steps) == 3
    assert from_official({**MAP, "num_train_timesteps": 100}).num_train_timesteps == 100
    model = from_official(VECTOR, distance=kl_divergence)
    student, teacher = torch.randn(2, 4, 10).unbind()
    result = model(student, teacher)
    torch.testing.assert_close(result.losses["kd"], kl_divergence(result.denoised, result.target))


def test_state_in_double_makes_a_double_module():
    state = {n: v.double() if v.is_floating_point() else v for n, v in shifted_state(MAP).items()}
    model = from_official(MAP, state)
    assert model.dtype == torch.float64
    result = model(torch.randn(2, 6, 3, 3).double(), torch.randn(2, 16, 3, 3).double())
    assert result.denoised.dtype == torch.float64


def test_old_checkpoints_have_no_batch_counters():
    state = {n: v for n, v in shifted_state(MAP).items() if not n.endswith("num_batches_tracked")}
    back = to_official_state(from_official(MAP, state))
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"student_channels": 6}, "missing \\['teacher_channels'\\]"),
        ({**MAP, "chanels": 3}, "unknown \\['chanels'\\]"),
        ({**MAP, "kernel_size": 5}, "kernel_size must be 3 .* got 5"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        from_official(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("proj.0.weight"), "missing proj.0.weight"),
        (lambda s: s.update({"proj.7.weight": torch.ones(1)}), "unknown proj.7.weight"),
        (lambda s: s.update({"trans.weight": torch.ones(9, 7, 1, 1)}), r"trans.weight is \(9, 7, 1, 1\)"),
        # As many entries, but not the same matrix.
        (lambda s: s.update({"trans.weight": torch.ones(6, 9, 1, 1)}), r"trans.weight is \(6, 9, 1, 1\)"),
    ],
)
def test_states_must_fit_exactly(change, message):
    state = shifted_state(MAP)
    change(state)
    with pytest.raises(ValueError, match=message):
        from_official(MAP, state)


def test_names_go_both_ways():
    for name in DiffKD(4, 4, ae_channels=2).state_dict():
        assert our_name(their_name(name)) == name


LAYERS = ["layer4", "fc", "model.13", "backbone.model.layer4", "features.proj.0", "trans", "model"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_split_into_student_and_modules(prefix):
    student = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).state_dict()
    states = {layer: shifted_state(MAP if layer != "fc" else VECTOR) for layer in LAYERS}
    state = dict(student)
    for layer, entries in states.items():
        state |= {f"_diff.{layer}.{name}": value for name, value in entries.items()}
    state["_align.layer4.weight"] = torch.ones(1)
    plain, modules = split_checkpoint({f"{prefix}{name}": value for name, value in state.items()})

    assert plain.keys() == student.keys()
    assert all(plain[name] is student[name] for name in student)
    assert sorted(modules) == sorted(LAYERS)
    assert not modules["fc"].is_map
    assert modules["fc"].distance is kl_divergence  # as the authors' code has it for logits
    assert modules["layer4"].distance is mse
    for layer, module in modules.items():
        back = to_official_state(module)
        assert back.keys() == states[layer].keys()
        assert all(torch.equal(back[name], states[layer][name]) for name in back)
    assert modules["layer4"].autoencoder is not None
    assert (modules["layer4"].student_channels, modules["layer4"].teacher_channels) == (6, 16)


def test_a_plain_checkpoint_has_no_modules():
    state = {"conv.weight": torch.ones(1)}
    assert split_checkpoint(state) == (state, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("_diff.layer4.trans.weight"), "of layer 'layer4' lacks 'trans.weight'"),
        (lambda s: s.pop("_diff.layer4.proj.1.bias"), "missing proj.1.bias"),
        (lambda s: s.update({"_diff.layer4.tail.weight": torch.ones(1)}), "'_diff.layer4.tail.weight' is not of"),
    ],
)
def test_incomplete_checkpoints(change, message):
    state = {f"_diff.layer4.{name}": value for name, value in shifted_state(MAP).items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        split_checkpoint(state)
