import pytest
import torch
from torch import nn

from diffkd import FeatureShape
from diffkd.methods.srrl import SRRL


@pytest.mark.parametrize("size", [(), (3, 5), (1, 1)])
def test_formula(agree, size):
    batch, ours, theirs = 4, 3, 6
    method = SRRL(FeatureShape(ours, size), FeatureShape(theirs, size), feature_weight=0.5, weight=2.0).double()
    head = nn.Linear(theirs, 7).double()
    student = torch.randn(batch, ours, *size, dtype=torch.float64)
    teacher = torch.randn(batch, theirs, *size, dtype=torch.float64)

    def classify(feature):
        return head(feature.mean(dim=(2, 3)) if size else feature)

    def reference(s, t):
        w = method.connector[0].weight.reshape(theirs, ours)
        columns = s.reshape(batch, ours, -1)
        z = torch.stack([torch.stack([w @ columns[b, :, i] for i in range(columns.shape[2])], 1) for b in range(batch)])
        mean = z.mean(dim=(0, 2))
        variance = ((z - mean[:, None]) ** 2).mean(dim=(0, 2))
        z = ((z - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()).clamp(min=0)
        pooled, target = z.mean(2), t.reshape(batch, theirs, -1).mean(2)
        feature = ((pooled - target) ** 2).sum() / pooled.numel()
        logits = ((pooled - target) @ head.weight.T) ** 2
        return 2 * (0.5 * feature + logits.sum() / logits.numel())

    def ours_total(s, t):
        losses = method(s, t, teacher_head=classify)
        assert set(losses) == {"kd", "feature"}
        return losses["kd"] + losses["feature"]

    agree(ours_total, reference, student, teacher, [method.connector[0].weight])


def test_map_against_vector_is_refused():
    with pytest.raises(ValueError, match="pool the map"):
        SRRL(FeatureShape(3, (4, 4)), FeatureShape(3))
