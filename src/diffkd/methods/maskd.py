"""MasKD: match features under masks that learned tokens make from the teacher's feature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.diffusion.distances import at_least_float32
from diffkd.features.shape import FeatureShape, Want
from diffkd.files.weights import format_names, read_contents
from diffkd.methods.inputs import align, check_same_grid, full_precision, like_parameters, require_maps


class MasKD(nn.Module):
    """Masked distillation with receptive tokens (Huang, Zhang, You, Wang, Qian, Cao, Xu, ICLR 2023).

    A token e_i makes a mask of the teacher's map, `M_i = sigmoid(e_i . t)` at every position. "kd" is the squared error
    under each mask, over the mask's sum and the channels; the masks of an image are weighted by a small network.
    "tokens" trains tokens and weighting: the task loss of the teacher when it continues from its masked map, plus the
    mean Dice coefficient between masks, which makes them differ. "kd" gives no gradient to the tokens.

    The authors train the tokens first, in a separate run of 2000 steps (for segmentation 10,000, at rate 0.1 and
    weight decay 1e-3), as with `weight=0` in a run whose student is thrown away; `tokens_from` then takes them from
    there and freezes them. Without it they are trained in the student's run and by its optimiser; "kd" starts after
    `token_steps`, and the tokens continue to be trained after that.
    The authors' detectors later multiply the masks by the student's too; this implementation does not.

    The defaults are those of the authors' code for RetinaNet. For segmentation they mask class maps, with 8 tokens and
    without weighting, with a weight of 0.5.

    Args:
        student: the student's shape, a map.
        teacher: the teacher's shape, a map.
        tokens: number of tokens, 2 or more.
        weighting: weight the masks of an image.
        token_steps: steps before "kd" starts, unless the tokens come from a file.
        tokens_from: checkpoint of a run that trained tokens, or its folder: tokens and weighting are taken from it and
            stay constant.
        tokens_key: prefix of their names in the file, such as "model.methods.0", if it has those of several pairs.
        task_loss: the teacher's task loss, called with the output of `teacher_head` and the labels; None:
            cross-entropy.
        token_weight: factor of "tokens".
        weight: factor of "kd".

    Raises:
        ValueError: if one of them is a vector, there are fewer than two tokens, or the file has none that fit.
        FileNotFoundError: if there is no such file.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature"})
    step: Tensor

    def __init__(
        self,
        student: FeatureShape,
        teacher: FeatureShape,
        *,
        tokens: int = 6,
        weighting: bool = True,
        token_steps: int = 2_000,
        tokens_from: str | Path | None = None,
        tokens_key: str | None = None,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
        token_weight: float = 1.0,
        weight: float = 7.0,
    ) -> None:
        super().__init__()
        require_maps("MasKD", student, teacher)
        if tokens < 2:
            raise ValueError(f"tokens must be 2 or more, since their masks are compared with one another, got {tokens}")
        channels = teacher.channels
        self.student_projection = align(student, teacher)
        self.tokens = nn.Parameter(0.01 * torch.randn(tokens, channels))
        self.weighting = (
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, tokens, 1)
            )
            if weighting
            else None
        )
        for layer in self.weighting or ():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:  # as the authors start them
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.on_logits = teacher.role == "logits"
        self.learns_tokens = tokens_from is None
        if tokens_from is not None:
            self._take_tokens(Path(tokens_from).expanduser(), tokens_key)
        self.token_steps, self.task_loss = token_steps, task_loss or cross_entropy
        self.token_weight, self.weight = token_weight, weight
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def needs(self) -> tuple[str, ...]:
        """Keyword arguments of forward: what trains tokens; the head only if the map is not the teacher's output."""
        if not self.learns_tokens:
            return ()
        return ("labels",) if self.on_logits else ("labels", "teacher_head")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        labels: Any = None,
        teacher_head: Callable[[Tensor], Any] | None = None,
    ) -> dict[str, Tensor]:
        """Compare the maps under the masks, and train the tokens.

        Args:
            student: (B, Cs, H, W).
            teacher: (B, Ct, H, W).
            labels: target of the task loss: by default classes (B,) or (B, H', W'), outside of 0..K-1 ignored. Not used
                where the tokens come from a file.
            teacher_head: the rest of the frozen teacher after the layer: a map of the teacher's shape to the task's
                output. None: the map is the output.

        Returns:
            {"kd": loss, "tokens": loss}, the second where the tokens are trained.
        """
        check_same_grid(student, teacher)
        teacher = teacher.detach()
        ours = at_least_float32(self.student_projection(like_parameters(student, self)))
        theirs = at_least_float32(teacher)
        with full_precision(student):
            masks = (self.tokens.to(theirs.dtype) @ theirs.flatten(2)).sigmoid()  # (B, tokens, H * W)
        if self.weighting is None:
            shares, importance = masks.new_ones(masks.shape[:2]), masks.new_full(masks.shape[:2], 1 / masks.shape[1])
        else:
            scores = at_least_float32(self.weighting(like_parameters(teacher, self)))
            shares = importance = scores.flatten(1).softmax(dim=1)

        error = (ours - theirs).square().mean(dim=1).flatten(1)  # (B, H * W)
        fixed = masks.detach()
        under = (fixed.square() * error[:, None]).sum(dim=2) / fixed.sum(dim=2).clamp_min(1e-5)  # (B, tokens)
        loss = (under * importance.detach()).sum(dim=1).mean()

        if not self.learns_tokens:
            return {"kd": self.weight * loss}
        mixture = (masks * shares[:, :, None]).sum(dim=1).reshape(len(theirs), 1, *theirs.shape[2:])
        masked = (theirs * mixture).to(teacher.dtype)
        task = self.task_loss(masked if teacher_head is None else teacher_head(masked), labels)
        begun = self.step >= self.token_steps
        if self.training:
            self.step += 1
        return {"kd": self.weight * loss * begun, "tokens": self.token_weight * (task + dice(masks))}

    def _take_tokens(self, path: Path, key: str | None) -> None:
        """Load tokens and weighting from a checkpoint and freeze them."""
        file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        tensors = read_contents(file).tensors
        own = {name: value for name, value in self.state_dict().items() if name.startswith(("tokens", "weighting"))}
        found = [
            prefix
            for name in tensors
            if name.endswith("tokens")
            and (prefix := name.removesuffix("tokens")) is not None
            and all(prefix + one in tensors and tensors[prefix + one].shape == own[one].shape for one in own)
        ]
        wanted = found if key is None else [prefix for prefix in found if prefix.removesuffix(".").endswith(key)]
        if len(wanted) != 1:
            have = format_names([prefix.removesuffix(".") for prefix in found])
            what = (
                f"those of several pairs, {have}: give one as tokens_key" if found else "none: give that of another run"
            )
            raise ValueError(
                f"tokens_from needs {len(self.tokens)} tokens of {self.tokens.shape[1]} channels"
                f"{f' under {key!r}' if key else ''}, and {file} holds {what}"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[wanted[0] + name])
        for name, parameter in self.named_parameters():
            if name in own:
                parameter.requires_grad_(False)


def dice(masks: Tensor) -> Tensor:
    """Return the mean Dice coefficient `2 a.b / (a.a + b.b)` of all pairs of different masks, for (B, tokens, N)."""
    with full_precision(masks):
        inner = masks @ masks.transpose(1, 2)
    own = inner.diagonal(dim1=1, dim2=2)
    coefficients = 2 * inner / (own[:, :, None] + own[:, None, :]).clamp_min(1e-12)
    count = masks.shape[1]
    off_diagonal = coefficients.sum(dim=(1, 2)) - coefficients.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (off_diagonal / (count * (count - 1))).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K) or (B, K, H, W), resized to the labels, over known labels.

    Resized with aligned corners, as in the authors' code for segmentation.
    """
    if logits.ndim == 4 and logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(at_least_float32(logits), labels.shape[1:], mode="bilinear", align_corners=True)
    known = (labels >= 0) & (labels < logits.shape[1])
    total = F.cross_entropy(at_least_float32(logits), labels.where(known, -100), ignore_index=-100, reduction="sum")
    return total / known.sum().clamp_min(1)
