import pytest
import torch
from benchmarks.cases import CASES
from benchmarks.contestants import Settings, make_step
from benchmarks.unet_denoiser import UNetDenoiser, unet

from diffkd.diffusion.modules import Denoiser


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 2)])
def test_the_u_net_takes_maps_of_any_size(size):
    pytest.importorskip("diffusers")
    network = UNetDenoiser(6, levels=(32, 64, 64))
    noisy = torch.randn(2, 6, *size, requires_grad=True)
    predicted = network(noisy, torch.tensor([3, 900]))
    assert predicted.shape == noisy.shape
    predicted.sum().backward()
    assert noisy.grad.isfinite().all()


def test_the_u_net_takes_part_when_asked_for():
    pytest.importorskip("diffusers")
    made = make_step(CASES["segmentation"].smaller(), "unet", Settings())
    made.run()
    assert made.parameters > 13e6


def test_vectors_keep_the_light_denoiser():
    assert isinstance(unet(8, is_map=False), Denoiser)
