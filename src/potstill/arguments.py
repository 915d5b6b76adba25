"""What the command line takes: every command with its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import __version__
from .errors import PotstillError

COMMANDS = ("distill", "evaluate", "experts", "benchmark", "export", "report", "speed", "list", "show", "cite")


class Parser(argparse.ArgumentParser):
    """Argparse with errors as everything else here has them: one line, nearest names, exit code 2."""

    def error(self, message: str) -> Any:
        raise PotstillError(f"{message}; `{self.prog} --help` shows all")


def parser() -> Parser:
    """All commands and options."""
    top = Parser("potstill", description="Distil a labelled data set into a few synthetic samples.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"potstill {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    d = add("distill", "Distil a data set and measure the result.")
    d.add_argument(
        "data",
        help="a name of `potstill list datasets`, a .npz, a folder of images, or hf:FOLDER or hf:OWNER/NAME",
    )
    d.add_argument(
        "--method", default="dm", help="a name of `potstill list methods`, or package.module:recipe (default: dm)"
    )
    d.add_argument("--ipc", metavar="N|N1,N2,...", help="images per class (default: 1)")
    d.add_argument("--budget", type=int, metavar="B", help="images in total, in place of --ipc")
    d.add_argument("--steps", type=int, help="length of the run in steps, with the paper's numbers")
    d.add_argument("--minutes", type=float, help="length of the run in minutes: compiling and loop, not evaluation")
    d.add_argument("--preset", help="paper or small")
    d.add_argument(
        "--network",
        help="what the set is learned with and judged with: kind[-norm][-wWIDTH][-dDEPTH], such as convnet-batch-w64, "
        "or package.module:function",
    )
    d.add_argument("--init", help="real, noise, herding, k-center, k-means or k-means-centre")
    d.add_argument("--transform", default="standardise", help="standardise, zca or none (default: standardise)")
    d.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a recipe field, such as optimiser.inputs.lr=2.0",
    )
    d.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a recipe as `potstill show` prints it, in place of --method"
    )
    d.add_argument(
        "--experts", type=Path, metavar="DIR", help="networks that `potstill experts` recorded, in place of fresh ones"
    )
    d.add_argument("--seed", type=int, default=0)
    d.add_argument(
        "--holdout", type=float, default=0.1, help="share of the training data kept for looks (default: 0.1)"
    )
    d.add_argument("--out", type=Path, help="folder of the run (default: runs/DATA-METHOD-ipcN-seedS)")
    d.add_argument("--memory", metavar="SIZE", help="what it may take, such as 2GiB: steps are split so that they fit")
    d.add_argument("--resume", action="store_true", help="continue the run in the folder")
    d.add_argument("--force", action="store_true", help="start again in a folder that holds a run")
    d.add_argument(
        "--parallel", metavar="WHAT", help="under torchrun: batch (one network) or networks (one for each process)"
    )
    d.add_argument("--tensorboard", type=Path, metavar="DIR", help="log loss and looks there for TensorBoard")
    d.add_argument("--no-evaluate", action="store_true", help="leave out accuracy and baselines at the end")

    e = add("evaluate", "Train fresh networks on sets and read their accuracy on the test data.")
    e.add_argument(
        "sets",
        nargs="+",
        metavar="SET",
        help="a set's folder or file, or a name of `potstill list zoo`; also a .pt of DC, DSA or DM, MTT's folder, a .npz",
    )
    e.add_argument("--data", help="the data, if not the set's own")
    e.add_argument(
        "--networks",
        default="",
        metavar="A,B",
        help="if not the student that the set asks for; names, or package.module:function",
    )
    e.add_argument("--protocol", help="if not the protocol that the set asks for")
    e.add_argument(
        "--normalisation",
        metavar="WHAT",
        help="of another project's set: standardise, unit (pixels 0 to 1), or MEAN/STD such as 0.2861/0.3530",
    )
    e.add_argument(
        "--baselines", default="", metavar="LIST", help="of random, k-means, random-soft and whole, beside each set"
    )
    e.add_argument("--seed", type=int, default=0)
    e.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    t = add(
        "experts", "Train networks on the data and keep their weights at every epoch, for methods that replay them."
    )
    t.add_argument("data", help="as for `potstill distill`")
    t.add_argument("--count", type=int, default=10, metavar="N", help="experts (default: 10)")
    t.add_argument("--epochs", type=int, default=5, metavar="E", help="of each (default: 5)")
    t.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the recording")
    t.add_argument("--network", help="as for `potstill distill` (default: convnet; for vectors mlp)")
    t.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD (default: 0.01)")
    t.add_argument("--momentum", type=float, default=0.0, help="of SGD (default: 0)")
    t.add_argument("--weight-decay", type=float, default=0.0, help="of SGD (default: 0)")
    t.add_argument("--batch", type=int, default=256, help="samples per step (default: 256)")
    t.add_argument("--augment", default="dsa", help="dsa or none (default: dsa)")
    t.add_argument("--transform", default="standardise", help="standardise, zca or none (default: standardise)")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument(
        "--holdout", type=float, default=0.1, help="share of the training data that no expert sees (default: 0.1)"
    )
    t.add_argument("--resume", action="store_true", help="continue the recording in the folder, or add experts to it")
    t.add_argument("--force", action="store_true", help="start again in a folder that holds a recording")
    b = add("benchmark", "Run a table of methods, data and sizes cell by cell; what is there already is kept.")
    b.add_argument("name", metavar="NAME|FILE", help="quick, review, review-transfer, cost, or a .toml of your own")
    b.add_argument("--only", metavar="GLOB", help="cells such as 'digits/*/1', 'transfer/*' or '*/dm/*'")
    b.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: results/NAME)")
    b.add_argument("--minutes", type=float, help="leave out cells beyond this budget")
    b.add_argument("--networks", default="", metavar="A,B", help="judge with these in place of the rows' own")
    b.add_argument(
        "--code",
        default="",
        metavar="A,B",
        help="modules outside of Potstill that rows may name, such as package.module",
    )
    b.add_argument("--no-zoo", action="store_true", help="make every set, also those that the zoo has")
    b.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    b.add_argument(
        "--on",
        default="",
        metavar="ray",
        help="a Ray cluster: ray (that of RAY_ADDRESS, or a new one here) or ray:HOST:PORT",
    )
    b.add_argument(
        "--data", action="append", default=[], metavar="NAME=OTHER", help="data that stand for others, such as a copy"
    )
    v = add("speed", "Measure where a step's time goes, method by method, against this machine's matrix product.")
    v.add_argument(
        "data", nargs="?", default="fashion-mnist", help="as for `potstill distill` (default: fashion-mnist)"
    )
    v.add_argument("--methods", default="", metavar="A,B", help="of those that take steps (default: all)")
    v.add_argument("--ipc", type=int, default=1, help="images per class (default: 1)")
    v.add_argument("--preset", default="small", help="small or paper (default: small)")
    v.add_argument("--network", help="in place of the recipes' own")
    v.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="a recipe field, for every method")
    v.add_argument("--repeats", type=int, default=5, help="timed steps, after two that warm up (default: 5)")
    v.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    for p in (d, e):
        p.add_argument("--repeats", type=int, default=5, help="fresh networks for each number (default: 5)")
    for p in (d, e, t, b, v):
        p.add_argument(
            "--data-root", type=Path, metavar="DIR", help="folder of downloaded data (default: $POTSTILL_DATA)"
        )
        p.add_argument("--device", default="cpu")
        p.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
        p.add_argument("--compile", default="auto", help="auto, on or off")

    x = add("export", "Write a set as PNG, npz or Parquet, with a card that says how to use it.")
    x.add_argument("set", metavar="SET", help="a folder with a set.safetensors, such a file, or a name of the zoo")
    x.add_argument("--to", required=True, help="png, npz, parquet, or safetensors: the set itself in one file")
    x.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="a new folder; or a new .npz, .parquet or .safetensors"
    )

    r = add("report", "A benchmark's page, from its records: tables, plots and the sets as pictures.")
    r.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what `potstill benchmark` has written")
    r.add_argument("--out", required=True, type=Path, metavar="FILE", help="a .html, .md or .csv")

    s = add("list", "What there is.")
    s.add_argument("what", help="methods, datasets, networks, protocols or zoo")
    s = add("show", "A method's recipe as TOML, which --recipe reads.")
    s.add_argument("method")
    s.add_argument("--preset", default="paper")
    s = add("cite", "The paper that a method comes from.")
    s.add_argument("method")
    return top
