"""`distill`: what is asked for is checked, the loop is run in a folder of its own, and what it made is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .asking import recipe_of, whole_numbers
from .budget import Budget
from .checkpoint import Ask, ours
from .compiling import check_device, choose_compile, choose_precision, keep_memory
from .data import Data, load_data
from .errors import PotstillError
from .estimate import words
from .evaluation import evaluate as evaluate_sets
from .exchange import DistilledSet, Meta, describe_set, load
from .functional import Key
from .judge import BASELINES
from .launch import restarts
from .loop import Quiet, Watch, prepare, run_steps
from .measure import Clock, cost, reset_peak
from .networks import network as build_network
from .outcome import record_of, write
from .outputs import contents, opened
from .parallel import ALONE, Group, choose
from .recipe import Recipe, from_dict, to_dict
from .still import start_of
from .synthetic import Synthetic, counts_per_group, share
from .teacher import School
from .transforms import check_transform, matrix_of

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

    def whole(meta: Meta) -> Meta:
        """With the fields that a recipe of an older version had not."""
        try:
            return replace(meta, recipe=to_dict(from_dict(meta.recipe)))
        except PotstillError:  # parts from outside
            return meta

    if (out / "checkpoint.safetensors").exists() or (file.exists() and whole(load(file).meta) != whole(made.meta)):
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
