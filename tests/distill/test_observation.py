import torch
from small_distillers import IMAGES, backward, distil
from small_nets import ConvNet
from torch import Tensor


class Inferred(ConvNet):
    """Runs in inference mode by itself."""

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def test_a_teacher_may_run_in_inference_mode():
    teacher = Inferred(8)
    distiller = distil(teacher=teacher)
    _, losses = backward(distiller)
    plain = ConvNet(8)
    plain.load_state_dict(teacher.state_dict())
    ours, theirs = distiller.teacher_features(IMAGES), distil(teacher=plain).teacher_features(IMAGES)
    assert ours.keys() == theirs.keys() == {"stage", "output"}
    assert all(torch.equal(ours[name], theirs[name]) and not ours[name].is_inference() for name in ours)
    assert all(loss.isfinite() for loss in losses.values())
