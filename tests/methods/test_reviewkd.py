import pytest
import torch
import torch.nn.functional as F

from diffkd import FeatureShape
from diffkd.methods.reviewkd import ReviewKD, hierarchical_loss

OURS = [FeatureShape(3, (8, 11)), FeatureShape(5, (4, 5)), FeatureShape(4, (2, 3))]
THEIRS = [FeatureShape(6, (9, 9)), FeatureShape(2, (4, 5)), FeatureShape(7, (3, 2))]


def maps(shapes, batch=2):
    return [torch.randn(batch, shape.channels, *shape.size, dtype=torch.float64) for shape in shapes]


def nearest(x, height, width):
    rows = [y * x.shape[2] // height for y in range(height)]
    columns = [i * x.shape[3] // width for i in range(width)]
    return x[:, :, rows][:, :, :, columns]


def cells(x, grid):
    """Average over cells whose edges are rounded outwards."""
    height, width = x.shape[2:]
    rows = [(y * height // grid, -(-(y + 1) * height // grid)) for y in range(grid)]
    columns = [(i * width // grid, -(-(i + 1) * width // grid)) for i in range(grid)]
    return torch.stack(
        [torch.stack([x[:, :, a:b, c:d].mean(dim=(2, 3)) for c, d in columns], dim=2) for a, b in rows], dim=2
    )


def context_loss(s, t):
    coarse = [grid for grid in (4, 2, 1) if grid < min(s.shape[2:])]
    terms = [((s - t) ** 2).mean()] + [((cells(s, g) - cells(t, g)) ** 2).mean() for g in coarse]
    shares = [2.0**-i for i in range(len(terms))]
    return sum(w * term for w, term in zip(shares, terms, strict=True)) / sum(shares)


def normalized(x):
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("pooled", [True, False])
def test_formula(agree, pooled):
    method = ReviewKD(OURS, THEIRS, hidden_channels=4, pooled=pooled).double()
    *shallow, deepest = maps(OURS)
    theirs = maps(THEIRS)

    def reference(s, _):
        ours, goals = [*shallow, s], list(theirs)
        if pooled:
            ours.append(s.mean(dim=(2, 3), keepdim=True))
            goals.append(goals[-1].mean(dim=(2, 3), keepdim=True))
        below, total = None, 0.0
        for level in range(len(ours) - 1, -1, -1):
            fusion = method.fusions[level]
            x = normalized(torch.einsum("oc,bchw->bohw", fusion.narrow[0].weight[:, :, 0, 0], ours[level]))
            if below is not None:
                below = nearest(below, *x.shape[2:])
                w, b = fusion.attention[0].weight[:, :, 0, 0], fusion.attention[0].bias
                z = 1 / (1 + torch.exp(-torch.einsum("oc,bchw->bohw", w, torch.cat([x, below], 1)) - b[:, None, None]))
                x = x * z[:, :1] + below * z[:, 1:]
            below = nearest(x, *goals[level].shape[2:])
            out = normalized(F.conv2d(below, fusion.widen[0].weight, padding=1))
            total = total + context_loss(out, goals[level])
        return 5 * total

    parameters = [p for fusion in method.fusions for p in (fusion.narrow[0].weight, fusion.widen[0].weight)]
    agree(lambda s, _: method([*shallow, s], theirs)["kd"], reference, deepest, theirs[-1], parameters)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3), (5, 9), (8, 8)])
def test_hierarchical_loss(size):
    student, teacher = torch.randn(2, 3, 4, *size, dtype=torch.float64)
    assert hierarchical_loss(student, teacher).item() == pytest.approx(context_loss(student, teacher).item(), abs=1e-10)
    assert hierarchical_loss(teacher, teacher) == 0


def test_the_width_of_the_fusion():
    assert ReviewKD(OURS, THEIRS).fusions[0].narrow[0].out_channels == OURS[-1].channels
    wide = [FeatureShape(2048, (4, 4))]
    assert ReviewKD(wide, [FeatureShape(8, (4, 4))], pooled=False).fusions[0].narrow[0].out_channels == 512


def test_errors():
    with pytest.raises(ValueError, match="as many levels on both sides, got 3 and 2"):
        ReviewKD(OURS, THEIRS[1:])
    with pytest.raises(ValueError, match="got 0 and 0"):
        ReviewKD([], [])
    with pytest.raises(ValueError, match="needs maps"):
        ReviewKD([FeatureShape(3)], [FeatureShape(3)])
