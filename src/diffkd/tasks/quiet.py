"""A trainer that speaks only when something is wrong."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_KNOWN = (
    # The order of the data follows from epoch and batch alone: resumable, though not in the way that is looked for.
    ".*your dataloader is not resumable",
    # Between the trainer's own libraries; nothing a user could do about it.
    ".*LeafSpec.* is deprecated",
    # Batches are made on the device, or by as many workers as the user asked for.
    ".*does not have many workers",
)


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Silence advertisements, device listings and warnings that are known to be unfounded; put all back at the end."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _KNOWN:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
