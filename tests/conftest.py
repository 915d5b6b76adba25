"""What all tests share."""

import os

# The tests' networks are tiny: one thread is quicker than two that wait for each other, subprocesses included.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping

# Shapes in signatures are checked here, and only here. Compiled tests run in processes of their own, without.
SHAPED = [
    "potstill.coresets",
    "potstill.infinite",
    "potstill.kernels",
    "potstill.networks",
    "potstill.objectives",
    "potstill.synthetic",
]
jaxtyping.install_import_hook(SHAPED, "typechecking.check")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
