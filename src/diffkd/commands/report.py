"""`diffkd report`: one page about a run or a comparison."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from diffkd.commands.plot import plot_training, saved_training
from diffkd.files.run_folder import RunFolder
from diffkd.files.weights import check_target
from diffkd.recipes.trust import UsageError
from diffkd.reports.contents import comparison_sections, run_sections
from diffkd.reports.html_page import check_libraries, write_page
from diffkd.reports.mistakes import Mistakes, find_mistakes
from diffkd.tasks.data_facts import facts_of

PAGE = "report.html"


def report(
    source: str,
    *,
    out: Path | None = None,
    pictures: bool = True,
    images: int = 5000,
    shown: int = 12,
    runs: bool = False,
    progress: bool = True,
    trust: list[str] | None = None,
) -> Path:
    """Write one self-contained HTML page about a run or a comparison; it requests nothing from any host.

    For a run: measurements, curves, losses by term, gamma, gradient balance, what student and teacher see, the worst
    images, confused classes, cost and recipe. For a comparison: the table, curves, losses by term, recipe.

    Args:
        source: folder of a run of at least one epoch, or of a comparison.
        out: file to write; None: `report.html` in that folder.
        pictures: for a run, build its models and data again, and show what they see and what the student gets wrong.
        images: number of evaluation images to look at for that.
        shown: number of worst images to show.
        runs: for a comparison, also write the page of every run.
        progress: print the file written.
        trust: files and modules of your own whose code the run's config.yaml may name; may be repeated.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if there is neither a run of at least one epoch nor a comparison.
        ModuleNotFoundError: if the extra for reports is not installed.
        ValueError: if a file is damaged, a number is out of range, or the models of the run cannot be built again.
        UsageError: if the run's config.yaml names code that is not trusted.
        OSError: if the file cannot be written.
    """
    check_libraries()
    if images < 1 or shown < 0:
        raise ValueError(f"images must be at least 1 and shown at least 0, got {images} and {shown}")
    folder = Path(source).expanduser()
    console = Console(stderr=True, quiet=not progress)
    target = folder / PAGE if out is None else out.expanduser()
    check_target(target, PAGE)
    if (folder / "comparison.json").is_file():
        headline, sections = comparison_sections(folder)
        write_page(target, folder.resolve().name, headline, sections)
        for found in sorted(folder.glob("*/seed-*/metrics.csv")) if runs else ():
            report(str(found.parent), pictures=pictures, images=images, shown=shown, progress=progress, trust=trust)
    elif (run := RunFolder(folder)).config.is_file() and run.metrics.is_file():
        with TemporaryDirectory() as place:
            figures, mistakes, classes = (
                _looked_at(run, Path(place), images, shown, trust or []) if pictures else ([], None, ())
            )
            headline, sections = run_sections(run, figures, mistakes, classes)
        write_page(target, folder.resolve().name, headline, sections)
    else:
        raise FileNotFoundError(
            f"{source} holds neither a run of at least one epoch nor a comparison: give the --out of `diffkd fit`, "
            "`compare` or `demo`"
        )
    console.print(f"report  {target}", highlight=False, markup=False, soft_wrap=True)
    return target


def write_report_of(source: Path, *, trust: list[str] | None = None, tell: Callable[[str], object]) -> None:
    """Write the page of a finished run or comparison, if the extra for reports is installed.

    Nothing that goes wrong here fails what has been computed: it is told in one line.

    Args:
        source: the folder.
        trust: as for :func:`report`.
        tell: called with a line about the page, or why there is none.
    """
    try:
        check_libraries()
    except ModuleNotFoundError:
        return
    try:
        tell(f"report  {report(str(source), trust=trust, progress=False)}")
    except (
        ArithmeticError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        UsageError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        tell(f"there is no {PAGE} ({reason}): `diffkd report {source} --pictures false` writes one without pictures")


def _looked_at(
    run: RunFolder, place: Path, images: int, shown: int, trust: list[str]
) -> tuple[list[Path], Mistakes | None, tuple[str, ...]]:
    """Return figures of what is seen, what the student gets wrong, and the names of the classes."""
    training, data = saved_training(run, trust)
    figures = plot_training(training, data, place)
    facts = facts_of(data)
    if facts.task == "representation":  # nothing is right or wrong
        return figures, None, ()
    training.result.to(training.device).eval()
    data.setup("validate")
    batches = (training.transfer_batch_to_device(batch, training.device, 0) for batch in data.val_dataloader())
    return figures, find_mistakes(training.result, facts, batches, shown=shown, limit=images), facts.classes
