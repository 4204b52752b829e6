"""What is done about images that cannot be used."""

from typing import Literal, get_args

OnBadImage = Literal["error", "skip"]


def check_on_bad_image(value: str) -> None:
    """Raise ValueError if a value is no `OnBadImage`."""
    if value not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image={value!r}: give 'error' or 'skip'.")
