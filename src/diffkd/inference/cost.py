"""What a model costs: parameters, multiply-adds, file sizes, and its time by runtime, batch and threads."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffkd.export.plain_student import plain_student
from diffkd.export.program_file import write_program
from diffkd.export.quantization import quantize_dynamic
from diffkd.inference.students import load_onnx
from diffkd.tasks.data_facts import DataFacts

Runtime = Literal["pytorch", "compiled", "onnx", "onnx-int8"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
_FEWEST = 3  # rounds, however long they take
_WARM_UP = 2


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: in the table, such as "student".
        model: name of the model.
        module: in evaluation mode; detectors take a list of images.
        facts: of its data: task, channels and image size.
    """

    name: str
    model: str
    module: nn.Module
    facts: DataFacts


@dataclass(frozen=True)
class Timing:
    """The time of a forward pass, in milliseconds of wall clock.

    Attributes:
        model: name of the subject.
        runtime: "pytorch", "compiled" (`torch.compile`), "onnx" or "onnx-int8" (both in onnxruntime).
        batch: images in the pass.
        threads: of the CPU; 0 on a GPU.
        median, low, high: median and quartiles.
        images_per_second: at the median.
        rounds: number of passes.
    """

    model: str
    runtime: str
    batch: int
    threads: int
    median: float
    low: float
    high: float
    images_per_second: float
    rounds: int


@dataclass
class Cost:
    """What one model costs, besides its time.

    Attributes:
        model: name of the model.
        parameters: their number.
        multiply_adds: of convolutions, matrix products and attention for one image.
        files: bytes by kind: ".safetensors", ".onnx", ".onnx int8".
        missing: why a runtime was not measured, by runtime.
    """

    model: str
    parameters: int
    multiply_adds: int
    files: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def measure_costs(
    subjects: Sequence[Subject],
    folder: Path,
    *,
    runtimes: Sequence[Runtime] = RUNTIMES,
    batch_sizes: Sequence[int] = (1, 16),
    threads: Sequence[int] = (1,),
    rounds: int = 20,
    seconds: float = 20.0,
    device: torch.device | None = None,
    on_step: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure models side by side: in each round every model runs once in every runtime.

    Args:
        subjects: the models.
        folder: for the exported files.
        runtimes: what to run them in.
        batch_sizes: images in a pass.
        threads: numbers of CPU threads; ignored on a GPU.
        rounds: passes of each model and runtime.
        seconds: limit for all rounds of one batch size and number of threads, after at least three.
        device: where PyTorch runs; None: the CPU. onnxruntime runs on the CPU.
        on_step: called with a line before each step.

    Returns:
        JSON-serialisable: "models", for each subject its :class:`Cost`; "timings", a list of :class:`Timing`; "device",
        "image_size" and "versions".

    Raises:
        ValueError: if a number is out of range, or a runtime is unknown.
    """
    place = torch.device("cpu") if device is None else device
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise ValueError(f"there is no runtime {unknown[0]!r}: give some of {', '.join(RUNTIMES)}")
    if not runtimes or min([rounds, *batch_sizes, *threads], default=0) < 1 or not batch_sizes or not threads:
        raise ValueError(
            "rounds, batch sizes and threads must be at least 1, and runtimes some of "
            f"{', '.join(RUNTIMES)}; got {rounds}, {list(batch_sizes)}, {list(threads)} and {list(runtimes)}"
        )
    costs: dict[str, Cost] = {}
    for subject in subjects:
        on_step(f"{subject.name}: counting and exporting {subject.model}")
        subject.module.eval().to(place)
        cost = costs[subject.name] = Cost(
            subject.model,
            sum(parameter.numel() for parameter in subject.module.parameters()),
            multiply_adds(subject.module, _input(subject.facts, 1, place)),
        )
        _write_files(subject, cost, folder, runtimes)
    timings: list[Timing] = []
    for count in threads if place.type == "cpu" else (0,):
        calls_of = {subject.name: _calls(subject, costs[subject.name], folder, runtimes, count) for subject in subjects}
        for batch in batch_sizes:
            where = f"{count} thread(s)" if count else place.type
            on_step(f"batch {batch}, {where}: up to {rounds} rounds of {sum(map(len, calls_of.values()))} passes")
            with _threads(count):
                timings += _alternate(subjects, costs, calls_of, batch, count, rounds, seconds, place)
    return {
        "device": _device_name(place),
        "image_size": [subjects[0].facts.in_channels, *subjects[0].facts.image_size],
        "models": {name: asdict(cost) for name, cost in costs.items()},
        "timings": [asdict(timing) for timing in timings],
        "versions": _versions(),
    }


def multiply_adds(module: nn.Module, images: Any) -> int:
    """Return the multiply-adds of convolutions, matrix products and attention in a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(images)
    return int(counter.get_total_flops()) // 2


def _write_files(subject: Subject, cost: Cost, folder: Path, runtimes: Sequence[str]) -> None:
    weights = folder / f"{subject.name}.safetensors"
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in subject.module.state_dict().items()},
        weights,
    )
    cost.files[".safetensors"] = weights.stat().st_size
    if not {"onnx", "onnx-int8"} & set(runtimes):
        return
    graph = _graph(folder, subject.name, "onnx")
    place = next((parameter.device for parameter in subject.module.parameters()), torch.device("cpu"))
    try:
        write_program(plain_student(subject.module.cpu(), subject.facts), graph, "{}", opset=None, tolerance=1e-2)
        cost.files[".onnx"] = graph.stat().st_size
        if "onnx-int8" in runtimes:
            small = _graph(folder, subject.name, "onnx-int8")
            quantize_dynamic(graph, small)
            cost.files[".onnx int8"] = small.stat().st_size
    except (ValueError, ModuleNotFoundError) as error:
        for runtime in ("onnx", "onnx-int8"):
            if not _graph(folder, subject.name, runtime).is_file():
                cost.missing[runtime] = str(error)
    finally:
        subject.module.to(place)


def _graph(folder: Path, subject: str, runtime: str) -> Path:
    return folder / f"{subject}-{runtime}.onnx"


def _calls(
    subject: Subject, cost: Cost, folder: Path, runtimes: Sequence[str], threads: int
) -> dict[str, Callable[[Any], object]]:
    """Return for each runtime a function of images."""
    calls: dict[str, Callable[[Any], object]] = {}
    for runtime in runtimes:
        if runtime in cost.missing:
            continue
        if runtime == "pytorch":
            calls[runtime] = subject.module
        elif runtime == "compiled" and subject.facts.task == "detection":
            cost.missing[runtime] = "detectors have a data-dependent number of boxes, which breaks their graph"
        elif runtime == "compiled":
            torch.compiler.reset()
            calls[runtime] = torch.compile(subject.module, dynamic=False)
        else:
            run, shape, _ = load_onnx(_graph(folder, subject.name, runtime), threads=threads or None)
            calls[runtime] = _of_batch(run, shape[0])
    return calls


def _of_batch(run: Callable[[Tensor], object], size: Any) -> Callable[[Any], object]:
    """Return a function of images (B, C, H, W), or a list of images, that runs a graph with a fixed batch in parts."""

    def call(images: Any) -> object:
        batch = torch.stack(list(images)) if isinstance(images, list) else images
        return [run(part) for part in torch.split(batch, size if isinstance(size, int) else len(batch))]

    return call


def _alternate(
    subjects: Sequence[Subject],
    costs: Mapping[str, Cost],
    calls_of: Mapping[str, Mapping[str, Callable[[Any], object]]],
    batch: int,
    threads: int,
    rounds: int,
    seconds: float,
    place: torch.device,
) -> Iterator[Timing]:
    """Yield the timings of one batch size: the models and runtimes take turns, so that other load hits all alike."""
    taken: dict[tuple[str, str], list[float]] = {}
    inputs = {}
    for subject in subjects:
        for runtime, call in calls_of[subject.name].items():
            images = inputs[subject.name, runtime] = _input(
                subject.facts, batch, place if "onnx" not in runtime else None
            )
            try:
                with torch.inference_mode():
                    for _ in range(_WARM_UP):
                        call(images)
            except Exception as error:  # a compiler may raise anything, and may not be installed
                costs[subject.name].missing[runtime] = (str(error).strip().splitlines() or [type(error).__name__])[0][
                    :200
                ]
                continue
            taken[subject.name, runtime] = []
    started = time.perf_counter()
    for done in range(rounds):
        if done >= _FEWEST and time.perf_counter() - started > seconds:
            break
        for (name, runtime), spent in taken.items():
            with torch.inference_mode():
                _wait(place)
                before = time.perf_counter()
                calls_of[name][runtime](inputs[name, runtime])
                _wait(place)
                spent.append(1000 * (time.perf_counter() - before))
    for (name, runtime), spent in taken.items():
        low, median, high = statistics.quantiles(spent, n=4, method="inclusive") if len(spent) > 1 else spent * 3
        yield Timing(name, runtime, batch, threads, median, low, high, 1000 * batch / median, len(spent))


def _input(facts: DataFacts, batch: int, place: torch.device | None) -> Any:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(batch, facts.in_channels, *facts.image_size, generator=draw).to(place or "cpu")
    return list(images) if facts.task == "detection" else images


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(place: torch.device) -> None:
    if place.type != "cpu":
        torch.accelerator.synchronize(place)


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    if place.type != "cpu":
        return place.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "cpu"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("diffkd", "torch", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
