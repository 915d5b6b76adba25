"""Logs of a run for other programs. The loop calls them by step and name and knows none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import PotstillError
from .loop import Watch


@contextmanager
def tensorboard(folder: Path | None) -> Iterator[Watch]:
    """A log that TensorBoard reads: what it is called with becomes a curve for each name.

    Args:
        folder: Where its files go, in addition to what is there; nothing is logged if absent.

    Raises:
        PotstillError: TensorBoard is not installed, or the folder cannot be written to.
    """
    if folder is None:
        yield lambda step, values: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PotstillError(f"--tensorboard needs it ({error}); pip install 'potstill[tensorboard]'") from error
    try:
        writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call,unused-ignore]
    except OSError as error:
        raise PotstillError(f"--tensorboard {folder} cannot be written ({error.strerror})") from error

    def watch(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call,unused-ignore]

    try:
        yield watch
    finally:
        writer.close()  # type: ignore[no-untyped-call,unused-ignore]
