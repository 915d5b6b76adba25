"""What torchrun tells a process that it starts, by the environment."""

from __future__ import annotations

import os

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in NAMES)


def speaks() -> bool:
    """Whether this process is alone or the first of several: what is wrong with a command line is wrong for all of them."""
    return not launched() or os.environ["RANK"] == "0"


def restarts() -> int:
    """How often torchrun has started the processes again after a fault; then their run is to go on."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0
