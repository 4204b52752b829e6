import torch
import torch.multiprocessing
from torch import distributed

from diffkd import FeatureShape
from diffkd.methods.cirkd import CIRKD
from diffkd.methods.crd import CRD
from diffkd.methods.inputs import averaged, gathered, rank
from diffkd.methods.ofd import OFD

SHAPES = FeatureShape(3, (2, 3)), FeatureShape(4, (2, 3))
STEPS, BATCH = 3, 4


def build():
    torch.manual_seed(0)
    memories = {"classes": 3, "pixel_memory": 50, "region_memory": 20, "pixel_contrast": 5, "region_contrast": 5}
    built = CRD(*SHAPES, samples=20, negatives=5), CIRKD(*SHAPES, **memories), OFD(*([shape] for shape in SHAPES))
    return [method.double() for method in built]


def drawn(batch, shape, generator=None):
    return torch.randn(batch, shape.channels, 2, 3, dtype=torch.float64, generator=generator)


def run(part):
    """Train for a few steps on the part of each batch that belongs to this process; return the buffers."""
    crd, cirkd, ofd = build()
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        student, teacher = (drawn(BATCH, s, generator)[part] for s in SHAPES)
        indices = torch.randperm(20, generator=generator)[:BATCH][part]
        cells = torch.randint(0, 3, (BATCH, 2, 3), generator=generator)[part]
        crd(student, teacher, indices=indices, labels=indices % 3)
        cirkd(student, teacher, labels=cells)
        ofd([student], [teacher])
    return {
        f"{type(method).__name__}.{name}": value.clone()
        for method in (crd, cirkd, ofd)
        for name, value in method.named_buffers()
        if "projection" not in name and "connector" not in name
    }


def normalizers(part):
    """CRD's Z after the first step. With one sample in each class, all negatives are the other one, on any process."""
    torch.manual_seed(3)
    method = CRD(*SHAPES, samples=2, negatives=5).double()
    student, teacher = (drawn(2, s)[part] for s in SHAPES)
    indices = torch.arange(2)[part]
    method(student, teacher, indices=indices, labels=indices)
    return method.log_normalizers.clone()


def work(process, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=process, world_size=2)
    half = BATCH // 2
    result = run(slice(process * half, (process + 1) * half))
    result["gathered"] = gathered(torch.tensor([process, 10 + process]))
    result["averaged"] = averaged(torch.tensor([2.0 * process, 1.0]))
    result["normalizers"] = normalizers(slice(process, process + 1))
    assert rank() == process
    torch.save(result, f"{folder}/{process}.pt")
    distributed.destroy_process_group()


def test_alone_nothing_happens():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(gathered(x), x)
    assert not gathered(x).requires_grad
    assert torch.equal(averaged(x), x)
    assert rank() == 0


def test_two_processes_hold_what_one_would(tmp_path):
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in range(2))
    assert first["gathered"].tolist() == [0, 10, 1, 11]
    assert first["averaged"].tolist() == [1, 1]
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["normalizers"], normalizers(slice(None)))
    alone = run(slice(None))
    for name in alone:
        # Which pixels are kept and which samples are drawn differs between processes; the rest follows from the batch.
        if name not in ("CIRKD.pixels.entries", "CRD.log_normalizers"):
            torch.testing.assert_close(first[name], alone[name], msg=lambda text, name=name: f"{name}: {text}")
    assert first["CIRKD.pixels.entries"].norm(dim=1).sum() > 0
