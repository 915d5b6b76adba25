"""The report: what the pictures show, and that the page says what the record says and nothing runs or loads in it."""

from __future__ import annotations

import ast
import base64
import copy
import errno
import html
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from potstill.errors import PotstillError, Unwritable
from potstill.report import extent, grid, png_bytes, run_page, write_run_report

PLANTED = "<script>alert(1)</script>"


def result(method: str, mean: float, protocol: str = "dsa", name: str = "", network: str = "convnet") -> dict[str, Any]:
    accuracies = [mean - 0.004, mean, mean + 0.004]
    return {
        "set": name or method,
        "method": method,
        "ipc": 1,
        "network": network,
        "protocol": protocol,
        "protocol_hash": f"hash-{protocol}",
        "metric": "accuracy",
        "accuracies": accuracies,
        "accuracy_mean": mean,
        "accuracy_std": 0.004,
        "seconds": 80.1,
        "peak_bytes": 1e9,
    }


def record() -> dict[str, Any]:
    return {
        "kind": "distillation",
        "method": "dm",
        "command": "potstill distill digits --method dm --ipc 1",
        "software": {"potstill": "0.1.0", "torch": "2.14.1", "machine": {"processor": "a CPU", "threads": 2}},
        "data": {
            "name": "digits",
            "fingerprint": "ab12cd34",
            "classes": 3,
            "class_names": ["nought", PLANTED, "two & more"],
            "shape": [1, 8, 8],
            "train": 1500,
            "heldout": 150,
            "test": 297,
        },
        "recipe": {"objective": {"real": 256}, "optimiser": {"inputs": {"lr": 1.5}}, "augment": []},
        "seed": 17,
        "steps": 74,
        "ipc": 1,
        "choices": {"preset": "small", "precision": "bf16"},
        "curve": [[s, 50.0 / (s + 1)] for s in range(74)],
        "looks": [{"step": 0, "accuracy": 0.412}, {"step": 74, "accuracy": 0.698}],
        "cost": {
            "phases": {"data": 1.2, "loop": 130.0},
            "seconds": 270.0,
            "seconds_per_step": 0.9,
            "peak_bytes": 1234567890,
        },
        "results": [
            result("dm", 0.712, name="this set"),
            result("random", 0.531),
            result("whole", 0.925, "whole"),
        ],
        "set": {"file": "set.safetensors", "sha256": "0f1e2d", "bytes": 33000, "images": 3},
    }


def arrays(count: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 1.3, (count, *shape)).astype(np.float32)


def page(changed: dict[str, Any] | None = None, images: np.ndarray | None = None) -> str:
    images = arrays() if images is None else images
    evolution = [(step, images * step / 74) for step in (0, 37, 74)]
    return run_page(record() if changed is None else changed, images, np.arange(len(images)), evolution, images)


def text(source: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((1, 8, 8), "L"), ((3, 8, 12), "RGB"), ((2, 8, 8), "L"), ((5, 9, 4), "L"), ((31,), "L"), ((1,), "L")],
)
@pytest.mark.parametrize("rows", [None, 2])
def test_every_kind_of_image_can_be_drawn(shape: tuple[int, ...], mode: str, rows: int | None) -> None:
    picture = grid(arrays(6, shape), rows=rows)
    assert picture.mode == mode
    assert picture.width <= 1600 and picture.height >= 2 * 56


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_pixel_is_its_value_clamped(channels: int) -> None:
    values = np.array([[-0.4, 0.0, 0.25], [0.5, 1.0, 1.7]], np.float32)
    picture = np.asarray(grid(np.tile(values, (1, channels, 1, 1)), scale=1, pad=0))
    expected = np.array([[0, 0, 64], [128, 255, 255]])
    assert (picture == (expected[..., None] if channels == 3 else expected)).all()


def test_other_channels_are_drawn_as_their_mean() -> None:
    image = np.stack([np.full((2, 2), 0.2), np.full((2, 2), 0.6)])[None]
    assert (np.asarray(grid(image, scale=1, pad=0)) == round(0.4 * 255)).all()


def test_vectors_share_one_scale_and_are_padded() -> None:
    vectors = np.array([[-2.0, 0.0, 2.0], [6.0, np.nan, -2.0]])
    picture = np.asarray(grid(vectors, rows=1, scale=1, pad=0))
    assert picture.tolist() == [[0, 64, 255, 0], [128, 0, 0, 0]]


def test_no_number_breaks_a_picture() -> None:
    image = np.array([[np.nan, np.inf], [-np.inf, 1.0]], np.float32)[None, None]
    assert np.asarray(grid(image, scale=1, pad=0)).tolist() == [[0, 255], [0, 255]]
    empty = np.full((1, 1, 2, 2), np.nan, np.float32)
    assert np.asarray(grid(np.concatenate([image, empty]), rows=1, scale=1, pad=0))[:, 2:].min() == 255
    assert grid(np.full((2, 4), np.nan)).size > (0, 0)
    constant = grid(np.ones((2, 4)), scale=1, pad=0)
    assert np.isfinite(np.asarray(constant)).all()


def test_drawing_leaves_the_images_alone() -> None:
    images = arrays(4)
    before = images.copy()
    grid(images, rows=2, labels=["a", "b"])
    assert (images == before).all()


def test_one_row_per_class_upscaled_by_nearest() -> None:
    images = arrays(6)
    picture = np.asarray(grid(images, rows=2, pad=2))
    tile = picture[2:58, 2:58]
    assert picture.shape == (2 + 2 * 58, 2 + 3 * 58)
    assert (tile == np.kron((images[0, 0].clip(0, 1) * 255).round(), np.ones((7, 7)))).all()


def test_a_wide_grid_is_scaled_less_and_then_cropped() -> None:
    assert grid(arrays(100), rows=2).width <= 1600
    wide, short = grid(arrays(2 * 400), rows=2), grid(arrays(2 * 100), rows=2)
    assert wide.width <= 1600
    assert wide.height == short.height + 16  # the line that says how many are shown


def test_labels_that_do_not_fit_are_cut() -> None:
    long = ["a name much longer than its tile is wide", "two\nlines"]
    assert grid(arrays(2), labels=long).size == grid(arrays(2), labels=["a", "b"]).size
    assert grid(arrays(2), rows=2, labels=long).width < 56 + 170


@pytest.mark.parametrize(
    ("images", "arguments"),
    [
        (np.zeros((4, 8, 8)), {}),
        (np.zeros((4, 1, 8, 8), np.uint8), {}),
        (np.zeros((0, 1, 8, 8)), {}),
        (np.zeros((4, 1, 8, 8)), {"rows": 3}),
        (np.zeros((4, 1, 8, 8)), {"rows": 0}),
        (np.zeros((4, 1, 8, 8)), {"labels": ["one"]}),
    ],
)
def test_what_cannot_be_drawn_is_said(images: np.ndarray, arguments: dict[str, Any]) -> None:
    with pytest.raises(PotstillError, match="images|labels"):
        grid(images, **arguments)


def test_png_bytes_round_trip() -> None:
    picture = grid(arrays(4, (3, 8, 8)))
    content = png_bytes(picture)
    assert content == png_bytes(picture)
    assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(picture)).all()


def test_the_numbers_on_the_page_are_the_records() -> None:
    seen = text(page())
    for number in (
        "3 images in place of 1,500",
        "71.2 ± 0.4 %",
        "53.1 ± 0.4 %",
        "92.5 ± 0.4 %",
        "n = 3",
        "keeps 77 % of the whole set's score with 0.2 % of its size",
        "Better than the random real baseline: +18.1 points (Welch's t-test, p < 0.0001, n = 3 and 3 networks",
        "Loss from 50 at step 0 to 0.6757 at step 73",
        "Held-out accuracy from 41.2 % at step 0 to 69.8 % at step 74",
        "1.2 s",
        "2 min 10 s",
        "4 min 30 s",
        "0.9 s",
        "1.2 GB",
        "33.0 kB",
        'potstill.load("set.safetensors")',
        "potstill distill digits --method dm --ipc 1",
        "objective.real = 256",
        "optimiser.inputs.lr = 1.5",
        "ab12cd34",
        "0f1e2d",
        "150 held out",
        "torch 2.14.1",
        "seed 17",
    ):
        assert number in seen, number


def test_the_page_is_the_same_twice() -> None:
    assert page() == page()


@pytest.mark.parametrize(
    ("random", "words"),
    [
        (result("random", 0.711), "Not clearly different from the random real baseline: +0.1 points"),
        (result("random", 0.8), "Worse than the random real baseline: -8.8 points"),
        (result("random", 0.5, "dc"), "under another protocol"),
        (result("random", 0.5) | {"accuracies": [0.5]}, "No test against the random real baseline: n = 3 and 1"),
    ],
)
def test_better_is_said_only_where_it_is_shown(random: dict[str, Any], words: str) -> None:
    changed = record()
    changed["results"][1] = random
    seen = text(page(changed))
    assert words in seen
    assert "Better than" not in seen


def test_several_networks_have_their_own_bars() -> None:
    changed = record()
    changed["results"] += [result("dm", 0.6, name="this set", network="mlp"), result("random", 0.4, network="mlp")]
    seen = text(page(changed))
    assert seen.count("Better than") == 2
    assert "60.0 ± 0.4 %" in seen and "40.0 ± 0.4 %" in seen


def test_strangers_words_stay_words() -> None:
    changed = record()
    for key in ("method", "command"):
        changed[key] = PLANTED
    changed["choices"]["preset"] = changed["data"]["name"] = changed["set"]["file"] = PLANTED
    changed["choices"]['" onload="alert(1)'] = "x"
    changed["recipe"] = {PLANTED: PLANTED}
    changed["results"][0]["network"] = changed["results"][1]["set"] = PLANTED
    changed["results"][1]["method"] = "other"
    changed["cost"]["phases"] = {PLANTED: 1.0}
    source = page(changed)
    assert "<script>alert" not in source
    assert html.escape(PLANTED) in source
    assert source.count("<script") == 1
    assert ' onload="' not in source


def test_nothing_is_loaded_from_anywhere() -> None:
    source = page()
    targets = re.findall(r"""(?:src|href|action|poster)=["']?([^"'\s>]+)|url\(([^)]+)""", source)
    assert targets and all("".join(target).startswith("data:") for target in targets)
    assert "http://" not in source and "https://" not in source and "@import" not in source
    assert "default-src 'none'" in source


def test_every_picture_is_a_png_with_words() -> None:
    tags = re.findall(r"<img [^>]*>", page())
    assert len(tags) == 3 + 3 + 3 * 3  # distilled, real, three snapshots
    for tag in tags:
        assert re.search(r'alt="[^"]+"', tag)
        code = re.search(r"base64,([^\"]+)", tag)
        assert code and Image.open(io.BytesIO(base64.b64decode(code[1]))).size == (8, 8)


@pytest.mark.parametrize("missing", [None, *record()])
def test_a_page_without_a_part_is_whole(missing: str | None) -> None:
    changed = {k: v for k, v in record().items() if k != missing}
    source = page(changed)
    assert source.rstrip().endswith("</html>") and "None" not in text(source) and "Undefined" not in source
    assert ("has not been evaluated" in source) == (missing == "results")


def test_a_page_of_nothing() -> None:
    source = run_page({}, np.zeros((0, 1, 8, 8), np.float32), np.zeros(0, int), [])
    assert source.rstrip().endswith("</html>") and "Train on it" in source


def test_a_loss_that_broke_is_left_out_of_the_curve() -> None:
    changed = record()
    changed["curve"] = [[0, 5.0], [1, float("nan")], [2, None], [3, 4.0]]
    source = page(changed)
    assert "Loss from 5 at step 0 to 4 at step 3" in source
    assert "nan" not in re.sub(r"base64,[^\"]+", "", source)
    changed["curve"] = [[0, float("nan")]]
    assert "Loss from" not in page(changed)


@pytest.mark.parametrize(
    "curve", [[[0, 0.0]], [[0, 1e-9], [5, 1e-9]], [[0, 1e4], [900, 1e-3]], [[s, -s] for s in range(2000)]]
)
def test_any_curve_stays_in_its_box(curve: list[list[float]]) -> None:
    changed = record()
    changed["curve"] = curve
    path = re.search(r'class="curve" d="M([^"]+)"', page(changed))
    assert path
    points = np.array([point.split() for point in path[1].split("L")], float)
    assert len(points) <= 300
    assert (points >= (52, 14)).all() and (points <= (384, 200)).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (31,)])
def test_unequal_classes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    groups = np.array([2, 0, 2, 2, 0, 1])
    changed = record() | {"ipc": [2, 1, 3]}
    changed["data"] = changed["data"] | {"shape": list(shape)}
    write_run_report(tmp_path, changed, arrays(6, shape), groups, [(0, arrays(3, shape))])
    seen = text((tmp_path / "report.html").read_text())
    noun = "sample" if len(shape) == 1 else "image"
    for words in (f"nought 2 {noun}s", f"{PLANTED} 1 {noun}", f"two & more 3 {noun}s", "in unequal numbers"):
        assert words in seen
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 3 * 56


def test_many_are_cut_and_said() -> None:
    changed = record()
    changed["data"] = changed["data"] | {"class_names": [f"c{i}" for i in range(120)], "classes": 120}
    images = np.zeros((240, 1, 2, 2), np.float32)
    evolution = [(step, images[:120]) for step in range(50)]
    source = run_page(changed, images, np.repeat(np.arange(120), 2), evolution, images[:120])
    assert "The first 1 of up to 2 of each class." in source
    assert "The first 100 of 120 classes." in source
    assert len(re.findall("<img ", source)) == 100 + 100 + 12 * 10


def test_files_are_written_whole_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "run"
    write_run_report(folder, record(), arrays(), np.arange(3), [], None)
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "report.html"]
    before = (folder / "report.html").read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unwritable, match=r"cannot be written in .* \(no space left\)"):
        write_run_report(folder, record() | {"seed": 1}, arrays(), np.arange(3), [], None)
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "report.html"]
    assert (folder / "report.html").read_bytes() == before


def test_arguments_are_left_alone() -> None:
    given = record()
    kept = copy.deepcopy(given)
    page(given)
    assert given == kept


def test_importing_the_report_imports_nothing_heavy() -> None:
    tree = ast.parse((Path(__file__).parents[1] / "src" / "potstill" / "report.py").read_text())
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert foreign == {"jinja2", "numpy", "PIL", "potstill"}
    assert [name for name in names if name.startswith("potstill")] == ["potstill.errors", "potstill.records"]


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
def test_a_browser_shows_the_page_at_phone_width(tmp_path: Path) -> None:
    """In a frame of 360 pixels: nothing overflows, the slider works, the console stays empty."""
    move = 'const s = document.getElementById("step"); s.value = 1; s.dispatchEvent(new Event("input"));'
    inner = html.escape(page().replace("</body>", f"<script>{move}</script></body>"))
    outer = f"""<!doctype html><iframe style="width: 360px; height: 800px; border: 0" srcdoc="{inner}"></iframe>
        <p id="out"></p><script>document.querySelector("iframe").onload = (event) => {{
            const page = event.target.contentDocument, root = page.documentElement;
            const drawn = [...page.images].every((i) => i.complete && i.naturalWidth === 8);
            document.getElementById("out").textContent = [root.scrollWidth - root.clientWidth,
                page.getElementById("now").textContent, page.querySelectorAll("#stage img").length, drawn].join(" ");
        }};</script>"""
    (tmp_path / "outer.html").write_text(outer)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000"
    place = [f"--user-data-dir={tmp_path}/user", "--dump-dom", (tmp_path / "outer.html").as_uri()]
    command = ["chromium", *flags.split(), *place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert '<p id="out">0 37 3 true</p>' in done.stdout
    assert "CONSOLE" not in done.stderr


def test_the_extent_is_that_of_finite_values() -> None:
    a = np.array([[1.0, np.nan], [-2.0, np.inf]])
    assert extent([a, np.array([3.0])]) == (-2.0, 3.0) and extent([np.full((2, 2), np.nan)]) == (0.0, 1.0)
    assert extent([np.zeros((0, 2)), np.array([np.nan, 0.5])]) == (0.5, 0.5)
