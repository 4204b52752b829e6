"""Representations without labels: agreement with the teacher, nearest neighbours and a linear probe."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.data.classification.augmentation import mix
from diffkd.data.loaders import BANK, HELD_OUT
from diffkd.distill.stages import read_embedding
from diffkd.features.layers import Layer, list_layers
from diffkd.files.history import Row
from diffkd.methods.inputs import like_parameters
from diffkd.tasks.distributed import gather_rows
from diffkd.tasks.task import Step

Batch = tuple[Tensor, Tensor, Tensor]
Embed = Callable[[Tensor], Tensor]

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO evaluates (Caron et al., ICCV 2021)
RIDGE = 1e-2  # of the linear map of "cosine", as a share of the mean variance of the student's embedding
L2 = 1e-3  # of the linear probe on standardised embeddings
_MOST_SIMILARITIES = 1 << 26  # similarities at a time, 256 MiB


class Representation:
    """Distillation of representations; batches are `(images (B, C, H, W), labels, indices (B,))`, labels unused.

    There is no loss of the task. Evaluation batches have a fourth entry, the kind of their images
    (:class:`~diffkd.data.loaders.InTurn`).

    Args:
        probe: whether evaluation batches include labelled images.
        teachers: functions from the student's images to each teacher's embedding (B, C); none: only the probe measures.
        mixup, cutmix: alpha of Mixup and CutMix, which here mix images alone.
    """

    name = "representation"

    def __init__(
        self, probe: bool = False, teachers: Sequence[Embed] = (), *, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        self.probe, self.teachers = probe, tuple(teachers)
        self.mixup, self.cutmix = mixup, cutmix
        self.known: list[Embeddings] = []  # of the teachers, which do not change

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of the metrics that are shown; the first selects the best epoch."""
        return ("knn", "cka") if self.probe else ("cka", "cosine")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that may be measured; "linear" is after the last epoch."""
        probe = ("knn", "linear") if self.probe else ()
        if not self.teachers:
            return probe
        return (*probe, *(f"teacher_{name}" for name in probe), "cka", "cosine")

    def step(self, batch: Batch, seed: int) -> Step:
        """Apply Mixup and CutMix, if enabled."""
        images, _, indices = batch
        if self.mixup or self.cutmix:
            images, _ = mix(images, torch.zeros_like(indices), 1, mixup=self.mixup, cutmix=self.cutmix, seed=seed)
        return Step(images, images, None, {"indices": indices})

    def losses(self, output: Any, step: Step) -> dict[str, Tensor]:
        """Return no losses: without labels only the distiller's apply."""
        return {}

    def meter(self, device: torch.device, *, last: bool = False) -> "Agreement":
        """Return the meter of agreement and probe; with `last` also of the linear probe."""
        return Agreement(self, linear=last)

    def judge(self, teacher: Callable[[Any], Any], batch: Any) -> None:
        """Return None, as there are no labels."""
        return


class Embeddings(NamedTuple):
    """Embeddings of images, with labels and kinds.

    Args:
        values: (N, C) float32.
        labels: (N,) int64, -1 for none.
        kinds: (N,) int64.
    """

    values: Tensor
    labels: Tensor
    kinds: Tensor

    @property
    def held_out(self) -> Tensor:
        """Embeddings of the held-out images."""
        return self.values[self.kinds == HELD_OUT]

    @property
    def bank(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels by which queries are classified."""
        return self.values[self.kinds == BANK], self.labels[self.kinds == BANK]

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of the images to classify."""
        chosen = (self.kinds != BANK) & (self.labels >= 0)
        return self.values[chosen], self.labels[chosen]


class Agreement:
    """Measures a student's embeddings on held-out images against the teacher's, and both on a labelled probe.

    "cka": linear CKA (:func:`linear_cka`), "cosine": :func:`mapped_cosine`, each the mean over the teachers, with
    several also of each ("cka/0"). "knn": top-1 of nearest neighbours (:func:`knn_classify`), "linear": top-1 of a
    linear probe (:func:`linear_classify`), and the same of the teachers ("teacher_knn"; of several "teacher_knn/1").

    Args:
        task: has the teachers.
        linear: whether to train linear probes.
    """

    def __init__(self, task: Representation, *, linear: bool) -> None:
        self.task, self.linear = task, linear
        self._layers: dict[int, list[Layer]] = {}
        self._rows: list[list[Tensor]] = [[] for _ in range(1 + len(task.teachers))]
        self._facts: list[Tensor] = []

    def update(self, model: nn.Module, batch: Any) -> None:
        """Embed the images of a batch."""
        images, labels, indices, *rest = batch
        kind = int(rest[0]) if rest else HELD_OUT
        given = like_parameters(images, model)
        if id(model) not in self._layers:
            two = given[:2] if len(given) > 1 else given.expand(2, *given.shape[1:])
            self._layers[id(model)] = list_layers(model, two)
        self._rows[0].append(read_embedding(self._layers[id(model)], model(given)).float())
        self._facts.append(torch.stack([labels, indices, torch.full_like(indices, kind)], dim=1))
        if not self.task.known:
            for rows, teacher in zip(self._rows[1:], self.task.teachers, strict=True):
                rows.append(teacher(images).float())

    def compute(self) -> Row:
        """Return the metrics over all images of all ranks, and reset."""
        facts = gather_rows(torch.cat(self._facts))
        # In the order of kinds and indices, however the images were spread over the ranks.
        order = torch.argsort(facts[:, 2] * (int(facts[:, 1].max()) + 1) + facts[:, 1])
        labels, kinds = facts[order, 0], facts[order, 2]

        def embeddings(rows: list[Tensor]) -> Embeddings:
            return Embeddings(gather_rows(torch.cat(rows))[order], labels, kinds)

        student = embeddings(self._rows[0])
        if not self.task.known:
            self.task.known = [embeddings(rows) for rows in self._rows[1:]]
        row: Row = {}
        if self.task.probe:
            row |= self._classified(student)
        each = {
            "cka": [linear_cka(student.held_out, one.held_out) for one in self.task.known],
            "cosine": [max(0.0, mapped_cosine(student.held_out, one.held_out)) for one in self.task.known],
        }
        for name, values in each.items():
            if values:
                row[name] = sum(values) / len(values)
            if len(values) > 1:
                row |= {f"{name}/{index}": value for index, value in enumerate(values)}
        if self.task.probe:
            for index, one in enumerate(self.task.known):
                number = f"/{index}" if len(self.task.known) > 1 else ""
                row |= {f"teacher_{name}{number}": value for name, value in self._classified(one).items()}
        self._rows, self._facts = [[] for _ in self._rows], []
        return row

    def _classified(self, one: Embeddings) -> Row:
        ways = {"knn": knn_classify} | ({"linear": linear_classify} if self.linear else {})
        queries, truth = one.queries
        return {name: float((way(*one.bank, queries) == truth).float().mean()) for name, way in ways.items()}


def linear_cka(ours: Tensor, theirs: Tensor) -> float:
    """Return the linear centred kernel alignment of two embeddings of the same images.

    `|Y'X|^2 / (|X'X| |Y'Y|)` with Frobenius norms and centred columns (Kornblith et al., *Similarity of Neural Network
    Representations Revisited*, ICML 2019, Eq. 6): 1 if they agree up to rotation and scale. It is biased upwards where
    there are fewer images than channels.

    Args:
        ours: (N, C).
        theirs: (N, D).

    >>> ours = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    >>> round(linear_cka(ours, 3 * ours.flip(1) + 1), 6)
    1.0
    """
    x, y = (_centred(one) for one in (ours, theirs))
    x, y = (one / one.norm().clamp_min(torch.finfo(one.dtype).tiny) for one in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale.clamp_min(torch.finfo(x.dtype).tiny))


def mapped_cosine(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean cosine between the teacher's embedding and what a linear map makes of the student's.

    The map is a ridge regression with an intercept, fitted to all other images for each image: the prediction that
    leaves an image out follows from the hat matrix H as `y - (y - Hy) / (1 - h)` (Allen, *Technometrics* 1974). Both
    are taken relative to the mean of the teacher's embeddings, which would otherwise dominate the angle.

    Args:
        ours: (N, C), of the student.
        theirs: (N, D), of the teacher.
    """
    x, y = _centred(ours), _centred(theirs)
    count = len(x)
    strength = RIDGE * count * x.var(dim=0, correction=0).mean().clamp_min(torch.finfo(x.dtype).tiny)
    if count < x.shape[1]:
        gram = x @ x.T
        hat = torch.linalg.solve(gram + strength * torch.eye(count).to(gram), gram)  # (N, N)
        fitted, own = hat @ y, hat.diagonal()
    else:
        gram = x.T @ x
        solved = torch.linalg.solve(gram + strength * torch.eye(len(gram)).to(gram), x.T)  # (C, N)
        fitted, own = x @ (solved @ y), (x * solved.T).sum(dim=1)
    left_out = y - (y - fitted) / (1 - own - 1 / count)[:, None]
    return float(F.cosine_similarity(left_out, y, dim=1).mean())


def knn_classify(bank: Tensor, labels: Tensor, queries: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Classify embeddings by the votes of their nearest neighbours, exactly.

    Neighbours by cosine similarity vote with the weight exp(similarity / 0.07) (Wu et al., *Unsupervised Feature
    Learning via Non-Parametric Instance Discrimination*, CVPR 2018, as DINO evaluates).

    Args:
        bank: (N, C) embeddings with labels.
        labels: (N,) int64.
        queries: (M, C).
        neighbours: k; at most N.

    Returns:
        (M,) int64 predicted classes.
    """
    bank, queries = F.normalize(bank), F.normalize(queries)
    classes, count = int(labels.max()) + 1, min(neighbours, len(bank))
    answers = []
    for some in torch.split(queries, max(1, _MOST_SIMILARITIES // len(bank))):
        nearest, found = (some @ bank.T).topk(count, dim=1)  # (m, k)
        votes = torch.zeros(len(some), classes, device=bank.device)
        # Relative to the nearest, so that the weights cannot overflow.
        votes.scatter_add_(1, labels[found], ((nearest - nearest[:, :1]) / TEMPERATURE).exp())
        answers.append(votes.argmax(dim=1))
    return torch.cat(answers)


def linear_classify(bank: Tensor, labels: Tensor, queries: Tensor, l2: float = L2, steps: int = 200) -> Tensor:
    """Classify embeddings by a logistic regression, trained to convergence by L-BFGS.

    It minimises the mean cross entropy + l2 / 2 |W|^2 on embeddings that are standardised per channel.

    Args:
        bank: (N, C) embeddings to train on.
        labels: (N,) int64.
        queries: (M, C).
        l2: strength of the regularisation.
        steps: most iterations.

    Returns:
        (M,) int64 predicted classes.
    """
    classes = int(labels.max()) + 1
    mean, deviation = bank.mean(dim=0), bank.std(dim=0, correction=0)
    deviation = deviation.clamp_min(1e-6 * float(deviation.max()) or 1.0)
    x, others = (_exact((one - mean) / deviation) for one in (bank, queries))
    truth = labels.to(x.device)
    with torch.inference_mode(False), torch.enable_grad():
        x, truth = x.clone(), truth.clone()  # inference tensors cannot be saved for a backward pass
        weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
        bias = x.new_zeros(classes).requires_grad_()
        optimizer: Any = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def loss() -> float:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), truth) + l2 / 2 * weight.square().sum()
            torch.autograd.backward(value)
            return float(value.detach())

        optimizer.step(loss)
    with torch.no_grad():
        return F.linear(others, weight, bias).argmax(dim=1).to(labels.device)


def _centred(embeddings: Tensor) -> Tensor:
    exact = _exact(embeddings)
    return exact - exact.mean(dim=0)


def _exact(tensor: Tensor) -> Tensor:
    """Return float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
