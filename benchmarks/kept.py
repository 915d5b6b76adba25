"""The file that a measuring script adds to: asked for in the same words, refused for the same mistakes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from potstill.records import read_json

FORMAT = 1


def add_arguments(parser: ArgumentParser, kind: str) -> None:
    """`--scale` and `--json`."""
    parser.add_argument("--scale", default="full", choices=("full", "toy"))
    parser.add_argument("--json", type=Path, help=f"the record; by default results/{kind}.json beside this script")


def opened(parser: ArgumentParser, args: Namespace, kind: str, part: str) -> tuple[Path, dict[str, Any]]:
    """The file and what is in it, with an empty `part` where it is new. Ends with one line where toys would come among the
    results, or among runs at full size."""
    if args.json is None and args.scale == "toy":
        parser.error("--json is missing: toys have no place among the results")
    file = args.json or Path(__file__).parent / "results" / f"{kind}.json"
    record = read_json(file) if file.exists() else {"format": FORMAT, "kind": kind, "scale": args.scale, part: {}}
    if record["scale"] != args.scale:
        parser.error(f"{file} has {part} of scale {record['scale']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file, record
