"""The command line: it reads arguments, calls the library and prints. No method stands in it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tomllib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import COMMANDS, parser
from .errors import PotstillError, Stopped, Terminated, one_line, unknown
from .faults import no_memory, on_terminate, out_of_memory
from .launch import launched, speaks

SHARED = ("distill", "evaluate", "experts")  # by the processes of torchrun


def say(line: str) -> None:
    """A line for the user, at once also where the output is a file; names from files come without control characters."""
    print(one_line(line, 10_000), flush=True)


def counts_of(text: str) -> int | list[int]:
    """`--ipc`: one number, or several with commas between."""
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise PotstillError(f"--ipc '{text}' is not a whole number, nor several with commas between") from None
    return numbers[0] if len(numbers) == 1 else numbers


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`--set path=value` with TOML values; a bare word is a string."""
    settings = {}
    for pair in pairs:
        path, equals, value = pair.partition("=")
        if not equals or not path:
            raise PotstillError(f"--set '{pair}' is not of the form path=value")
        try:
            settings[path] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[path] = value
    return settings


def _distill(args: argparse.Namespace) -> None:
    from .asking import check_named
    from .distilling import distill
    from .recipe import Recipe, read
    from .watch import tensorboard

    method: str | Recipe = read(args.recipe) if args.recipe else args.method
    if isinstance(method, Recipe) and args.network is None:
        for name in (method.network, method.student):
            check_named(name, str(args.recipe))
    names = ("steps", "minutes", "preset", "network", "init", "transform", "budget", "experts", "seed", "holdout", "out", "data_root", "device", "precision",
             "compile", "memory", "resume", "force", "repeats", "parallel", "group")  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    with tensorboard(args.tensorboard if args.group.leads else None) as watch:
        run = distill(args.data, method, ipc=counts_of(args.ipc) if args.ipc is not None else None,
                      settings=settings_of(args.set), **options,
                      evaluate=not args.no_evaluate, say=say, bar=progress_bar, watch=watch)  # fmt: skip
    if not args.group.leads:
        return
    if run.record["results"]:
        print()
        print(table(run.record["results"]))
    print()
    for name, what in (("set.safetensors", "the set"), ("grid.png", "picture"), ("report.html", "report")):
        print(f"{what + ':':10}{run.out / name}")


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import evaluate
    from .records import write_json

    check_file(args.json)
    results = evaluate(
        args.sets, args.data, networks=listed(args.networks), protocol=args.protocol,
        normalisation=args.normalisation, baselines=listed(args.baselines), repeats=args.repeats, seed=args.seed, data_root=args.data_root, device=args.device, compile=args.compile,
        precision=args.precision, group=args.group, say=say, bar=progress_bar,
    )  # fmt: skip
    if not args.group.leads:
        return
    rows = [asdict(r) for r in results]
    print(table(rows), flush=True)
    if args.json:
        write_json(args.json, rows)


def _experts(args: argparse.Namespace) -> None:
    from .experts import record

    options = {k: v for k, v in vars(args).items() if k not in ("command", "data")}
    made = record(args.data, **options, say=say, bar=progress_bar)
    if args.group.leads:
        print(f"{made.count} experts of {made.epochs} epochs: {made.folder}")


def _benchmark(args: argparse.Namespace) -> None:
    from .bench import Bench
    from .benchmark import Benchmark, planned
    from .cluster import on_ray
    from .places import shipped
    from .rows import suites

    exchange = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in args.data)
    if wrong := [name for name, other in exchange.items() if not name or not other]:
        raise PotstillError(f"--data {wrong[0]}: NAME=OTHER is needed, such as cifar10=hf:cifar10-jpeg75")
    home = shipped("benchmarks")
    found = suites(args.name, [home / "rows"] if home else [], listed(args.code))
    if students := listed(args.networks):
        found = [suite.judged_with(students) for suite in found]
    bench = Bench(
        args.out or Path("results") / Path(args.name).stem, exchange, not args.no_zoo, args.data_root, args.device,
        args.compile, args.precision, say, progress_bar,
    )  # fmt: skip
    work = Benchmark(found, bench)
    cells = work.plan(args.only, args.minutes)
    if not cells:
        there = f"; 'transfer/{args.only}' would" if work.plan(f"transfer/{args.only}") else ""
        raise PotstillError(f"--only {args.only!r} keeps no cell of {args.name}{there}")
    print(planned(cells), flush=True)
    if not args.plan:
        with on_ray(work, args.on) if args.on else nullcontext() as through:
            fates = work.run(cells, through)
        print(", ".join(f"{count} {fate}" for fate, count in fates.items()) + f": {bench.out}")
        if home is not None and (file := home / "findings.toml").is_file():
            work.judge_findings(file)


def _export(args: argparse.Namespace) -> None:
    from .export import export_set

    print(export_set(args.set, args.to, args.out))


def _report(args: argparse.Namespace) -> None:
    from .publish import publish

    print(publish(args.folders, args.out))


def _speed(args: argparse.Namespace) -> None:
    from .records import write_json
    from .speed import lines, speed

    check_file(args.json)
    found = speed(
        args.data, listed(args.methods), ipc=args.ipc, preset=args.preset, network=args.network, settings=settings_of(args.set),
        repeats=args.repeats, data_root=args.data_root, device=args.device, precision=args.precision, compile=args.compile,
        say=say,
    )  # fmt: skip
    print(columns(lines(found)))
    for precision, rate in found["matrix_product"].items():
        print(f"matrix product, {precision}: {rate / 1e9:.0f} GFLOP/s")
    if args.json:
        write_json(args.json, found)


def check_file(file: Path | None) -> None:
    """Refuse a file for results that cannot be written, before they are measured."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise PotstillError(f"--json {file} cannot be written; a file in a folder that is there is needed")


def listed(text: str) -> list[str]:
    """Words with commas between."""
    return [w.strip() for w in text.split(",") if w.strip()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Results for people: percent, mean and standard deviation."""
    lines = [("set", "images", "network", "protocol", "accuracy", "networks")]
    for r in rows:
        score = f"{100 * r['accuracy_mean']:.1f} %" + (f" ± {100 * r['accuracy_std']:.1f}" if r["repeats"] > 1 else "")
        lines.append((r["set"], str(r["images"]), r["network"], r["protocol"], score, str(r["repeats"])))
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Words in columns, two blanks between."""
    lines = [[one_line(cell, 300) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def progress_bar(total: int, title: str, start: int) -> Any:
    """A bar with step, loss, rate and time left on standard error."""
    from tqdm import tqdm

    every = 0.2 if sys.stderr.isatty() else 15.0  # seconds: a log file gets a line now and then
    return tqdm(
        total=total,
        desc=one_line(title, 100),
        initial=start,
        unit="step",
        dynamic_ncols=True,
        mininterval=every,
        smoothing=0.1,
    )


def _list(args: argparse.Namespace) -> None:
    from .loaders import FORMS, LOADERS
    from .methods import METHODS
    from .networks import NETWORKS
    from .training import PROTOCOLS

    tables: dict[str, dict[str, Any]] = {"methods": METHODS, "datasets": LOADERS, "networks": NETWORKS}
    if args.what == "protocols":
        for p in PROTOCOLS.values():
            print(f"{p.name:15} {p.words}, hash {p.hash}")
    elif args.what == "zoo":
        from .zoo import cells, rows

        print(columns(rows(cells())))
    elif args.what in tables:
        for name, made in tables[args.what].items():
            print(f"{name:15} {(made.__doc__ or '').strip().splitlines()[0]}")
        for form, text in FORMS.items() if args.what == "datasets" else ():
            print(f"{form:15} {text}")
    else:
        raise unknown("list of", args.what, [*tables, "protocols", "zoo"])


def _show(args: argparse.Namespace) -> None:
    from .recipe import find, write

    print(write(find(args.method, args.preset)), end="")


def _cite(args: argparse.Namespace) -> None:
    from .methods import cite

    print(cite(args.method))


def processes(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """The group of processes that run a command."""
    if launched() and args.command not in SHARED:
        raise PotstillError(f"torchrun serves {', '.join(SHARED)}; run `potstill {args.command}` without it")
    if args.command not in SHARED:
        return nullcontext()
    from .parallel import joined

    return joined(args.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, 2 for a user's mistake, 1 for a run that stopped, 130 for Ctrl-C, 143 for SIGTERM."""
    args = argparse.Namespace(command="", group=None)
    back = on_terminate()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of a GPU's tools on a CPU's machine
    try:
        args = parser().parse_args(arguments, args)
        commands = (_distill, _evaluate, _experts, _benchmark, _export, _report, _speed, _list, _show, _cite)
        with processes(args) as args.group:
            dict(zip(COMMANDS, commands, strict=True))[args.command](args)
        sys.stdout.flush()
        return 0
    except PotstillError as error:
        if args.group is not None or speaks():
            print(f"potstill: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"potstill: {error}", file=sys.stderr)
        return 1
    except Terminated:
        print(f"\npotstill: terminated{goes_on(args.command)}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"\npotstill: interrupted{goes_on(args.command)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `potstill list methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            print(f"potstill: {no_memory(error)}{goes_on(args.command)}", file=sys.stderr)
            return 1
        if not isinstance(error, OSError):
            raise
        try:
            sys.stdout.flush()
        except OSError:  # a full disk below `> log`: nothing more goes there, not at the end of the process either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where = f" ({error.filename})" if error.filename else ""
        print(f"potstill: {error.strerror or error}{where}{goes_on(args.command)}", file=sys.stderr)
        return 2
    finally:
        back()


def goes_on(command: str) -> str:
    """How an interrupted command is gone on with."""
    words = {
        "distill": "the same command with --resume",
        "experts": "the same command with --resume",
        "benchmark": "the same command",
    }
    return f"; {words[command]} goes on from here" if command in words else ""
