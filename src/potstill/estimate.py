"""The memory that a function's tensors will take, found without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .functional import Tree, leaves, tree_map

BY_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class Unpredictable(Exception):
    """Memory that depends on numbers and not on shapes alone."""


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most that were at once, while this is entered.

    Every storage counts once, from the operation that makes it until nothing refers to it; views and changes in place add
    nothing. What an operation takes and gives back inside itself is not seen.

    Args:
        given: Tensors that are there anyway and do not count.
    """

    def __init__(self, given: Tree = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in leaves(given):
            if isinstance(tensor, Tensor):
                self._see(tensor, counts=False)

    def _see(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        mark, size = storage._cdata, storage.nbytes() if counts else 0
        if mark in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[mark]
            self.now -= size

        self._known[mark] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out


def live_peak(function: Callable[..., Any], *args: Tree) -> int:
    """The most bytes of tensors alive at once while a function runs, measured by running it.

    Args:
        function: Called with `args`.
        args: Trees of tensors, which do not count themselves.

    Example:
        >>> import torch
        >>> live_peak(lambda x: (x + 1).sum(), torch.zeros(1000))
        4004
    """
    with Live(args) as live:
        function(*args)
    return live.peak


def peak_of(function: Callable[..., Any], *args: Tree) -> int:
    """The same, estimated: the function runs in eager mode on tensors that have a shape and no numbers.

    What a library takes for itself during an operation (packed weights, unfolded patches) and what the allocator cannot use
    again come on top; a compiled function fuses operations and takes other memory, usually less.

    Raises:
        Unpredictable: What the function does depends on numbers, not on shapes alone.

    Example:
        >>> import torch
        >>> peak_of(lambda x: (x + 1).sum(), torch.zeros(1).expand(10**12))
        4000000000004
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        args = tree_map(lambda t: fake.from_tensor(t) if isinstance(t, Tensor) else t, args)
        try:
            return live_peak(function, *args)
        except BY_NUMBERS as error:
            raise Unpredictable(str(error)) from error


def words(size: int) -> str:
    """A number of bytes for people.

    Example:
        >>> words(5 << 20), words(3 << 30)
        ('5 MiB', '3.0 GiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(size / 2**20, 1):.0f} MiB"
