"""The loop, once: plan, steps, looks, checkpoints, resume, finish. It knows no method."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .asking import recipe_of, whole_numbers
from .blame import blame
from .budget import Budget
from .checkpoint import Ask, Progress, check_fits, check_same, load_checkpoint, ours, save_checkpoint
from .compiling import EAGER_FLOPS, check_device, choose_compile, choose_precision, count_flops, keep_memory
from .data import Data, load_data
from .errors import PotstillError, Stopped
from .estimate import words
from .evaluation import evaluate as evaluate_sets
from .exchange import DistilledSet, describe_set, load
from .faults import memory_said
from .functional import Key
from .judge import BASELINES
from .launch import restarts
from .measure import Clock, cost, reset_peak
from .networks import network as build_network
from .outcome import record_of, write
from .outputs import contents, opened
from .parallel import ALONE, Group, choose
from .recipe import Recipe
from .still import Settings, Still, start_of
from .synthetic import Synthetic, counts_per_group, share
from .teacher import School
from .transforms import check_transform, matrix_of

SAVE_EVERY = 30.0  # seconds between checkpoints; they change no number
DIVERGED = 1e3  # a loss so many times the largest of the first ten has run away
SNAPSHOTS = 8  # beside the start
AFFORDABLE = 60.0  # seconds: a whole-set reference that takes longer is left to those who ask for it


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        set: The distilled set.
        record: What `record.json` holds.
        out: Its folder.
    """

    set: DistilledSet
    record: dict[str, Any]
    out: Path


def plan(still: Still, minutes: float, spent: float, say: Callable[[str], None]) -> int:
    """The number of steps that fits what is left of a time budget, from timing a copy of the state.

    Args:
        still: The run; compiled already, its first look taken.
        minutes: The whole budget.
        spent: Seconds of it that are gone.
        say: Receives the equal `--steps`.
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
    say(
        f"{each:.3g} s a step: {steps} steps in {minutes:g} minutes (the same as --steps {steps} --preset {still.settings.recipe.preset})"
    )
    return steps


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
        KeyboardInterrupt: As the user asked; the state is on disk.
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
                with memory_said(f"step {step + 1}; the last good set, of step {step}, is kept in {out}"):
                    after, loss = still.step(now, step)
                first = progress.losses[: min(step, 10)]
                ran_away = len(first) == 10 and loss > DIVERGED * float(first.abs().max())
                if not math.isfinite(loss) or ran_away or not all(v.isfinite().all() for v in after.learned.values()):
                    what = "has run away to" if ran_away else "is"
                    part = still.settings.recipe.learn[0]
                    lower = 0.1 * still.settings.recipe.optimiser[part].lr
                    raise Stopped(
                        f"step {step + 1}: the loss {what} {loss:g}{blame(still, now, step)}; the last good set, of step {step}, is kept in {out}; "
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
            replace(recipe, steps=pinned["recipe"]["steps"]),
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
        say(f"compile {'on' if on else 'off'} ({why}), precision {precision}")
    if on:
        still = Still(data, replace(settings, compile=True), start, group)
        with clock.phase("compile"):
            still.step(still.fresh(), 0)
    looks: list[dict[str, Any]] = []
    if ask.minutes is not None:
        with clock.phase("looks"):
            first = still.look(still.fresh()) if group.leads else None
        looks = [{"step": 0, **first}] if first else []
        spent = (
            clock.seconds["start"]
            + clock.seconds.get("memory", 0.0)
            + clock.seconds.get("compile", 0.0)
            + clock.seconds["looks"] * (1 + recipe.looks)
        )
        with clock.phase("planning"):
            steps = plan(still, ask.minutes, spent, say)
        still = still.with_steps(steps)
    losses = torch.full((still.settings.steps,), math.nan, dtype=torch.float64)
    return still, Progress((0, still.fresh()), losses, looks)


def coreset(school: School, recipe: Recipe, counts: list[int], start: Synthetic) -> DistilledSet:
    """The set of a recipe without steps: its start, with labels by a teacher where the recipe asks for them."""
    inputs, labels = start.take(torch.arange(len(start)))
    meta = describe_set(school.data, recipe, counts, school.seed, 0)
    if recipe.labels == "soft":
        key = Key(school.seed).fold("temperature")
        soft = school.teacher(recipe.student).label(school.data, inputs, recipe.student, key)
        school.say(soft.words)
        labels, meta = soft.labels, replace(meta, labels="soft", teacher=soft.describe())
    return DistilledSet(inputs, labels, meta, matrix=matrix_of(school.data.transform))


def check_coreset(out: Path, made: DistilledSet) -> None:
    """Refuse to resume another run as a coreset, which has no checkpoint of its own.

    Raises:
        PotstillError: The folder holds a run of steps, or a set that is not this one.
    """
    file = out / "set.safetensors"
    if (out / "checkpoint.safetensors").exists() or (file.exists() and load(file).meta != made.meta):
        raise PotstillError(
            f"--out {out} holds a run of other settings; give another folder, or --force to start again"
        )


def distill(
    data: Data | str | Path,
    method: str | Recipe = "dm",
    *,
    ipc: int | Sequence[int] | None = None,
    budget: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    preset: str | None = None,
    network: str | None = None,
    init: str | None = None,
    experts: str | Path | None = None,
    transform: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    out: str | Path | None = None,
    data_root: str | Path | None = None,
    device: str = "cpu",
    precision: str = "auto",
    compile: str = "auto",
    memory: str | None = None,
    resume: bool = False,
    force: bool = False,
    evaluate: bool = True,
    repeats: int = 5,
    parallel: str | None = None,
    group: Group = ALONE,
    say: Callable[[str], None] = lambda line: None,
    bar: Callable[[int, str, int], Any] | None = None,
    watch: Watch = lambda step, values: None,
) -> Run:
    """Distil a labelled data set into a few synthetic samples, measure them, and keep everything in one folder.

    Args:
        data: What `load_data` takes, a name or a path, or a `Data`.
        method: A name (`potstill list methods`) or a recipe of your own.
        ipc: Images per class, one number or one for each; 1 if neither this nor `budget` is given.
        budget: Images in total: as equal a number for each class as its size allows, what is left over one each to the
            larger classes.
        steps: Length of the run in steps; without `preset` this means the paper's numbers.
        minutes: Length of the run in minutes, compiling included and evaluation not: the steps that fit are counted
            before the first one.
        preset: `paper` or `small`.
        network: What the set is learned with and asks to be judged with.
        init: `real`, `noise`, `herding`, `k-center`, `k-means` or `k-means-centre`.
        experts: Folder of networks recorded by `potstill experts`, for methods that replay them, or in place of fresh ones.
        transform: `standardise`, `zca` or `none`; that of the data, usually `standardise`, if absent.
        settings: Recipe fields to change, dotted path to value.
        seed: Of everything random.
        holdout: Share of the training data kept apart for looks.
        out: Folder of the run; `runs/DATA-METHOD-ipcN-seedS` if absent.
        data_root: Folder of downloaded data.
        device: Where to compute.
        precision: `auto`, `fp32` or `bf16`.
        compile: `auto`, `on` or `off`.
        memory: What the run may take, such as `2GiB`: steps are split so that they fit, with the same gradient.
        resume: Continue the run in `out`, to the same bits as an uninterrupted one.
        force: Start again in a folder that holds a run.
        evaluate: Judge the set and its baselines at the end.
        repeats: Networks for each number.
        parallel: How the processes of `group` share the run: `batch`, `networks`; the batch where it can be split, if absent.
        group: What `potstill.parallel.joined` gives; one process alone if absent.
        say: Receives lines for the user.
        bar: Makes a progress bar of a length, a title and a start.
        watch: Receives the loss after each step and held-out accuracy at each look, by step and name.

    Returns:
        The set, its record and its folder.

    Raises:
        PotstillError: A mistake in the arguments or the data, before anything is trained.
        Stopped: The run ended early (divergence, full disk); what is good is on disk.

    Example:
        >>> run = distill("digits", "dm", ipc=1, steps=50)  # doctest: +SKIP
        >>> run.record["results"][0]["accuracy_mean"]  # doctest: +SKIP
    """
    if ipc is not None and budget is not None:
        raise PotstillError("--ipc and --budget exclude each other; give one")
    if transform is not None:
        check_transform(transform)
    counts = 1 if ipc is None else whole_numbers(ipc)
    ask = Ask(
        method,
        counts,
        steps,
        minutes,
        preset,
        network,
        init,
        experts,
        settings or {},
        seed,
        holdout,
        device,
        precision,
        compile,
    )
    if not group.leads:
        say, bar, watch = lambda line: None, None, lambda step, values: None
    if restarts():
        resume, force = True, False
    check_device(device)
    keep_memory()
    limit = Budget.of(memory, compile, device, AFFORDABLE if evaluate else None, say) if memory is not None else None
    ask = replace(ask, memory=limit.bytes if limit else None)
    if limit is not None and group.size > 1:
        raise PotstillError(f"--memory {memory} is for one process; torchrun goes without it")
    if repeats < 1:
        raise PotstillError(f"--repeats {repeats} is below 1")
    clock = Clock()
    reset_peak(device)
    with clock.phase("data"):
        whole = data if isinstance(data, Data) else load_data(data, data_root)
        whole = whole.with_transform(transform) if transform is not None else whole
        data = whole.hold_out(holdout)
    if budget is not None:
        counts = share(budget, data.counts)
        ask = replace(ask, ipc=counts)
    recipe = recipe_of(ask, data, lambda line: None)  # every mistake before the folder is touched
    if limit is not None:
        limit.allows(recipe)
    label = (
        f"budget{budget}"
        if budget is not None
        else f"ipc{counts}"
        if isinstance(counts, int)
        else "ipc" + "-".join(map(str, counts))[:40]
    )
    net = build_network(recipe.network, data.shape, data.task.outputs)
    mode, why = choose(parallel, group, recipe.objective, net, len(data.train))
    ask = replace(ask, parallel=mode, ranks=group.size)
    out = Path(out) if out is not None else Path("runs") / f"{data.slug}-{recipe.method}-{label}-seed{seed}"
    each = counts_per_group(counts, data.counts)
    choose_precision(precision, device, net)
    choose_compile(compile, 0.0, device)
    if group.size > 1:
        group.agree({"data": data.fingerprint, "torch": torch.__version__})
        say(f"parallel {mode}, {group.size} processes ({why})")
    with opened(out, resume, force, ours) if group.leads else nullcontext():
        group.share(None)  # nobody looks into the folder before it is as it should be
        return carry_out(
            ask,
            whole,
            data,
            recipe,
            each,
            out,
            resume,
            repeats if evaluate else 0,
            clock,
            say,
            bar,
            watch,
            group,
            limit,
        )


def carry_out(
    ask: Ask, whole: Data, data: Data, recipe: Recipe, each: list[int], out: Path, resume: bool, repeats: int, clock: Clock,
    say: Callable[[str], None], bar: Callable[[int, str, int], Any] | None, watch: Watch, group: Group = ALONE,
    limit: Budget | None = None,
) -> Run:  # fmt: skip
    """`distill` in a folder that is this process's alone, all arguments checked.

    Args:
        ask: What was asked for.
        whole: The data.
        data: With a part held out.
        recipe: The run's, as far as it is known before the steps are planned.
        each: Samples of each group.
        out: The folder.
        resume: Whether it is continued.
        repeats: Networks for each number; 0 to judge nothing.
        clock: With the time so far.
        say: Receives lines for the user.
        bar: Makes a progress bar.
        watch: Receives losses and looks.
        group: The processes that share the run.
        limit: What memory it may take.
    """
    if resume and group.leads and not contents(out, ours):
        say(f"nothing to resume in {out}: the run begins")

    results: list[dict[str, Any]] = []
    still, progress = None, None
    school = School(data, ask.seed, ask.device, ask.compile, ask.precision, say, bar)
    with clock.phase("start"):
        start = Synthetic(**group.share(vars(start_of(school, recipe, each)) if group.leads else None))
    if recipe.objective is None:
        with clock.phase("labels"):
            set_ = coreset(school, recipe, each, start)
        if resume:
            check_coreset(out, set_)
        set_.save(out / "set.safetensors")
    else:
        still, progress = prepare(ask, data, start, out, resume, clock, say, group, limit)
        recipe = still.settings.recipe
        if still.memory:
            ways = {way: words(size) for way, size in still.memory.items()}
            used = ways.pop(str(still.objective.way))
            others = ", ".join(f"{way} about {size}" for way, size in ways.items())
            say(f"unroll: {still.objective.way}, about {used} ({others}; not compiled)")
        line = bar(still.settings.steps, f"{recipe.method} on {data.name}", progress.step) if bar else Quiet()
        try:
            run_steps(still, progress, out, clock, line, watch)
        finally:
            line.close()
        set_ = still.set(progress.at[1].learned, progress.step)
    record = {}
    if group.leads:
        record = record_of(ask, data, recipe, each, set_, progress, still, out, clock)
        write(out, record, set_, progress, still, data)
    if repeats:
        with clock.phase("evaluation"):
            found = evaluate_sets(
                set_,
                whole,  # baselines are drawn from all of the training data, as `potstill evaluate` does
                networks=[recipe.student],
                baselines=BASELINES if limit is None else limit.baselines(data),
                repeats=repeats,
                seed=ask.seed,
                device=ask.device,
                compile=ask.compile,
                precision=ask.precision,
                affordable=AFFORDABLE,
                group=group,
                say=say,
                bar=bar,
                rows=still.settings.rows if still else 0,
            )
        results = [asdict(r) for r in found]
        if group.leads:
            record = {**record, "results": results, "cost": cost(clock, record["cost"]["seconds_per_step"], ask.device)}
            write(out, record, set_, progress, still, data)
    if limit is not None:
        record = {**record, "memory": limit.describe()}
        write(out, record, set_, progress, still, data)
    return Run(set_, group.share(record), out)
