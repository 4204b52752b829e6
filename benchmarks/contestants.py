"""Who takes part: a training step each of the student alone, KD, FitNet, DiffKD, and DiffKD written plainly.

"checkpointed" is DiffKD that keeps no activations of its denoising steps, "unet" one whose denoiser is a U-Net;
"direct" is the preset diffkd-direct, "fitnet-direct" fitnet-direct-standardized: both compare the logits as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import diffkd
from benchmarks.cases import Case
from benchmarks.plain_transcription import PlainDiffKD
from benchmarks.unet_denoiser import unet
from diffkd import KD, DiffKD, Distiller, FitNet, Pair, TeacherOptions
from diffkd.commands.compare import find_method
from diffkd.features.memory_layout import try_channels_last
from diffkd.training.optimization import build_optimizer

FEATURE_ALONE = ("fitnet", "diffkd", "checkpointed", "plain", "unet")
PRESETS = {"direct": "diffkd-direct", "fitnet-direct": "fitnet-direct-standardized"}
WITH_NETWORKS = ("alone", "kd", *FEATURE_ALONE, *PRESETS)
ON_REQUEST = ("unet", *PRESETS)  # a U-Net takes as long as all others together


@dataclass(frozen=True)
class Settings:
    """How the steps are run.

    Attributes:
        device: "cpu" or "cuda".
        precision: "float32", "bf16" (autocast) or "bf16-true" (parameters too).
        compile: run the distiller through torch.compile in this mode ("default"; "reduce-overhead" records CUDA
            graphs), no graph break allowed. The plain one never is: it breaks.
        plain_networks: the networks and the optimiser of all contestants as the plain transcription has them; otherwise
            all others have them as `diffkd fit` makes them: the teacher's BatchNorms folded and, on a CPU, channels
            last and an optimiser of one kernel.
    """

    device: str = "cpu"
    precision: str = "float32"
    compile: str | None = None
    plain_networks: bool = False


@dataclass(frozen=True)
class Step:
    """A training step that can be run again and again: forward, losses, backward, SGD with momentum."""

    run: Callable[[], None]
    parameters: int


def make_step(case: Case, contestant: str, settings: Settings) -> Step:
    """Return the step of one contestant, its networks and data drawn from a fixed seed.

    Raises:
        ValueError: if the contestant is unknown, or cannot take part in this case.
        ModuleNotFoundError: if it needs a package that is not installed.
    """
    known = WITH_NETWORKS if case.has_networks else FEATURE_ALONE
    if contestant not in known:
        raise ValueError(f"contestant {contestant!r} cannot take part here; choose from {', '.join(known)}")
    torch.manual_seed(0)
    return _network_step(case, contestant, settings) if case.has_networks else _feature_step(case, contestant, settings)


def _network_step(case: Case, contestant: str, settings: Settings) -> Step:
    if case.student is None or case.teacher is None or isinstance(case.size, tuple):
        raise ValueError(f"case {case.title!r} has no networks")
    images = _placed(torch.randn(case.batch, 3, case.size, case.size), settings)
    labels = torch.randint(case.classes, (case.batch,), device=settings.device)
    student = case.student().to(settings.device)
    as_fit = _runs_as_fit(contestant, settings)
    channels_last = as_fit and settings.device == "cpu" and try_channels_last(student, images[:2].float())
    if contestant == "alone":
        model = student
    else:
        teacher = case.teacher().to(settings.device)
        on_feature, on_output = (
            _preset(contestant)
            if contestant in PRESETS
            else (_method(contestant, case), _method(contestant, replace(case, ae_channels=None)))
        )
        feature, output = Pair(case.layer, method=on_feature), Pair("output", method=on_output)
        pairs = {"kd": [Pair("output", method=KD)], "fitnet": [feature]}.get(contestant, [feature, output])
        options = TeacherOptions(fold=as_fit, channels_last=channels_last)
        model = Distiller(student, teacher, pairs, example=images[:2].float(), teacher_options=options)
    model = model.to(_parameter_type(settings))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    forward: Callable[..., Any] = model
    if settings.compile and contestant != "plain":
        forward = torch.compile(model, fullgraph=True, mode=settings.compile)

    def total() -> Tensor:
        output = forward(images)
        output, losses = output if isinstance(output, tuple) else (output, {})
        task = F.cross_entropy(output.float(), labels)
        return sum(losses.values(), start=task)

    return _training(total, model, settings, as_fit=as_fit)


def _feature_step(case: Case, contestant: str, settings: Settings) -> Step:
    methods = nn.ModuleList(_method(contestant, case)(case.feature, case.feature) for _ in range(case.pairs)).to(
        device=settings.device, dtype=_parameter_type(settings)
    )
    shape = (case.batch, case.channels, *case.feature.size)
    features = [
        (_placed(torch.randn(shape), settings).requires_grad_(), _placed(torch.randn(shape), settings)) for _ in methods
    ]
    forwards: list[Callable[..., Any]] = list(methods)
    if settings.compile and contestant != "plain":
        forwards = [torch.compile(method, fullgraph=True, mode=settings.compile) for method in methods]

    def total() -> Tensor:
        loss = torch.zeros((), device=settings.device)
        for forward, (student, teacher) in zip(forwards, features, strict=True):
            student.grad = None
            result = forward(student, teacher)
            losses = result if isinstance(result, dict) else result.losses
            loss = loss + sum(losses.values())
        return loss

    return _training(total, methods, settings, as_fit=_runs_as_fit(contestant, settings))


def _runs_as_fit(contestant: str, settings: Settings) -> bool:
    return contestant != "plain" and not settings.plain_networks


def _training(total: Callable[[], Tensor], model: nn.Module, settings: Settings, *, as_fit: bool) -> Step:
    factory = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)
    optimizer = build_optimizer(model, factory) if as_fit else factory(model.parameters())
    mixed = settings.precision == "bf16"

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(settings.device, torch.bfloat16, enabled=mixed):
            loss = total()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Step(run, sum(p.numel() for p in model.parameters()))


def _method(contestant: str, case: Case) -> Callable[..., nn.Module]:
    if contestant in ("diffkd", "checkpointed", "unet"):
        checkpoint, denoiser = contestant == "checkpointed", unet if contestant == "unet" else None
        diffkd = partial(DiffKD, ae_channels=case.ae_channels, inference_steps=case.steps)
        return partial(diffkd, checkpoint=checkpoint, denoiser=denoiser)
    if contestant == "plain":
        return partial(PlainDiffKD, ae_channels=case.ae_channels, inference_steps=case.steps)
    return FitNet


def _preset(contestant: str) -> list[Callable[..., nn.Module]]:
    """Return the methods of a preset, that on the feature and that on the logits."""
    values = yaml.safe_load(find_method(PRESETS[contestant]).read_text(encoding="utf-8"))
    entries = [one if isinstance(one, dict) else {"class_path": one} for one in values["method"]]
    return [
        partial(getattr(diffkd, entry["class_path"].removeprefix("diffkd.")), **entry.get("init_args", {}))
        for entry in entries
    ]


def _placed(tensor: Tensor, settings: Settings) -> Tensor:
    return tensor.to(device=settings.device, dtype=_parameter_type(settings))


def _parameter_type(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.precision == "bf16-true" else torch.float32
