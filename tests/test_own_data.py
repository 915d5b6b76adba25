"""Data of one's own, end to end through the command line: distilled, judged on three architectures, read back, used."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import potstill
from potstill import still
from potstill.cli import main
from potstill.training import PROTOCOLS

NETWORKS = ["convnet-w8", "mlp-w32", "lenet"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Looks and protocols of few epochs, at a rate for which few are enough."""
    monkeypatch.setattr(still, "LOOK", replace(still.LOOK, epochs=5))
    for name in ("dc", "dsa"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=40, lr=0.05))


def classes(shape, counts, seed, scale=1.0):
    """Samples (N, *shape) of as many classes as there are counts: a smooth pattern for each, noise around it."""
    patterns = np.random.default_rng(0).normal(size=(len(counts), shape[0], 3, 3))
    fine = [np.kron(p, np.ones((1, shape[1] // 3 + 1, shape[2] // 3 + 1)))[:, : shape[1], : shape[2]] for p in patterns]
    y = np.repeat(np.arange(len(counts)), counts)
    return scale * (np.stack(fine)[y] + 0.5 * np.random.default_rng(seed).normal(size=(len(y), *shape))), y


def folder(root):
    """RGB images of 12 x 20 pixels, classes of 20, 12 and 7; every pixel that was written, per part."""
    raw, names = {}, ["ash", "birch", "c. sea"]
    for part, counts, seed in (("train", (20, 12, 7), 1), ("test", (9, 8, 7), 2)):
        x, y = classes((3, 12, 20), counts, seed)
        raw[part] = (128 + 40 * x).clip(0, 255).astype(np.uint8)
        for i, (picture, label) in enumerate(zip(raw[part], y, strict=True)):
            place = root / part / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.transpose(1, 2, 0)).save(place / f"{i:03d}.png")
    return str(root), raw["train"] / 255, raw["test"], names


def npz(root):
    """Five channels of 12 x 20 floats, far from standardised; labels that do not begin at 0."""
    arrays = {}
    for part, counts, seed in (("train", (10, 14, 8, 9), 1), ("test", (6, 5, 7, 6), 2)):
        x, y = classes((5, 12, 20), counts, seed, scale=np.array([1, 5, 0.01, 300, 2]).reshape(5, 1, 1))
        arrays |= {f"x_{part}": (x + 7).astype(np.float32), f"y_{part}": 3 * y + 2}
    np.savez(root / "five.npz", **arrays)
    return str(root / "five.npz"), arrays["x_train"].astype(np.float64), arrays["x_test"], ["2", "5", "8", "11"]


def digits(root):
    x = load_digits().images
    return "digits", None, x[:50, None].astype(np.uint8), [str(i) for i in range(10)]


CASES = {  # maker, shape, --ipc, the same as a list, accuracy that noise as it begins never has
    "folder": (folder, (3, 12, 20), "3,2,1", [3, 2, 1], 0.8),
    "npz": (npz, (5, 12, 20), "1,3,2,2", [1, 3, 2, 2], 0.6),
    "digits": (digits, (1, 8, 8), "1", [1] * 10, 0.3),
}


@pytest.mark.parametrize(
    ("case", "method"), [("folder", "dm"), ("folder", "dc"), ("folder", "dsa"), ("npz", "dm"), ("digits", "dm")]
)
def test_distilled_judged_and_used(tmp_path, capsys, case, method):
    make, shape, ipc, counts, least = CASES[case]
    where, train, test, names = make(tmp_path)
    out, file = tmp_path / "run", tmp_path / "results.json"
    steps = 20 if method == "dm" else 12
    options = ["--network", "convnet-w8", "--init", "noise", "--set", "looks=1", "--set", "objective.real=6"]
    options += ["--set", "optimiser.inputs.lr=3.0", "--no-evaluate", "--ipc", ipc, "--method", method]
    options += ["--set", "source.epochs=2", "--set", "source.lifetime=2"] if method != "dm" else []
    assert main(["distill", where, *options, "--steps", str(steps), "--out", str(out)]) == 0, capsys.readouterr().err
    judge = ["evaluate", str(out), "--data", where, "--networks", ",".join(NETWORKS), "--repeats", "2"]
    judge += ["--protocol", "dc", "--json", str(file)]
    assert main(judge) == 0, capsys.readouterr().err

    set_ = potstill.load(out)
    assert set_.inputs.shape == (sum(counts), *shape) and set_.inputs.isfinite().all()
    assert set_.classes.tolist() == np.repeat(np.arange(len(counts)), counts).tolist()
    assert (set_.meta.ipc, set_.meta.class_names, set_.meta.method) == (counts, names, method)
    assert set_.meta.student == "convnet-w8" and set_.meta.steps == steps

    rows = json.loads(file.read_text())
    assert [(r["method"], r["network"]) for r in rows] == [(method, n) for n in NETWORKS]
    for r in rows:
        assert r["ipc"] == (counts if len(set(counts)) > 1 else counts[0]) and r["images"] == sum(counts)
        assert (r["protocol"], r["repeats"], len(r["accuracies"]), r["labels"]) == ("dc", 2, 2, "hard")
        assert r["input_bytes"] == 4 * set_.inputs.numel() and r["label_bytes"] == 8 * sum(counts)
        assert r["accuracy_mean"] > least, r

    record = json.loads((out / "record.json").read_text())
    assert record["data"]["shape"] == list(shape) and record["data"]["classes"] == len(counts)

    # the set's transform is that of the raw training samples, found here with NumPy
    if train is not None:
        mean, std = (getattr(train, f)((0, 2, 3)).reshape(-1, 1, 1) for f in ("mean", "std"))
        expected = (test / (255.0 if test.dtype == np.uint8 else 1.0) - mean) / std
        assert np.abs(set_.transform(test).numpy() - expected).max() < 2e-3
    else:
        assert abs(float(set_.transform(test).mean())) < 0.2 and abs(float(set_.transform(test).std()) - 1) < 0.2

    # what is read is what was written, and judged alike through the API
    set_.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (out / "set.safetensors").read_bytes()
    (again,) = potstill.evaluate(tmp_path / "again.safetensors", where, networks=["mlp-w32"], protocol="dc", repeats=2)
    assert again.accuracies == rows[1]["accuracies"]
    x, y = next(iter(torch.utils.data.DataLoader(set_, batch_size=len(set_))))
    assert torch.equal(x, set_.inputs) and torch.equal(y, set_.labels)


def test_noise_that_is_not_distilled_teaches_next_to_nothing(tmp_path):
    """What the accuracies above rest on: the sets there began like this one."""
    where = folder(tmp_path)[0]
    out = tmp_path / "run"
    options = ["--network", "convnet-w8", "--init", "noise", "--ipc", "3,2,1", "--steps", "0", "--no-evaluate"]
    assert main(["distill", where, *options, "--out", str(out)]) == 0
    results = potstill.evaluate(out, where, networks=NETWORKS, protocol="dc", repeats=2)
    assert sum(r.accuracy_mean for r in results) / 3 < 0.6 and results[0].accuracy_mean < 0.5
