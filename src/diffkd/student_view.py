"""What a teacher is given when its input is made inside the student's own forward."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from diffkd.recorder import Call


@runtime_checkable
class StudentView(Protocol):
    """Makes the teacher's input, and what methods need, from layers of the student that have just run.

    A detector resizes and pads its images itself, to a size drawn at random in training: only it knows the pixels that
    its teacher is to see, and where the boxes lie in them.

    Attributes:
        layers: names of the student's layers that are watched.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the student's layers that are watched."""

    def __call__(self, inputs: Any, calls: Mapping[str, Call]) -> Any:
        """Return the teacher's input, from the student's and from the watched layers' calls by name."""

    def context(self, inputs: Any, calls: Mapping[str, Call]) -> dict[str, Any]:
        """Return what methods may need, such as "boxes", by name."""
