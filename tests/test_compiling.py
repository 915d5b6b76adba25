"""Whether to compile: by what the run would earn, by what is asked for, and by whether there is a compiler."""

from __future__ import annotations

import pytest

from potstill import compiling
from potstill.compiling import WORTH, choose_compile
from potstill.errors import PotstillError


@pytest.mark.parametrize(
    ("asked", "seconds", "compiler", "device", "on", "why"),
    [
        ("auto", 0.5 * WORTH, True, "cpu", False, "would not earn compiling back"),
        ("auto", 2 * WORTH, True, "cpu", True, "long enough"),
        ("auto", 2 * WORTH, False, "cpu", False, "no C++ compiler"),
        ("auto", 2 * WORTH, False, "cuda", True, "long enough"),
        ("on", 0.0, True, "cpu", True, "asked for"),
        ("off", 2 * WORTH, True, "cpu", False, "asked for"),
    ],
)
def test_a_run_is_compiled_where_it_earns_it_back_and_can_be(monkeypatch, asked, seconds, compiler, device, on, why):
    monkeypatch.setattr(compiling, "has_compiler", lambda: compiler)
    chosen, words = choose_compile(asked, seconds, device)
    assert chosen is on and why in words


def test_what_cannot_be_compiled_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PotstillError, match="--compile on needs a C.. compiler .* --compile off does without"):
        choose_compile("on", 0.0, "cpu")
    with pytest.raises(PotstillError, match="no choice for --compile 'onn'; did you mean 'on'"):
        choose_compile("onn", 0.0, "cpu")
    assert choose_compile("auto", 2 * WORTH, "cpu") == (False, "no C++ compiler on the PATH")
