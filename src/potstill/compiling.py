"""When to compile a step and in which precision to compute it: rules that look at sizes, never at a clock."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .errors import PotstillError, unknown
from .functional import Key
from .networks import Network

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
EAGER_FLOPS = 40e9  # a CPU's floating-point operations per second in eager mode; only the choice to compile rests on it
# Operations of one sample's forward pass
LARGE = 2e7  # above, bf16 gains in training, and networks are trained one by one
FUSED = 4.8e6  # above, bf16 gains in a compiled step of S, where casts are part of the loops: the smallest that was measured
WORTH = 90.0  # seconds of eager work above which compiling, 20 to 60 s for a graph, is earned back


def keep_memory() -> None:
    """Let the C library reuse freed memory rather than give it back to the system and fetch it again.

    A step frees and takes the same hundreds of megabytes again and again; with glibc's defaults every such block is
    mapped anew and its pages cleared (measured: 1.7 times the time of a forward pass). No effect on other systems.
    """
    _tune(1 << 30, (1 << 31) - 1)


def return_memory() -> None:
    """Let the C library give freed memory back at once: the process then holds little more than its tensors.

    Each block of 4 MiB or more has pages of its own, so little is lost between blocks and what a process takes can be told
    beforehand. The price is that pages are cleared again and again: see `keep_memory`.
    """
    _tune(1 << 22, 1 << 26)


def _tune(mapped: int, trim: int) -> None:
    """Set glibc's thresholds, in bytes: blocks that have pages of their own, and free memory that is given back."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, mapped)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def count_flops(function: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions that a call makes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def has_compiler() -> bool:
    """Whether a C++ compiler is there, which `torch.compile` needs on a CPU."""
    return any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def choose_compile(asked: str, seconds: float, device: str) -> tuple[bool, str]:
    """Whether to compile, and why, in a few words for the user.

    Args:
        asked: `auto`, `on` or `off`.
        seconds: What the run would take in eager mode, estimated from counted operations or given as a budget.
        device: Where it runs.

    Raises:
        PotstillError: Another word, or `on` without a C++ compiler.
    """
    if asked not in ("auto", "on", "off"):
        raise unknown("choice for --compile", asked, ("auto", "on", "off"))
    missing = device == "cpu" and not has_compiler()
    if asked == "on":
        if missing:
            raise PotstillError(
                "--compile on needs a C++ compiler (g++ or clang++) on the PATH; --compile off does without"
            )
        return True, "asked for"
    if asked == "off":
        return False, "asked for"
    if seconds < WORTH:
        return False, f"about {seconds:.0f} s of work would not earn compiling back"
    if missing:
        return False, "no C++ compiler on the PATH"
    return True, "the run is long enough to earn it back"


def choose_precision(asked: str, device: str, net: Network, fused: bool = False) -> str:
    """The precision of features and gradients: bfloat16 where the hardware multiplies it and the network is large enough
    to gain (on small ones the casts cost more than they save).

    Args:
        asked: `auto`, `fp32` or `bf16`.
        device: Where it runs.
        net: Whose arithmetic it is.
        fused: Whether it is that of a compiled step of S by an objective that allows it (`Objective.narrow_bf16`), which gains
            from smaller networks on.

    Raises:
        PotstillError: A word that is not `auto`, `fp32` or `bf16`.
    """
    if asked not in ("auto", *PRECISIONS):
        raise unknown("precision", asked, ("auto", *PRECISIONS))
    if asked != "auto":
        return asked
    if device.startswith("cuda"):
        fused = False  # never measured there
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast and sample_flops(net) > (FUSED if fused else LARGE) else "fp32"


def sample_flops(net: Network) -> float:
    """Floating-point operations of one sample's forward pass, whatever its precision adds to them."""
    net, state = net.at(None), net.init(Key(0))
    return count_flops(lambda: net(state, torch.zeros(1, *net.shape), "stored"))


def check_device(device: str) -> str:
    """A device that is there.

    Raises:
        PotstillError: It is not.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PotstillError(f"--device '{device}' is not usable here ({str(error).splitlines()[0][:100]})") from error
    return device


class Graphs:
    """Compiled forms of the pieces of something too large for one graph, each made once under its name.

    Args:
        on: Whether anything is compiled.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self.made: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The form made first under this name: later functions of the same name must be the same function."""
        return self.made.setdefault(name, compiled(function, True)) if self.on else function


def compiled(function: Callable[..., Any], on: bool) -> Callable[..., Any]:
    """The function as one static graph, or as it is."""
    return torch.compile(function, fullgraph=True, dynamic=False) if on else function
