import copy

import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.cirkd import CIRKD

SIZE = (3, 5)


def build(ours=4, theirs=6, **options):
    options = {"classes": 3, "pixel_memory": 40, "region_memory": 8, "pixel_contrast": 11, **options}
    return CIRKD(FeatureShape(ours, SIZE), FeatureShape(theirs, SIZE), region_contrast=5, pixels_per_image=2, **options)


def batch(size=2, ours=4, theirs=6):
    labels = torch.randint(-1, 4, (size, 6, 10))  # -1 and 3 are to be ignored
    return *(torch.randn(size, c, *SIZE, dtype=torch.float64) for c in (ours, theirs)), labels


def pixels(x):
    """All pixels of all images, of length 1."""
    return [x[b, :, y, i] / x[b, :, y, i].norm() for b in range(len(x)) for y in range(SIZE[0]) for i in range(SIZE[1])]


def divergence(s_scores, t_scores):
    p, q = (torch.exp(torch.stack(scores) / 0.1) for scores in (t_scores, s_scores))
    p, q = p / p.sum(), q / q.sum()
    return (p * torch.log(p / q)).sum()


def test_the_loss_in_the_batch(agree):
    method = build().double()
    student, teacher, labels = batch()
    area = SIZE[0] * SIZE[1]

    def reference(s, t):
        ours, theirs = pixels(s), pixels(t)
        total = 0.0
        for i in range(2):
            for j in range(2):
                for a in range(i * area, (i + 1) * area):
                    others = range(j * area, (j + 1) * area)
                    total = total + divergence(*([x[a] @ x[k] for k in others] for x in (ours, theirs)))
        return total / area / 4

    agree(lambda s, t: method(s, t, labels=labels)["kd"], reference, student, teacher)


@pytest.mark.parametrize("term", ["pixel", "region"])
def test_the_losses_to_the_memories(agree, term):
    method = build(theirs=16).double()  # wide, so that no ReLU switches a whole pixel off
    for _ in range(3):
        student, teacher, labels = batch(theirs=16)
        method(student, teacher, labels=labels)
    method.eval()  # so that the memory stays, and the batch normalisation is a fixed map
    student, teacher, labels = batch(theirs=16)
    queue = method.pixels if term == "pixel" else method.regions
    entries, exists = queue.draw(11 // 3 + 1 if term == "pixel" else 5 // 3 + 1, method.step, term == "region")
    assert exists.all()
    known = [0 <= labels[b, 2 * y, 2 * x] < 3 for b in range(2) for y in range(SIZE[0]) for x in range(SIZE[1])]

    def reference(s, t):
        ours, theirs = pixels(method.student_projection(s)), pixels(t)
        terms = [
            divergence([a @ e for e in entries], [b @ e for e in entries])
            for a, b, counts in zip(ours, theirs, known, strict=True)
            if counts
        ]
        return 0.1 * sum(terms) / len(terms)

    agree(lambda s, t: method(s, t, labels=labels)[term], reference, student, teacher, list(method.parameters()))


def test_what_the_memories_hold():
    method = build(pixel_memory=100, region_memory=10).double()
    student, teacher, labels = batch()
    method(student, teacher, labels=labels)
    rows = pixels(teacher)
    for c in range(3):
        regions, stored = [], 0
        for b in range(2):
            mine = [
                rows[(b * SIZE[0] + y) * SIZE[1] + x]
                for y in range(SIZE[0])
                for x in range(SIZE[1])
                if labels[b, 2 * y, 2 * x] == c
            ]
            if not mine:
                continue
            mean = torch.stack(mine).mean(0)
            regions.append(mean / mean.norm())
            count = min(2, len(mine))
            for row in method.pixels.entries[100 * c + stored : 100 * c + stored + count]:
                assert min((row - pixel).abs().max() for pixel in mine) < 1e-12
            stored += count
        assert method.pixels.count[c] == stored
        kept = method.regions.entries[10 * c : 10 * c + len(regions)]
        torch.testing.assert_close(kept, torch.stack(regions))


def test_empty_memories_and_no_labels_give_zero():
    method = build().double()
    student, teacher, labels = batch()
    losses = method(student.requires_grad_(), teacher, labels=torch.full_like(labels, 255))
    assert losses["pixel"] == 0
    assert losses["region"] == 0
    losses["region"].backward()
    assert student.grad.isfinite().all()
    assert method.pixels.count.sum() == 0


def test_a_class_without_entries_does_not_count():
    method = build().double().eval()
    with torch.no_grad():
        method.regions.entries[0, :] = torch.randn(6)
        method.regions.count[0] = 1
    student, teacher, labels = batch()
    # All draws are the one entry: every softmax is uniform over them and 0 elsewhere.
    assert method(student, teacher, labels=labels)["region"].item() == pytest.approx(0, abs=1e-12)


def test_pooling_averages_squares():
    student, teacher = (x[:, :, :2, :4].repeat_interleave(2, 2).repeat_interleave(2, 3) for x in batch()[:2])
    labels = torch.zeros(2, 4, 8, dtype=torch.int64)
    fine = build().double()(student[:, :, ::2, ::2], teacher[:, :, ::2, ::2], labels=labels)["kd"]
    torch.testing.assert_close(build(pool=2).double()(student, teacher, labels=labels)["kd"], fine)
    assert build(pool=8).double()(student, teacher, labels=labels)["kd"] == 0  # a softmax over one position


def test_a_resumed_run_goes_on_as_it_would_have():
    batches = [batch() for _ in range(5)]
    method = build().double()
    results = []
    for step, (student, teacher, labels) in enumerate(batches):
        if step == 3:
            saved = copy.deepcopy(method.state_dict())
        results.append(method(student, teacher, labels=labels))
    torch.manual_seed(999)
    resumed = build().double()
    resumed.load_state_dict(saved)
    for expected, (student, teacher, labels) in zip(results[3:], batches[3:], strict=True):
        assert resumed(student, teacher, labels=labels) == expected
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), method.buffers(), strict=True))


def test_errors():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        build(temperature=0)
    method = build(region_memory=3).double()
    student, teacher, labels = batch(4)
    with pytest.raises(ValueError, match="more than the memory of 3"):
        method(student, teacher, labels=labels)
    with pytest.raises(ValueError, match=r"CIRKD needs the class of every pixel, .* got torch.int64 of \(4,\)"):
        method(student, teacher, labels=labels[:, 0, 0])
