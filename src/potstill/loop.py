"""The loop, once: plan, steps, looks, checkpoints, resume. It knows no method."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .asking import recipe_of
from .blame import blame
from .budget import Budget
from .checkpoint import Ask, Progress, check_fits, check_same, load_checkpoint, save_checkpoint
from .compiling import EAGER_FLOPS, choose_compile, choose_precision, count_flops
from .data import Data
from .errors import Stopped
from .faults import memory_said
from .measure import Clock
from .networks import network as build_network
from .parallel import ALONE, Group
from .still import Settings, Still
from .synthetic import Synthetic, counts_per_group

SAVE_EVERY = 30.0  # seconds between checkpoints; they change no number
DIVERGED = 1e3  # a loss so many times the largest of the first ten has run away
SNAPSHOTS = 8  # beside the start


def plan(still: Still, minutes: float, spent: float, say: Callable[[str], None], more: str = "") -> int:
    """The number of steps that fits what is left of a time budget, from timing a copy of the state.

    Args:
        still: The run; compiled already, its first look taken.
        minutes: The whole budget.
        spent: Seconds of it that are gone.
        say: Receives the equal `--steps`.
        more: Options that are equal to it, too.
    """
    now, took, group = still.fresh(), [], still.sharing.group
    for i in range(5):
        begin = time.perf_counter()
        now, _ = still.step(now, i)
        took.append(group.first(time.perf_counter() - begin))
        if sum(took) > 0.1 * 60 * minutes and i:
            break
    each = statistics.median(took)
    steps = max(1, int((60 * minutes - group.first(spent) - sum(took)) / each))
    same = f"--steps {steps} --preset {still.settings.recipe.preset}{more}"
    say(f"{each:.3g} s a step: {steps} steps in {minutes:g} minutes (the same as {same})")
    return steps


def looks_within(wanted: int, each: float, minutes: float) -> int:
    """Looks after the first one that a time budget bears: with it they take at most a third, so that most is for steps.

    Args:
        wanted: By the recipe.
        each: Seconds of the first one.
        minutes: The whole budget.

    Example:
        >>> looks_within(4, 2.0, 3), looks_within(4, 97.0, 10), looks_within(4, 97.0, 5)
        (4, 1, 0)
    """
    return wanted if each <= 0 else min(wanted, max(0, int(60 * minutes / 3 / each) - 1))


def points(steps: int, count: int) -> set[int]:
    """Steps at which something is looked at: the start, the end and evenly between, `count` beside the start."""
    return {0, *(round(steps * (i + 1) / count) for i in range(count))} if count else set()


Watch = Callable[[int, Mapping[str, float]], None]  # receives steps made so far and what is known of them


def run_steps(
    still: Still, progress: Progress, out: Path, clock: Clock, bar: Any, watch: Watch = lambda step, values: None
) -> None:
    """Steps until the last, with looks, snapshots and checkpoints.

    Raises:
        Stopped: The loss or S is no longer finite, or has run away; the last good state is on disk.
        KeyboardInterrupt: As the user asked; the state is on disk, where ranks have networks of their own that of the last
            checkpoint.
        NoMemory: A step found none; the same holds.
        Unwritable: A checkpoint could not be written; the one before is good.
    """
    total, sharing = still.settings.steps, still.sharing
    look_at, show_at = points(total, still.settings.recipe.looks), points(total, SNAPSHOTS)

    def observe() -> None:
        step, now = progress.at
        if not sharing.group.leads:
            return
        if step in look_at and not any(look["step"] == step for look in progress.looks):
            with clock.phase("looks"):
                if (look := still.look(now)) is not None:
                    progress.looks.append({"step": step, **look})
                    watch(step, {"heldout_accuracy": look["accuracy"]})
        if step in show_at and step not in progress.snapshots:
            shown = still.synthetic(now.learned).take(still.shown.to(still.device))[0]
            progress.snapshots[step] = still.data.display(shown.detach().cpu())

    def save() -> float:
        with clock.phase("checkpoints"):
            others = sharing.others((progress.at[1].own, progress.at[1].pool))
            if sharing.group.leads:
                save_checkpoint(out, still, progress, clock, others)
        return time.monotonic()

    try:
        observe()
        saved = save()
        with clock.phase("loop"):
            while progress.step < total:
                step, now = progress.at
                kept = f"the last good set, of step {step}," if sharing.mode != "networks" else "the last checkpoint"
                with memory_said(f"step {step + 1}; {kept} is kept in {out}"):
                    after, loss = still.step(now, step)
                first = progress.losses[: min(step, 10)]
                ran_away = len(first) == 10 and loss > DIVERGED * float(first.abs().max())
                if not math.isfinite(loss) or ran_away or not all(v.isfinite().all() for v in after.learned.values()):
                    what = "has run away to" if ran_away else "is"
                    part = still.settings.recipe.learn[0]
                    lower = 0.1 * still.settings.recipe.optimiser[part].lr
                    # each rank sees its own part of the step only
                    where = next(filter(None, sharing.group.gather(blame(still, now, step))), "")
                    raise Stopped(
                        f"step {step + 1}: the loss {what} {loss:g}{where}; the last good set, of step {step}, is kept in {out}; "
                        f"a lower learning rate usually helps, such as --set optimiser.{part}.lr={lower:g}"
                    )
                progress.losses[step] = loss
                progress.at = (step + 1, after)
                watch(step + 1, {"loss": loss})
                bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                bar.update()
                observe()
                if progress.step in look_at or sharing.group.first(time.monotonic() - saved) > SAVE_EVERY:
                    saved = save()
    except BaseException as error:
        if sharing.saves(error):
            save()
        raise
    save()


class Quiet:
    """A progress bar that shows nothing."""

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    def close(self) -> None: ...


def prepare(
    ask: Ask, data: Data, start: Synthetic, out: Path, resume: bool, clock: Clock, say: Callable[[str], None],
    group: Group = ALONE, budget: Budget | None = None,
) -> tuple[Still, Progress]:  # fmt: skip
    """The run bound to its data and the point from which it goes on, its number of steps fixed."""
    recipe = recipe_of(ask, data, say)
    counts = counts_per_group(ask.ipc if isinstance(ask.ipc, int) else list(ask.ipc), data.counts)
    net = build_network(recipe.network, data.shape, data.task.outputs)
    precision = str(group.share(choose_precision(ask.precision, ask.device, net)))
    found = load_checkpoint(out, say) if resume and group.leads else None
    group.share(None)  # the first one puts the one before in the place of a damaged one
    found = load_checkpoint(out, say, group.rank) if resume and not group.leads else found
    group.agree({"checkpoint": None if found is None else found[1].step})  # before the first one writes another
    if found is not None:
        pinned, progress = found
        check_same(pinned, ask, recipe, counts, data, say)
        torch.set_num_threads(pinned["threads"])
        clock.seconds.update(pinned["seconds"])
        steps, precision, on = pinned["steps"], pinned["precision"], pinned["compile"]
        settings = Settings(
            replace(recipe, steps=pinned["recipe"]["steps"], looks=pinned["recipe"].get("looks", recipe.looks)),
            counts,
            ask.seed,
            ask.holdout,
            steps,
            ask.device,
            on,
            precision,
            pinned["threads"],
            pinned.get("rows", 0),
            parallel=ask.parallel,
            ranks=ask.ranks,
        )
        if budget is not None:
            budget.check(data, settings, start, clock)
        still = Still(data, settings, start, group)
        check_fits(progress, still, out)
        say(f"resumed at step {progress.step} of {steps}")
        if on and progress.step < steps:
            with clock.phase("compile"):
                still.step(progress.at[1], progress.step)
        return still, progress
    settings = Settings(
        recipe, counts, ask.seed, ask.holdout, recipe.steps, ask.device, False, precision, torch.get_num_threads(),
        parallel=ask.parallel, ranks=ask.ranks,
    )  # fmt: skip
    if budget is not None:
        settings = budget.choose(data, settings, start, clock)
    still = Still(data, settings, start, group)
    seconds = 60 * (ask.minutes or 0)
    if ask.minutes is None and ask.compile == "auto" and budget is None:
        seconds = count_flops(lambda: still.step(still.fresh(), 0)) * recipe.steps / EAGER_FLOPS
    on, why = group.share(
        (False, "--memory") if budget is not None else choose_compile(ask.compile, seconds, ask.device)
    )
    if not still.objective.needs.network:
        say("compile off, precision fp64 (a kernel in closed form)")
        on = False
    else:
        precision = str(
            group.share(choose_precision(ask.precision, ask.device, net, on and still.objective.narrow_bf16))
        )
        say(f"compile {'on' if on else 'off'} ({why}), precision {precision}")
    if on:
        still = Still(data, replace(settings, compile=True, precision=precision), start, group)
        with clock.phase("compile"):
            still.step(still.fresh(), 0)
    looks: list[dict[str, Any]] = []
    if ask.minutes is not None:
        with clock.phase("looks"):
            first = still.look(still.fresh()) if group.leads else None
        looks, look = [{"step": 0, **first}] if first else [], clock.seconds["looks"]
        count = int(group.share(looks_within(recipe.looks, look, ask.minutes)))
        if fewer := count < recipe.looks:
            say(f"a look at held-out accuracy takes {look:.3g} s: {count} of {recipe.looks} after this one, so that most of the time is for steps")  # fmt: skip
        spent = (
            clock.seconds["start"]
            + clock.seconds.get("memory", 0.0)
            + clock.seconds.get("compile", 0.0)
            + look * (1 + count)
        )
        with clock.phase("planning"):
            steps = plan(still, ask.minutes, spent, say, f" --set looks={count}" * fewer)
        still = still.with_steps(steps, count)
    losses = torch.full((still.settings.steps,), math.nan, dtype=torch.float64)
    return still, Progress((0, still.fresh()), losses, looks)
