"""Two processes with half the batch each learn what one process learns from the whole."""

from functools import partial

import torch
import torch.distributed as dist
from small_nets import ConvNet
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from diffkd import DiffKD, Distiller, FitNet, Pair

IMAGES = torch.linspace(-1, 1, 4 * 3 * 16 * 16, dtype=torch.float64).sin().reshape(4, 3, 16, 16)


class GivenDraws(nn.Module):
    """DiffKD without batch normalisation at the seams, whose draws follow from the teacher's feature alone."""

    def __init__(self, student, teacher):
        super().__init__()
        self.method = DiffKD(student, teacher)

    def forward(self, student, teacher):
        noise = (teacher * 100).sin()
        timesteps = (teacher.flatten(1).sum(dim=1) * 1000).long() % 1000
        return self.method(student, teacher, noise=noise, diffusion_noise=noise.cos(), timesteps=timesteps).losses


def make_distiller() -> Distiller:
    torch.manual_seed(0)
    pairs = [Pair("stage", method=FitNet), Pair("stage@pre", method=FitNet), Pair("output", method=GivenDraws)]
    distiller = Distiller(
        ConvNet(4, norm=False).double(), ConvNet(6, norm=False).double(), pairs, example=IMAGES[:2]
    ).double()
    for module in distiller.methods.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # batch statistics are each process's own
    return distiller


def train(distiller: nn.Module, images: torch.Tensor) -> None:
    output, losses = distiller(images)
    (output.square().mean() + sum(losses.values())).backward()


def worker(rank: int, address: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    distiller = make_distiller()
    parallel = DistributedDataParallel(distiller)
    for _ in range(2):  # a parameter without gradient would stop the second step
        distiller.zero_grad()
        train(parallel, IMAGES[2 * rank : 2 * rank + 2])
    torch.save({name: p.grad for name, p in distiller.named_parameters()}, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    start_processes(
        partial(worker, address=str(tmp_path / "meet"), results=str(tmp_path)), nprocs=2, start_method="forkserver"
    )
    alone = make_distiller()
    train(alone, IMAGES)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)
