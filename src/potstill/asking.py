"""What the user asked for, as a recipe: every mistake is found here, before anything is trained or written."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import Ask
from .data import Data
from .errors import PotstillError
from .judge import fitting, protocol_of
from .networks import network as build_network
from .recipe import Recipe, change, find
from .replay import Experts
from .students import check_asked, is_kernel
from .trajectories import open_experts


def check_named(network: str, who: str) -> None:
    """Refuse code from outside that a file and not the user asks for.

    Args:
        network: As the file has it.
        who: The file, for the message.

    Raises:
        PotstillError: The name is that of a function.
    """
    if ":" in network:
        raise PotstillError(
            f"{who} asks for the network '{network}', which is code from outside and is not run because a file says so; "
            f"if you trust it: --network {network}"
        )


def recipe_of(ask: Ask, data: Data, say: Callable[[str], None]) -> Recipe:
    """The recipe that is run: method and preset, then what the user changes.

    Raises:
        PotstillError: A name, field or combination that does not exist.
    """
    if ask.steps is not None and ask.minutes is not None:
        raise PotstillError("--steps and --minutes exclude each other; give one")
    if ask.steps is not None and ask.steps < 0:
        raise PotstillError(f"--steps {ask.steps} is below 0")
    if ask.minutes is not None and not (math.isfinite(ask.minutes) and ask.minutes > 0):
        raise PotstillError(f"--minutes {ask.minutes:g} is not a time; a number above 0 is needed")
    if isinstance(ask.method, Recipe):
        recipe = ask.method
    else:
        preset = (
            ask.preset
            if ask.preset is not None
            else ("paper" if ask.steps is not None or ask.device != "cpu" else "small")
        )
        recipe = find(ask.method, preset, ask.ipc if isinstance(ask.ipc, int) else max(ask.ipc))
        if not ask.preset and recipe.objective is not None:
            why = (
                "--steps asks for the paper's numbers"
                if preset == "paper"
                else "a CPU's; --preset paper for the paper's"
            )
            say(f"preset {preset} ({why})")
    settings = dict(ask.settings)
    recorded = with_experts(recipe, ask.experts)
    if recorded is not recipe and isinstance(recorded.source, Experts):
        recipe = recorded
        if ask.network is None and "network" not in settings:
            own = recorded.source.trajectories.meta["network"]
            check_named(own, f"the experts in {recorded.source.folder}")
            say(f"network {own}: that of the experts")
            settings = {"network": own, "student": own, **settings}
    if ask.network is not None:
        settings = {"network": ask.network, "student": ask.network, **settings}
    elif len(data.shape) != 3 and recipe.network.startswith(("convnet", "widenet")):
        say("network mlp: the inputs are vectors")
        settings = {"network": "mlp", **({} if is_kernel(recipe.student) else {"student": "mlp"}), **settings}
    if ask.init and recipe.objective is None and ask.init != recipe.init:
        raise PotstillError(f"--init {ask.init}: method '{recipe.method}' is its start; take --method for another one")
    if ask.init is not None:
        settings["init"] = ask.init
    if ask.steps is not None:
        settings["steps"] = ask.steps
    recipe = change(recipe, settings) if settings else recipe
    if isinstance(recipe.source, Experts):
        recipe = replace(recipe, source=replace(recipe.source, folder=str(ask.experts or "")))
    if recipe.source is not None:
        recipe.source.check(build_network(recipe.network, data.shape, data.task.outputs), data)
    check_asked(recipe, protocol_of(recipe.protocol))
    for name in dict.fromkeys(n for n in (recipe.network, recipe.student) if not is_kernel(n)):
        for note in build_network(name, data.shape, data.task.outputs).notes:
            say(note)
    fitted = fitting(recipe.augment, data.mirror, data.shape)
    if fitted != recipe.augment:
        left = [op for op in recipe.augment.ops if op not in fitted.ops]
        why = "a mirrored input may be of another class" if len(data.shape) == 3 else "the inputs are no images"
        say(f"augmentation without {', '.join(left)}: {why}")
        recipe = replace(recipe, augment=fitted)
    return recipe


def with_experts(recipe: Recipe, folder: str | Path | None) -> Recipe:
    """The recipe with recorded networks, where a folder of them is given, in place of those of its source.

    A recipe that replays experts keeps its stretches of their trajectories; any other takes a network of any epoch.
    """
    if folder is None:
        return recipe
    source = recipe.source
    if source is None:
        raise PotstillError(f"--experts: method '{recipe.method}' needs no network")
    if not isinstance(source, Experts):
        if recipe.objective is not None and not recipe.objective.needs.network:
            raise PotstillError(f"--experts: method '{recipe.method}' needs no network")
        source = Experts(max_start=open_experts(folder).epochs + 1)
    return replace(recipe, source=replace(source, folder=str(folder)))


def whole_numbers(ipc: Any) -> int | list[int]:
    """Images per class as plain numbers: one, or one for each class.

    Raises:
        PotstillError: Something else, such as a float.
    """
    try:
        if isinstance(ipc, bool):
            raise TypeError
        return (
            operator.index(ipc)
            if hasattr(ipc, "__index__") and not getattr(ipc, "ndim", 0)
            else [operator.index(n) for n in ipc]
        )
    except TypeError:
        raise PotstillError(f"ipc {ipc!r} is not a whole number, nor several of them") from None
