import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkd import FeatureShape
from diffkd.methods.maskd import MasKD, cross_entropy, dice

SIZE = (3, 5)


def build(ours=4, theirs=4, role="feature", **options):
    options = {"tokens": 3, "token_steps": 0, **options}
    method = MasKD(FeatureShape(ours, SIZE), FeatureShape(theirs, SIZE, role), **options).double()
    with torch.no_grad():
        method.tokens.normal_()
    return method


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (2, 5)])
@pytest.mark.parametrize("weighting", [True, False])
def test_formula(agree, ours, theirs, weighting):
    method = build(ours, theirs, weighting=weighting)
    head = nn.Linear(theirs, 7).double()
    labels = torch.tensor([3, 0])
    student = torch.randn(2, ours, *SIZE, dtype=torch.float64)
    teacher = torch.randn(2, theirs, *SIZE, dtype=torch.float64)

    def masks_of(t):
        return [[1 / (1 + torch.exp(-torch.einsum("c,chw->hw", e, image))) for e in method.tokens] for image in t]

    def shares_of(t):
        if not weighting:
            return torch.full((2, 3), 1 / 3, dtype=torch.float64)
        first, _, last = method.weighting
        pooled = F.conv2d(t, first.weight, first.bias, padding=1).mean(dim=(2, 3))
        return torch.softmax(pooled @ last.weight[:, :, 0, 0].T + last.bias, dim=1)

    def kd(s, t):
        if ours != theirs:
            w, b = method.student_projection.weight[:, :, 0, 0], method.student_projection.bias
            s = torch.einsum("oc,bchw->bohw", w, s) + b[:, None, None]
        total = 0.0
        for b in range(2):
            for mask, share in zip(masks_of(t)[b], shares_of(t)[b], strict=True):
                mask, share = mask.detach(), share.detach()
                total = total + share * ((mask * (s[b] - t[b])) ** 2).sum() / mask.sum() / theirs
        return 7 * total / 2

    def tokens(t):
        masks, shares = masks_of(t), shares_of(t) * (1 if weighting else 3)
        total = 0.0
        for b in range(2):
            masked = sum(share * mask * t[b] for mask, share in zip(masks[b], shares[b], strict=True))
            total = total - torch.log_softmax(head(masked.mean(dim=(1, 2))), 0)[labels[b]]
            for i in range(3):
                for j in range(3):
                    if i != j:
                        x, y = masks[b][i], masks[b][j]
                        total = total + 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()) / 6
        return total / 2

    def total(s, t):
        return sum(method(s, t, labels=labels, teacher_head=lambda x: head(x.mean(dim=(2, 3)))).values())

    agree(total, lambda s, t: kd(s, t) + tokens(t), student, teacher, list(method.parameters()))


def test_kd_does_not_move_the_tokens_and_tokens_not_the_student():
    method = build(2, 4)
    student = torch.randn(2, 2, *SIZE, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *SIZE, dtype=torch.float64)
    losses = method(
        student, teacher, labels=torch.tensor([0, 1]), teacher_head=lambda x: x.mean(dim=(2, 3)) @ torch.eye(4).double()
    )
    assert torch.autograd.grad(losses["kd"], method.tokens, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(losses["tokens"], student, allow_unused=True) == (None,)


def test_kd_sets_in_after_the_tokens_have_learned():
    method = build(role="logits", token_steps=2)
    student, teacher = torch.randn(2, 2, 4, *SIZE, dtype=torch.float64)
    labels = torch.randint(-1, 5, (2, 7, 9))
    losses = [method(student, teacher, labels=labels) for _ in range(3)]
    assert [loss["kd"].item() > 0 for loss in losses] == [False, False, True]
    assert all(loss["tokens"] > 0 for loss in losses)
    assert method.step == 3
    resumed = build(role="logits", token_steps=2)
    resumed.load_state_dict(method.state_dict())
    assert resumed(student, teacher, labels=labels) == method(student, teacher, labels=labels)


def test_what_it_needs():
    assert build().needs == ("labels", "teacher_head")
    assert build(role="logits").needs == ("labels",)
    with pytest.raises(ValueError, match="tokens must be 2 or more"):
        build(tokens=1)


def test_dice():
    same = torch.tensor([[[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]])
    apart = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    assert dice(same) == 1
    assert dice(apart) == 0


def test_cross_entropy_resizes_and_ignores():
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 8, 12))
    resized = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=True)
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(resized, labels))
    partly = labels.clone()
    partly[0], partly[1, 0, 0] = 255, -1
    expected = F.cross_entropy(resized[1].flatten(1).T[1:], labels[1].flatten()[1:])
    torch.testing.assert_close(cross_entropy(logits, partly), expected)
    assert cross_entropy(logits, torch.full_like(labels, 255)) == 0


def trained(folder, **options):
    """A checkpoint as a run leaves it, with the tokens of two pairs, and the first of them."""
    first, second = build(**options), build(**options)
    state = {
        f"model.methods.{i}.{name}": value
        for i, one in enumerate((first, second))
        for name, value in one.state_dict().items()
    }
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": state, "epoch": 3}, folder / "checkpoints" / "last.ckpt")
    return first, second


@pytest.mark.parametrize("weighting", [True, False])
def test_tokens_of_a_run_of_their_own_stay_as_they_are(tmp_path, weighting):
    _, second = trained(tmp_path, weighting=weighting)
    options = {"tokens": 3, "weighting": weighting, "tokens_from": tmp_path, "tokens_key": "methods.1"}
    method = MasKD(FeatureShape(4, SIZE), FeatureShape(4, SIZE), **options).double()
    assert method.needs == ()
    student = torch.randn(2, 4, *SIZE, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, *SIZE, dtype=torch.float64)
    found = method(student, teacher)
    reference = second(student, teacher, labels=torch.tensor([0, 1]), teacher_head=lambda t: t.mean(dim=(2, 3)))
    assert set(found) == {"kd"}
    torch.testing.assert_close(found["kd"], reference["kd"], rtol=1e-6, atol=0)  # the file is read into float32
    assert found["kd"] > 0
    trainable = {name for name, one in method.named_parameters() if one.requires_grad}
    assert not any(name.startswith(("tokens", "weighting")) for name in trainable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"several pairs, .*model.methods.0.*model.methods.1.*: give one as tokens_key"),
        ({"tokens_key": "methods.7"}, "under 'methods.7'"),
        ({"tokens": 5, "tokens_key": "methods.0"}, "5 tokens of 4 channels.* holds none"),
    ],
)
def test_files_without_the_tokens_that_are_wanted_are_refused(tmp_path, options, message):
    trained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MasKD(FeatureShape(4, SIZE), FeatureShape(4, SIZE), **{"tokens": 3, "tokens_from": tmp_path, **options})


def test_a_missing_file_of_tokens_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MasKD(FeatureShape(4, SIZE), FeatureShape(4, SIZE), tokens_from=tmp_path / "nowhere.ckpt")
