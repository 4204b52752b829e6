"""Full against in-context sparse attention: time by length, and accuracy of a sparse student.

    uv run python -m benchmarks.attention time --lengths 1024 2048 4096 8192 16384
    uv run python -m benchmarks.attention accuracy --seeds 3

`time` measures attention alone (one image, two heads of width 64) and a whole network of two layers of width 192, each
forward alone and forward with backward: full attention is `scaled_dot_product_attention`. `accuracy` trains a small
vision transformer on the packaged Fashion-MNIST images at 1,024 tokens, gives it sparse attention, and fine-tunes that
from the same weights alone and with each method; the attention's time is measured beside it. Both go on where they were
when they are called again: lengths and runs that are in OUT are not measured again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.counting import multiply_adds
from benchmarks.memory import peak_bytes
from benchmarks.report import machine, save, table, with_quartiles
from benchmarks.timing import ratios, spread, take_turns, usual_clock
from diffkd.commands.arguments import fit_with
from diffkd.commands.compare import find_method
from diffkd.data import FashionSubset
from diffkd.models import InContextSparseAttention, load_model, sparse
from diffkd.training.memory import keep_freed_memory

OUT = Path("results/sparse")
NETS = "benchmarks/small_vit.py"
METHODS = ("alone", "kd", "fitnet-direct", "diffkd-direct")
UNTRAINED = {
    "full": "full",
    "sparse untrained": "isa",
    "sparse untrained, shortcut 1": "isa_shortcut",
    "a quarter sharp, untrained": "isa_quarter",
}
_HEADS, _WIDTH = 2, 64
_DATA = ("--data=diffkd.data.FashionSubset", "--data.batch_size=32", "--progress=false", f"--trust={NETS}")

Step = Callable[[], None]


def attention_steps(
    length: int, backward: bool, device: str, *, sharp_ratio: float = 0.5, flex: bool = False
) -> dict[str, Callable[[], Step]]:
    """Return makers of steps: attention of one image with tokens of the wanted number, full and sparse."""

    def make(attend: Callable[..., Tensor]) -> Step:
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, _HEADS, length, _WIDTH)
        qkv = torch.randn(shape, generator=generator).to(device).requires_grad_(backward)

        def step() -> None:
            out = attend(*qkv)
            if backward:
                qkv.grad = None
                torch.autograd.backward(out.sum())

        return step

    return {
        "full": partial(make, F.scaled_dot_product_attention),
        "sparse": partial(make, InContextSparseAttention(sharp_ratio=sharp_ratio, flex=flex)),
    }


def network_steps(length: int, backward: bool, device: str) -> dict[str, Callable[[], Step]]:
    """Return makers of steps: a whole network on one image with patches of the wanted number, full and sparse."""
    from timm.models import VisionTransformer

    height = 2 ** (length.bit_length() // 2)
    size = (4 * height, 4 * (length // height))

    def make(change: Callable[[nn.Module], nn.Module]) -> Step:
        torch.manual_seed(0)
        model = change(
            VisionTransformer(img_size=size, patch_size=4, embed_dim=192, depth=2, num_heads=3, num_classes=10)
        ).to(device)
        images = torch.randn(1, 3, *size, device=device)

        def step() -> None:
            with torch.set_grad_enabled(backward):
                out = model(images)
            if backward:
                model.zero_grad()
                out.sum().backward()

        return step

    return {"full": partial(make, lambda model: model), "sparse": partial(make, sparse)}


CASES: dict[str, tuple[Callable[[int, bool, str], dict[str, Callable[[], Step]]], bool]] = {
    "attention forward": (attention_steps, False),
    "attention forward and backward": (attention_steps, True),
    "attention forward, a quarter sharp": (partial(attention_steps, sharp_ratio=0.25), False),
    "attention forward, block masks": (partial(attention_steps, flex=True), False),
    "attention forward and backward, block masks": (partial(attention_steps, flex=True), True),
    "network forward": (network_steps, False),
    "network forward and backward": (network_steps, True),
}


def measure(case: str, length: int, rounds: int, device: str) -> dict[str, Any]:
    """Return times, ratio, multiply-adds and memory of one case and length."""
    make, backward = CASES[case]
    makers = make(length, backward, device)
    steps = {name: maker() for name, maker in makers.items()}
    with keep_freed_memory():
        times = take_turns(steps, rounds, warm_up=1, device=device, clock=usual_clock(device))
    return {
        "case": case,
        "length": length,
        "sparse / full": vars(ratios(times, "full")["sparse"]),
        "seconds": {name: vars(spread(values)) for name, values in times.items()},
        "multiply_adds": {name: multiply_adds(step) for name, step in steps.items()},
        "peak_bytes": {name: peak_bytes(maker, device) for name, maker in makers.items()},
    }


def time(out: Path, lengths: Sequence[int], cases: Sequence[str], rounds: int, device: str) -> None:
    """Measure what is missing in OUT/attention.json, and write it, a table and a picture."""
    file = out / "attention.json"
    facts: dict[str, Any] = {"machine": machine(device), "rows": []}
    if file.is_file():
        facts = json.loads(file.read_text(encoding="utf-8"))
    for length in lengths:
        for case in cases:
            if any((row["case"], row["length"]) == (case, length) for row in facts["rows"]):
                continue
            facts["rows"].append(measure(case, length, max(3, min(rounds, rounds * 4096 // length)), device))
            facts["rows"].sort(key=lambda row: (list(CASES).index(row["case"]), row["length"]))
            save(out, "attention", facts, draw(facts["rows"]))
            print(time_table(facts["rows"][-1:]), flush=True)
    print(time_table(facts["rows"]))


def time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the measurements as a Markdown table."""
    head = ("", "tokens", "sparse / full", "n", "multiply-adds, sparse / full", "MiB full", "MiB sparse")
    cells = [
        (
            row["case"],
            f"{row['length']:,}",
            with_quartiles(row["sparse / full"], 2),
            str(row["sparse / full"]["n"]),
            f"{row['multiply_adds']['sparse'] / max(1, row['multiply_adds']['full']):.2f}",
            *(f"{row['peak_bytes'][name] / 2**20:.0f}" for name in ("full", "sparse")),
        )
        for row in rows
    ]
    return table([head, *cells])


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a picture: the time of sparse attention in that of full attention, by length."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for case in CASES:
        some = [row for row in rows if row["case"] == case]
        if not some:
            continue
        found = [row["sparse / full"] for row in some]
        lengths, middle = [row["length"] for row in some], [one["median"] for one in found]
        (line,) = axes.plot(lengths, middle, "o-", label=case)
        axes.fill_between(
            lengths, [one["low"] for one in found], [one["high"] for one in found], alpha=0.2, color=line.get_color()
        )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="time, sparse / full", ylim=(0, None))
    axes.set_xticks(sorted({row["length"] for row in rows}), [f"{n:,}" for n in sorted({r["length"] for r in rows})])
    axes.minorticks_off()
    axes.legend()
    return figure


def accuracy(out: Path, runs: Path, methods: Sequence[str], seeds: int, per_class: int, epochs: int) -> None:
    """Train what is missing in OUT/accuracy.jsonl, one line a row, and print the table."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "accuracy.jsonl"
    rows: list[dict[str, Any]] = []
    if file.is_file():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def missing(row: str, seed: int) -> bool:
        return not any((one["row"], one["seed"]) == (row, seed) for one in rows)

    def keep(row: str, seed: int, **found: Any) -> None:
        rows.append({"row": row, "seed": seed, **found})
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)

    teacher = train_teacher(runs)
    weights = teacher / "student.safetensors"
    for row, net in UNTRAINED.items():
        if missing(row, 0):
            keep(row, 0, accuracy=score(f"{NETS}:{net}", weights))
    if missing("attention time", 0):
        keep("attention time", 0, **attention_time(weights), machine=machine("cpu"))
    # Full attention that is trained on as the others are, and fewer sharp queries, stand beside the methods.
    nets = dict.fromkeys(methods, "isa") | {"full, trained on": "full", "a quarter sharp, alone": "isa_quarter"}
    for seed in range(seeds):
        for row, net in nets.items():
            method = row if row in methods else "alone"
            if missing(row, seed):
                words = [*_DATA, f"--student={NETS}:{net}", f"--student_weights={weights}", f"--seed={seed}"]
                words += [f"--data.per_class={per_class}", f"--data.seed={seed}", *_adam(3e-4, epochs)]
                words += ["--data.augmentation.crop_padding=0", "--data.augmentation.flip=false"]
                if method != "alone":
                    words += [f"--teacher={NETS}:full", f"--teacher_weights={weights}"]
                    words += [f"--config={find_method(method, 'demo')}"]
                result = fit_with([*words, "--resume=true", f"--out={runs / row / f'seed-{seed}'}"])
                keep(row, seed, accuracy=100 * result["last"][result["score"]], images=10 * per_class)
    print(accuracy_table(rows))


def _adam(rate: float, epochs: int) -> list[str]:
    return [
        "--optimizer=torch.optim.AdamW",
        f"--optimizer.lr={rate}",
        "--optimizer.weight_decay=0.01",
        "--schedule.kind=cosine",
        "--schedule.per=step",
        f"--epochs={epochs}",
    ]


def train_teacher(runs: Path) -> Path:
    """Train the network with full attention, on 256 tokens and then on 1,024; return the folder of its run."""
    first, last = runs / "coarse", runs / "full"
    if not (last / "student.safetensors").is_file():
        flips = ["--data.augmentation.crop_padding=2", "--data.augmentation.flip=true", "--resume=true", "--seed=0"]
        words = [f"--student={NETS}:coarse", *_adam(2e-3, 6)]
        fit_with([*_DATA, *flips, *words, f"--out={first}"])
        words = [f"--student={NETS}:full", f"--student_weights={first}", "--data.per_class=200", *_adam(5e-4, 1)]
        fit_with([*_DATA, *flips, *words, f"--out={last}"])
    return last


def score(name: str, weights: Path) -> float:
    """Return the accuracy of a network on the test images, in percent."""
    model = load_model(name, num_classes=10, in_channels=1, weights=weights).eval()
    right = []
    data = FashionSubset(batch_size=50)
    with torch.inference_mode():
        for batch in data.val_dataloader():
            images, labels = batch[:2]
            right.append((model(images).argmax(1) == labels).float())
    return float(100 * torch.cat(right).mean())


def attention_time(weights: Path, rounds: int = 15) -> dict[str, Any]:
    """Return the time of the attention of a batch of 8 test images, sparse in full, in each of its layers and all."""
    model = load_model(f"{NETS}:full", num_classes=10, in_channels=1, weights=weights).eval()
    data = FashionSubset(batch_size=8)
    images = next(iter(data.val_dataloader()))[0]
    inputs: list[Tensor] = []
    layers: list[Any] = [block.attn for block in model.get_submodule("vit.blocks").children()]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.inference_mode():
        model(images)
        qkv = [
            layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
            for layer, x in zip(layers, inputs, strict=True)
        ]
        attend = InContextSparseAttention(shortcut=0.0)
        steps = {
            "full": lambda: [F.scaled_dot_product_attention(*one) for one in qkv],
            "sparse": lambda: [attend(*one, prefix_tokens=1) for one in qkv],
        }
        times = take_turns(steps, rounds, clock=usual_clock("cpu"))
    return {"tokens": qkv[0].shape[3] - 1, "sparse / full": vars(ratios(times, "full")["sparse"])}


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracies as a Markdown table: mean and standard deviation over the seeds, and the gap to `full`."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if "accuracy" in row:
            scores.setdefault(row["row"], []).append(row["accuracy"])
    full = statistics.mean(scores["full"])
    cells = [("", "n", "accuracy", "against full")]
    for name, found in scores.items():
        deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        mean = statistics.mean(found)
        cells.append((name, str(len(found)), f"{mean:.2f}{deviation}", f"{mean - full:+.2f}"))
    return table(cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure times or accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "accuracy"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="by default all, block masks on a GPU alone")
    parser.add_argument("--rounds", type=int, default=9, help="at 4,096 tokens; fewer, but three, above")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-class", type=int, default=100, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(argv)
    if options.what == "time":
        usual = [name for name in CASES if options.device == "cuda" or "block masks" not in name]
        time(options.out, options.lengths, options.cases or usual, options.rounds, options.device)
    else:
        accuracy(options.out, options.runs, options.methods, options.seeds, options.per_class, options.epochs)


if __name__ == "__main__":
    main()
