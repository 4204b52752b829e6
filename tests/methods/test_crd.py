import copy
from math import exp

import pytest
import torch

from diffkd import FeatureShape
from diffkd.methods.crd import CRD, other_class_samples


def build(samples=30, negatives=8, shapes=((3,), (5,)), **options):
    ours, theirs = (FeatureShape(shape[0], shape[1:]) for shape in shapes)
    return CRD(ours, theirs, samples=samples, negatives=negatives, dim=4, **options).double()


def batch(size=5, samples=30, shapes=((3,), (5,)), classes=3):
    features = [torch.randn(size, *shape, dtype=torch.float64) for shape in shapes]
    indices = torch.randperm(samples)[:size]
    return *features, {"indices": indices, "labels": indices % classes}


def reference(before, s, t, indices, labels):
    """One candidate after the other, from the probabilities of the paper. `before` is the method before the step."""
    n, count = before.samples, before.negatives
    known = before.classes.clone()
    known[indices] = labels
    drawn = other_class_samples(known, labels, count, before.step, spare=before.spare)

    def project(layer, x):
        x = x.reshape(*x.shape[:2], -1).mean(2) @ layer.weight.T + layer.bias
        return [row / (row @ row).sqrt() for row in x]

    ours, theirs = project(before.student_projection, s), project(before.teacher_projection, t)
    total = 0.0
    for side, (embeddings, memory) in enumerate([(ours, before.teacher_memory), (theirs, before.student_memory)]):
        scores = [
            [torch.exp(e @ memory[k] / 0.07) for k in (index, *others.tolist())]
            for e, index, others in zip(embeddings, indices.tolist(), drawn, strict=True)
        ]
        flat = [score.item() for row in scores for score in row]
        z = sum(flat) / len(flat) * n if before.step == 0 else exp(before.log_normalizers[side].item())
        noise = count / n
        for positive, *negatives in scores:
            total = total - torch.log((positive / z) / (positive / z + noise + 1e-7))
            for negative in negatives:
                total = total - torch.log(noise / (negative / z + noise + 1e-7))
    return 0.8 * total / len(s)


@pytest.mark.parametrize("shapes", [((3,), (5,)), ((3, 2, 3), (5, 4, 1))])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_formula(agree, shapes, steps_before):
    method = build(shapes=shapes)
    for _ in range(steps_before):
        student, teacher, given = batch(shapes=shapes)
        method(student, teacher, **given)
    before = copy.deepcopy(method)
    # The copy computes the reference with the parameters of the original.
    before.student_projection, before.teacher_projection = method.student_projection, method.teacher_projection
    student, teacher, given = batch(shapes=shapes)
    agree(
        lambda s, t: method(s, t, **given)["kd"],
        lambda s, t: reference(before, s, t, **given),
        student,
        teacher,
        list(method.parameters()),
    )


def test_memories_hold_running_averages():
    method = build()
    student, teacher, given = batch()
    old = method.student_memory.clone()
    method(student, teacher, **given)
    projected = method.student_projection(student)
    projected = projected / projected.norm(dim=1, keepdim=True)
    new = 0.5 * old[given["indices"]] + 0.5 * projected
    torch.testing.assert_close(method.student_memory[given["indices"]], (new / new.norm(dim=1, keepdim=True)).detach())
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[given["indices"]] = False
    assert torch.equal(method.student_memory[untouched], old[untouched])
    assert method.classes[given["indices"]].tolist() == given["labels"].tolist()


def test_a_sample_that_is_there_twice_counts_once():
    student, teacher, _ = batch(3)
    given = {"indices": torch.tensor([4, 9, 4]), "labels": torch.tensor([0, 1, 0])}
    method, single = build(), build()
    single.load_state_dict(method.state_dict())
    method(student, teacher, **given)
    single(student[:2], teacher[:2], **{name: value[:2] for name, value in given.items()})
    torch.testing.assert_close(method.student_memory, single.student_memory)


def test_a_resumed_run_goes_on_as_it_would_have():
    batches = [batch() for _ in range(4)]
    method = build()
    losses = []
    for step, (student, teacher, given) in enumerate(batches):
        if step == 2:
            saved = copy.deepcopy(method.state_dict())
        losses.append(method(student, teacher, **given)["kd"])
    torch.manual_seed(999)
    resumed = build()
    resumed.load_state_dict(saved)
    for loss, (student, teacher, given) in zip(losses[2:], batches[2:], strict=True):
        assert resumed(student, teacher, **given)["kd"] == loss
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), method.buffers(), strict=True))


def test_memories_start_alike_whatever_the_seed():
    first = build()
    torch.manual_seed(5)
    assert torch.equal(first.teacher_memory, build().teacher_memory)


def test_evaluation_changes_nothing():
    method = build()
    student, teacher, given = batch()
    method(student, teacher, **given)
    method.eval()
    saved = copy.deepcopy(method.state_dict())
    assert method(student, teacher, **given)["kd"] == method(student, teacher, **given)["kd"]
    assert all(torch.equal(saved[name], value) for name, value in method.state_dict().items())


def test_negatives_are_of_other_classes_and_cover_them():
    classes = torch.tensor([2, 0, 1, 0, -1, 2, 0, 1])
    labels = torch.tensor([0, 1, 2, 7])
    drawn = [other_class_samples(classes, labels, 3, torch.tensor(step), spare=3) for step in range(3000)]
    for label, rows in zip(labels.tolist(), torch.stack(drawn, dim=1), strict=True):
        allowed = [i for i, c in enumerate(classes.tolist()) if c != label]
        assert sorted(set(rows.flatten().tolist())) == allowed
        assert all(len(set(row.tolist())) == 3 for row in rows)  # without replacement
        counts = rows.flatten().bincount(minlength=8)[allowed].double() / rows.numel()
        assert counts.tolist() == pytest.approx([1 / len(allowed)] * len(allowed), abs=0.03)


def test_with_the_labels_of_all_samples_no_negative_is_of_the_class():
    labels = torch.arange(30) % 3
    method = build(sample_labels=labels.tolist())
    assert method.classes.tolist() == labels.tolist()
    assert method.spare == 10
    drawn = other_class_samples(method.classes, torch.tensor([1]), 20, torch.tensor(0), spare=10)
    assert sorted(drawn[0].tolist()) == [i for i in range(30) if i % 3 != 1]
    with pytest.raises(ValueError, match="labels of"):
        build(sample_labels=[0, 1])


def test_one_class_alone_does_not_break():
    classes, labels = torch.zeros(5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    drawn = other_class_samples(classes, labels, 9, torch.tensor(0))
    assert drawn.shape == (2, 9)
    assert drawn.max() < 5


def test_errors():
    with pytest.raises(ValueError, match="samples must be 2 or more"):
        CRD(FeatureShape(3), FeatureShape(5), samples=1)
    student, teacher, given = batch()
    with pytest.raises(ValueError, match="CRD needs one index for each image"):
        build()(student, teacher, indices=given["indices"][:2], labels=given["labels"])
    with pytest.raises(ValueError, match="mixed labels"):
        build()(student, teacher, indices=given["indices"], labels=torch.rand(5, 3))
