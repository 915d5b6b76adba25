"""Whitening: what it makes of the data, its inverse, how it travels with a set; a budget of images in total."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import potstill
import potstill.cli
import potstill.evaluation
from potstill import Data, PotstillError, distill, evaluate, load, load_data, transforms
from potstill.exchange import DistilledSet
from potstill.judge import Judge
from potstill.synthetic import share
from potstill.transforms import ZCA, Nothing, build, describe, matrix_of


def made(shape=(3, 5, 4), n=400, seed=0, bytes_=True):
    """Data whose neighbouring values go together, and its training inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape)).cumsum(-1)
    x = np.clip(128 + 30 * x, 0, 255).astype(np.uint8) if bytes_ else x.astype(np.float32)
    return Data.from_arrays(
        x, np.arange(n) % 2, x[:50], np.arange(50) % 2, channels="first" if len(shape) > 1 else None
    ), x


def by_hand(x, scale, reg=0.1):
    """Standardised rows (N, d) and their whitening, by a singular value decomposition of the rows."""
    unit = x.astype(np.float64) / scale
    axes = (0, *range(2, x.ndim))
    rows = ((unit - unit.mean(axes, keepdims=True)) / unit.std(axes, keepdims=True)).reshape(len(x), -1)
    _, s, v = np.linalg.svd(rows / np.sqrt(len(x)), full_matrices=False)
    return rows, (v.T / np.sqrt(s**2 + reg * (s**2).sum() / rows.shape[1])) @ v


@pytest.mark.parametrize(("shape", "bytes_"), [((3, 5, 4), True), ((1, 6, 6), False), ((9,), False)])
def test_zca_is_the_formula(shape, bytes_):
    data, x = made(shape, bytes_=bytes_)
    white = data.with_transform("zca")
    rows, matrix = by_hand(x, data.scale)
    np.testing.assert_allclose(white.transform.matrix.numpy(), matrix, atol=1e-4)
    z = white.prepare(white.train.inputs)
    assert z.dtype == torch.float32 and z.shape == (400, *shape)
    np.testing.assert_allclose(z.flatten(1).numpy(), rows @ matrix, atol=2e-4)


def test_whitened_data_have_the_regularised_identity_as_moment():
    data, x = made()
    z = data.with_transform("zca").prepare(data.train.inputs).flatten(1).double()
    rows, _ = by_hand(x, 255)
    moment = rows.T @ rows / len(rows)
    small = 0.1 * np.trace(moment) / len(moment)
    np.testing.assert_allclose(
        (z.T @ z / len(z)).numpy(), moment @ np.linalg.inv(moment + small * np.eye(len(moment))), atol=1e-3
    )
    assert np.linalg.eigvalsh(moment).max() > 4 and torch.linalg.eigvalsh(z.T @ z / len(z)).max() < 1
    close = ZCA.of(data.train.inputs, 255.0, data.transform, reg=1e-6)
    z = close.apply(data.train.inputs.float() / 255).flatten(1)
    np.testing.assert_allclose((z.T @ z / len(z)).numpy(), np.eye(60), atol=1e-2)


@pytest.mark.parametrize("name", ["standardise", "zca", "none"])
def test_every_transform_is_inverted(name):
    data, x = made()
    data = data.with_transform(name)
    unit = torch.from_numpy(x).float() / 255
    z = data.prepare(data.train.inputs)
    assert (data.transform.invert(z) - unit).abs().max() < 1e-4
    assert torch.equal(
        data.transform.apply(unit[:6].reshape(2, 3, 3, 5, 4)), data.transform.apply(unit[:6]).reshape(2, 3, 3, 5, 4)
    )
    assert data.transform.name == name and data.transform.fits((3, 5, 4))
    assert name == "none" or not data.transform.fits((1, 5, 4))
    assert (data.display(z) - unit).abs().max() < 1e-4
    again = build(describe(data.transform), matrix_of(data.transform))
    assert again == data.transform and torch.equal(again.apply(unit), data.transform.apply(unit))


def test_a_transform_is_found_from_all_training_data_whatever_is_held_out():
    data, _ = made()
    whole, held = data.with_transform("zca"), data.hold_out(0.2).with_transform("zca")
    assert np.allclose(whole.transform.matrix, held.transform.matrix, atol=1e-5)
    assert data.with_transform("none").with_transform("standardise").transform == data.transform
    assert isinstance(data.with_transform("none").transform, Nothing)


def test_a_matrix_is_kept_in_the_cache_and_checked(monkeypatch):
    data, _ = made()
    first = data.with_transform("zca").transform
    with monkeypatch.context() as patch:
        patch.setattr(ZCA, "of", lambda *a: pytest.fail("made anew"))
        assert data.with_transform("zca").transform == first
    (file,) = (Path(os.environ["POTSTILL_CACHE"]) / "zca").glob("*/*")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert data.with_transform("zca").transform == first and file.read_bytes() == content


def test_transforms_that_do_not_exist_or_are_too_large(monkeypatch):
    data, _ = made()
    for call in (lambda: data.with_transform("zac"), lambda: load_data("digits", transform="zac"),
                 lambda: distill("digits", transform="zac")):  # fmt: skip
        with pytest.raises(PotstillError, match="no transform 'zac'; did you mean 'zca'"):
            call()
    monkeypatch.setattr(transforms, "MOST", 59)
    with pytest.raises(PotstillError, match="--transform zca whitens up to 59 numbers per input; these have 60"):
        data.with_transform("zca")


# --- with a set


@pytest.fixture(scope="module")
def white(tmp_path_factory):
    """A run on whitened digits."""
    out = tmp_path_factory.mktemp("runs") / "white"
    options = {
        "preset": "small",
        "network": "convnet-w8-d1",
        "holdout": 0,
        "evaluate": False,
        "out": out,
        "compile": "off",
    }
    return distill("digits", "dm", steps=2, transform="zca", **options), options


def test_a_set_finds_its_matrix_beside_it(white, tmp_path):
    run, _ = white
    data = load_data("digits", transform="zca")
    (file,) = run.out.glob("zca-*")
    assert file.name == f"zca-{data.transform.digest}.safetensors"
    set_ = load(run.out)
    assert set_.standardise == data.transform and set_.meta.transform["name"] == "zca"
    raw = data.test.inputs[:4]
    assert torch.equal(set_.transform(raw), data.prepare(raw))
    unit = set_.standardise.invert(set_.standardise.apply(raw.float() / 16))
    assert (unit - raw.float() / 16).abs().max() < 1e-4 and set_.images.shape == set_.inputs.shape
    assert run.record["choices"]["transform"] == "zca" and "--transform zca" in run.record["command"]
    shutil.copytree(run.out, tmp_path / "copy")
    set_.save(tmp_path / "one.safetensors", self_contained=True)
    assert not list(tmp_path.glob("zca-*"))
    for path in ("copy", "one.safetensors"):
        assert torch.equal(load(tmp_path / path).transform(raw), data.prepare(raw))


def test_a_set_without_its_matrix_is_judged_and_finds_it_in_the_cache(white, tmp_path, monkeypatch):
    """As those of the zoo: the training data give the matrix again, on another machine one of another hash."""
    run, _ = white
    data = load_data("digits", transform="zca")
    theirs = load(run.out)
    theirs.matrix = theirs.matrix * (
        1 + 1e-7 * torch.randn(theirs.matrix.shape, generator=torch.Generator().manual_seed(0))
    )
    theirs.meta.transform["matrix"] = transforms.digest_of(theirs.matrix)
    theirs.meta.transform["mean"] = [m * (1 + 1e-9) for m in theirs.meta.transform["mean"]]
    for folder in ("zoo", "whole"):
        (tmp_path / folder).mkdir()
    theirs.save(tmp_path / "zoo" / "set.safetensors")
    (file,) = (tmp_path / "zoo").glob("zca-*")
    file.unlink()
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    blind, raw = load(tmp_path / "zoo"), data.test.inputs[:4]
    assert blind.matrix is None and torch.equal(blind.inputs, theirs.inputs)
    for use in (
        lambda: blind.transform(raw),
        lambda: blind.images,
        lambda: potstill.export_set(blind, "png", tmp_path / "x"),
    ):
        with pytest.raises(PotstillError, match=r"zca-.* is missing; .*load_data\('digits', transform='zca'\)"):
            use()
    (judged,) = evaluate(tmp_path / "zoo", repeats=1, networks=["mlp-w8"], protocol="dc", baselines=())
    (again,) = evaluate(run.out, repeats=1, networks=["mlp-w8"], protocol="dc", baselines=())
    assert judged.accuracies == again.accuracies
    found = load(tmp_path / "zoo")
    assert torch.equal(found.matrix, data.transform.matrix) and torch.equal(found.transform(raw), data.prepare(raw))
    found.save(tmp_path / "whole" / "set.safetensors")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "empty"))
    assert torch.equal(load(tmp_path / "whole").images, found.images)
    (kept,) = (tmp_path / "cache" / "zca").glob("*/zca-*")
    kept.write_bytes(kept.read_bytes()[:-1])
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    assert load(tmp_path / "zoo").matrix is None


@pytest.mark.parametrize("change", [{"reg": 0.5}, {"mean": [0.25]}, {"fingerprint": "0123456789abcdef"}])
def test_a_set_without_its_matrix_gets_that_of_its_own_data_only(white, tmp_path, monkeypatch, change):
    """Before anything is trained."""
    run, _ = white
    set_ = load(run.out)
    blind = DistilledSet(set_.inputs, set_.labels, set_.meta)
    if "fingerprint" in change:
        blind.meta = replace(blind.meta, **change)
    else:
        blind.meta = replace(blind.meta, transform={**blind.meta.transform, **change})
    monkeypatch.setattr(Judge, "set", lambda *args: pytest.fail("trained"))
    with pytest.raises(PotstillError, match="its matrix is not beside it; digits as it is here is not the data"):
        evaluate(blind, repeats=1, networks=["mlp-w8"], protocol="dc")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": None}, "mean"),
        ({"trailing": 0}, "does not fit inputs"),
        ({"std": [0.0]}, "divides by 0"),
        ({"reg": "x"}, "no factor"),
        ({"matrix": "../x"}, "which is no hash"),
    ],
)
def test_what_a_set_without_its_matrix_says_of_its_transform_is_checked(white, tmp_path, change, words):
    run, _ = white
    set_ = load(run.out)
    said = {k: v for k, v in {**set_.meta.transform, **change}.items() if v is not None}
    blind = DistilledSet(set_.inputs, set_.labels, replace(set_.meta, transform=said))
    blind.save(tmp_path / "set.safetensors")
    with pytest.raises(PotstillError, match=words):
        load(tmp_path / "set.safetensors")


def test_a_matrix_that_is_damaged_or_another_is_refused(white, tmp_path):
    run, _ = white
    shutil.copytree(run.out, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("zca-*")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PotstillError, match="does not have the hash"):
        load(tmp_path / "copy")
    file.write_bytes(content[:50])
    with pytest.raises(PotstillError, match="is damaged"):
        load(tmp_path / "copy")
    set_ = load(run.out)
    set_.matrix = set_.matrix + 1
    set_.save(tmp_path / "odd.safetensors", self_contained=True)
    with pytest.raises(PotstillError, match="does not have the hash"):
        load(tmp_path / "odd.safetensors")
    for name in ("../../x", "zca", 7, None):
        set_ = load(run.out)
        set_.meta.transform["matrix"] = name
        set_.matrix = None
        set_.save(tmp_path / "odd.safetensors")
        with pytest.raises(PotstillError, match="which is no hash"):
            load(tmp_path / "odd.safetensors")


def test_a_run_is_resumed_under_its_transform_only(white, tmp_path):
    run, options = white
    shutil.copytree(run.out, tmp_path / "run")
    options = {**options, "out": tmp_path / "run"}
    with pytest.raises(PotstillError, match="transform was zca, now standardise"):
        distill("digits", "dm", steps=2, resume=True, **options)
    again = distill("digits", "dm", steps=2, resume=True, transform="zca", **options)
    assert torch.equal(again.set.inputs, run.set.inputs)
    distill("digits", "dm", steps=2, force=True, transform="none", **options)
    assert not list((tmp_path / "run").glob("zca-*")) and load(tmp_path / "run").meta.transform == {"name": "none"}


def test_baselines_see_what_the_set_sees(white, monkeypatch):
    run, _ = white
    seen = []
    monkeypatch.setattr(potstill.evaluation.Judge, "judge", lambda self, *a, **k: seen.append(self.data.transform))
    potstill.evaluate(run.out, networks=["mlp"], baselines=["random"], repeats=1)
    assert seen == [load_data("digits", transform="zca").transform] * 2


# --- a budget


@pytest.mark.parametrize(
    ("budget", "sizes", "counts"),
    [
        (10, [50] * 10, [1] * 10),
        (13, [50] * 10, [2, 2, 2] + [1] * 7),
        (11, [5, 9, 7], [3, 4, 4]),
        (11, [9, 2, 9], [5, 2, 4]),
        (16, [5, 9, 3], [5, 8, 3]),
        (17, [5, 9, 3], [5, 9, 3]),
    ],
)
def test_a_budget_is_divided_equally(budget, sizes, counts):
    assert share(budget, torch.tensor(sizes)) == counts and sum(counts) == budget


@pytest.mark.parametrize(("budget", "words"), [(2, "below the 3 classes"), (0, "below"), (18, "more than the 17")])
def test_a_budget_that_is_refused(budget, words):
    with pytest.raises(PotstillError, match=words):
        share(budget, torch.tensor([5, 9, 3]))


def test_a_budget_on_the_command_line(tmp_path, capsys):
    options = ["--method", "random", "--no-evaluate", "--out", str(tmp_path / "run")]
    assert potstill.cli.main(["distill", "digits", "--budget", "23", *options]) == 0
    made = load(tmp_path / "run")
    assert len(made) == 23 and sorted(made.meta.ipc) == [2] * 7 + [3] * 3
    capsys.readouterr()
    assert potstill.cli.main(["distill", "digits", "--budget", "23", "--ipc", "1", *options]) == 2
    assert "--ipc and --budget exclude each other" in capsys.readouterr().err
    assert potstill.cli.main(["distill", "digits", "--budget", "9", *options, "--force"]) == 2
    assert "--budget 9 is below the 10 classes" in capsys.readouterr().err
