import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EXACT
from torch import nn

from diffkd.diffusion.modules import (
    BatchNorm,
    Bottleneck,
    Denoiser,
    LinearAutoencoder,
    NoiseAdapter,
    PointwiseConv,
    pointwise,
)


def as_vector_module(module: nn.Module) -> nn.Module:
    """A copy of a stack of 1x1 convolutions whose weights lie in matrix products."""
    state = {name: value[..., 0, 0] if value.ndim == 4 else value for name, value in module.state_dict().items()}
    vector = copy.deepcopy(module)
    for name, child in list(vector.named_modules()):
        if isinstance(child, nn.Conv2d):
            parent = vector.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Linear(child.in_channels, child.out_channels))
    vector.load_state_dict(state)
    return vector


@given(channels=st.integers(1, 33), batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=25)
def test_parts_keep_shapes_of_any_size(channels, batch, height, width):
    x = torch.randn(batch, channels, height, width)
    denoised = Denoiser(channels)(x, torch.zeros(batch, dtype=torch.long))
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()
    gamma = NoiseAdapter(channels)(x)
    assert gamma.shape == (batch,)
    assert ((gamma > 0) & (gamma < 1)).all()
    latent, reconstruction = LinearAutoencoder(channels, 5)(x)
    assert latent.shape == (batch, 5, height, width)
    assert reconstruction.shape == x.shape


@given(channels=st.integers(1, 33), batch=st.integers(1, 4))
@settings(max_examples=15)
def test_parts_keep_shapes_of_vectors(channels, batch):
    x = torch.randn(batch, channels)
    assert Denoiser(channels, is_map=False)(x, torch.zeros(batch, dtype=torch.long)).shape == x.shape
    assert NoiseAdapter(channels, is_map=False)(x).shape == (batch,)
    latent, reconstruction = LinearAutoencoder(channels, 5, is_map=False)(x)
    assert latent.shape == (batch, 5)
    assert reconstruction.shape == x.shape


def test_matrix_products_are_1x1_convolutions():
    convolution = nn.Sequential(pointwise(6, 4, True), BatchNorm(4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    vector = as_vector_module(convolution).double()
    torch.testing.assert_close(vector(x), convolution(x[..., None, None])[..., 0, 0], **EXACT)


class TestBatchNorm:
    @pytest.mark.parametrize(("shape", "reference"), [((4, 3, 5, 6), nn.BatchNorm2d), ((4, 3), nn.BatchNorm1d)])
    def test_is_the_usual_one(self, shape, reference):
        ours, theirs = BatchNorm(3), reference(3)
        for _ in range(2):
            x = torch.randn(shape)
            assert torch.equal(ours(x), theirs(x))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))

    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
    def test_one_value_per_channel_takes_the_running_statistics(self, shape):
        norm = BatchNorm(3)
        norm(torch.randn(8, 3) * 2 + 5)
        before = copy.deepcopy(norm.state_dict())
        x = torch.randn(shape, requires_grad=True)
        out = norm(x)
        out.sum().backward()
        assert torch.equal(out, copy.deepcopy(norm).eval()(x))
        assert x.grad.isfinite().all()
        assert norm.weight.grad is not None
        assert all(torch.equal(norm.state_dict()[name], before[name]) for name in before)

    def test_refuses_other_ranks(self):
        with pytest.raises(ValueError, match=r"\(B, C\) or \(B, C, H, W\), got \(2, 3, 4\)"):
            BatchNorm(3)(torch.randn(2, 3, 4))

    def test_becomes_synchronised_when_asked(self):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(Denoiser(4))
        assert isinstance(converted.pred[3], nn.SyncBatchNorm)


def test_bottleneck_activates_after_the_sum_only_when_asked():
    plain, active = Bottleneck(8), Bottleneck(8, activate=True)
    active.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 3, 3)
    out = plain(x)
    assert (out < 0).any()
    assert torch.equal(active(x), out.relu())


def test_bottleneck_with_fewer_channels_than_its_reduction():
    assert Bottleneck(3, reduction=8).block[0].out_channels == 1


def test_time_embedding_tells_samples_apart():
    denoiser = Denoiser(4).double().eval()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64).expand(2, -1, -1, -1)
    out = denoiser(x, torch.tensor([0, 999]))
    assert not torch.allclose(out[0], out[1])
    torch.testing.assert_close(denoiser(x, torch.tensor([5])), denoiser(x, torch.tensor([5, 5])), **EXACT)


def test_time_embedding_cancels_in_the_students_loop_while_training():
    """One timestep for the whole batch is a constant per channel, which batch statistics take out again."""
    denoiser = Denoiser(4).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, torch.tensor([0])), denoiser(x, torch.tensor([400])), rtol=1e-10, atol=1e-10)


def test_denoiser_of_maps_predicts_normalised_noise_unless_told_otherwise():
    x = torch.randn(8, 4, 6, 6)
    normed = Denoiser(4)(x, torch.tensor([10]))
    torch.testing.assert_close(normed.std(dim=(0, 2, 3), unbiased=False), torch.ones(4), rtol=1e-3, atol=1e-3)
    free = Denoiser(4, output_norm=False)(x, torch.tensor([10]))
    assert not torch.allclose(free.std(dim=(0, 2, 3), unbiased=False), torch.ones(4), rtol=1e-1)


def test_autoencoder_without_norm_is_two_linear_maps():
    coder = LinearAutoencoder(6, 4, norm=False).double()
    assert [type(m).__name__ for m in coder.modules() if not list(m.children())] == ["PointwiseConv", "PointwiseConv"]
    x, y = torch.randn(2, 1, 6, 3, 3, dtype=torch.float64).unbind()
    bias = coder(torch.zeros_like(x))[1]
    torch.testing.assert_close(coder(x + y)[1] - bias, coder(x)[1] - bias + coder(y)[1] - bias, **EXACT)


def test_more_timesteps_than_the_authors_table():
    assert Denoiser(2).time_embedding.num_embeddings == 1280
    assert Denoiser(2, num_train_timesteps=4000).time_embedding.num_embeddings == 4000


class TestPointwiseConv:
    @pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 6, 1, 1), (3, 6, 1, 4), (0, 6, 2, 2)])
    def test_is_a_convolution_in_either_layout(self, shape):
        conv = PointwiseConv(6, 4).double()
        found = []
        for run, layout in (
            (nn.Conv2d.forward, torch.contiguous_format),
            (PointwiseConv.forward, torch.contiguous_format),
            (PointwiseConv.forward, torch.channels_last),
        ):
            conv.zero_grad()
            x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            x = x.to(memory_format=layout).requires_grad_()
            out = run(conv, x)
            assert out.is_contiguous(memory_format=layout)
            out.square().sum().backward()
            found.append((out.detach(), x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()))
        for other in found[1:]:
            for ours, theirs in zip(other, found[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
