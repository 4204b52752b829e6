"""`diffkd push`: send a student to the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from diffkd.export.hub import send, write_repository
from diffkd.export.student_file import Which, find_student


def push(
    student: str,
    repository: str,
    *,
    which: Which = "last",
    private: bool = False,
    license: str | None = None,
    message: str | None = None,
    folder: Path | None = None,
) -> str:
    """Send a student to the Hugging Face Hub: its weights, its card without paths of this machine, and a README.md.

    Others then write `hub:USER/NAME` where a student or teacher is named. You must be logged in (`hf auth login`).

    Args:
        student: folder of a run, or a student's file with its card beside it.
        repository: USER/NAME; created if it is not there.
        which: for a run, the student of the last or of the best epoch.
        private: create it as a private repository.
        license: of the weights, such as apache-2.0; None says nothing.
        message: of the commit.
        folder: write the files here, to look at them, and send nothing.

    Returns:
        The address of the repository, or the folder.

    Raises:
        FileNotFoundError: if there is no such student.
        ValueError: if the student has no card, `repository` is no name, or `folder` holds other files.
        PermissionError: if you may not write there.
        OSError: if the Hub cannot be reached.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    file = find_student(student, which)
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--folder {folder} is there and not empty: give a new one")
        for written in write_repository(file, folder, repository, license):
            print(written)  # noqa: T201
        return str(folder)
    with TemporaryDirectory() as temporary:
        write_repository(file, Path(temporary), repository, license)
        address = send(Path(temporary), repository, private=private, message=message)
    print(f"{file} is at {address}; use it as hub:{repository}")  # noqa: T201
    return address
