"""Other projects' sets: each layout written here as its authors write it, judged like our own, and trusted in nothing."""

import copy
import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_exchange import data_of

import potstill
from potstill import foreign
from potstill.cli import main
from potstill.data import Data, Standardise
from potstill.errors import PotstillError
from potstill.evaluation import evaluate
from potstill.exchange import DistilledSet, describe_set
from potstill.export import export_set
from potstill.foreign import is_foreign, read
from potstill.functional import Key
from potstill.methods import METHODS
from potstill.testing import toy
from potstill.training import PROTOCOLS


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("dc", "dsa", "whole"):
        monkeypatch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], epochs=30, lr=0.05, steps=0))


DATA = toy()
NPZ = {
    "x_train": DATA.train.inputs,
    "y_train": DATA.train.labels,
    "x_test": DATA.test.inputs,
    "y_test": DATA.test.labels,
}


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "toy.npz", **{k: v.numpy() for k, v in NPZ.items()})
    return str(tmp_path / "toy.npz")


def pair(seed=0, data=DATA):
    """Images, standardised, and labels that are not in the order of classes."""
    pick = Key(seed).fold("pick").permutation(len(data.train))[:9]
    return data.prepare(data.train.inputs[pick]), data.train.labels[pick]


def dc(file, pairs, legacy=False):
    """As DC, DSA and DM write it: sets of several experiments and accuracies, NumPy's numbers among them."""
    kept = [[copy.deepcopy(x.detach().cpu()), copy.deepcopy(y.detach().cpu())] for x, y in pairs]
    scores = {"ConvNet": [np.float64(0.7), np.float32(0.5), 0.25, np.int64(3), np.bool_(True)], "MLP": []}
    held = {"data": kept, "accs_all_exps": scores}
    torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    return str(file)


def mtt(folder, x, y, tail="best"):
    folder.mkdir(exist_ok=True)
    torch.save(x.cpu(), folder / f"images_{tail}.pt")
    torch.save(y.cpu(), folder / f"labels_{tail}.pt")
    return str(folder)


# --- each layout


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_dc_holds_a_set_for_each_experiment(tmp_path, legacy):
    pairs = [pair(s) for s in range(3)]
    file = dc(tmp_path / "res.pt", pairs, legacy)
    found = read(file, DATA, "standardise")
    assert len(found) == 3
    for made, (x, y) in zip(found, pairs, strict=True):
        assert torch.equal(made.inputs, x) and torch.equal(made.labels, y) and made.lr is None
        assert made.meta.ipc == torch.bincount(y, minlength=3).tolist() and made.meta.method == "foreign"
        assert made.standardise == DATA.transform and made.meta.protocol == "dsa" and made.meta.student == "convnet"
    (one,) = read(file + "#2", DATA, "standardise")
    assert torch.equal(one.inputs, pairs[2][0])
    with pytest.raises(PotstillError, match="holds 3 sets, counted from 0; there is no number 3"):
        read(file + "#3", DATA, "standardise")


def test_mtt_by_folder_and_by_file(tmp_path):
    x, y = pair()
    folder = mtt(tmp_path / "mtt", x, y)
    mtt(tmp_path / "mtt", -x, y, "500")
    for path in (folder, f"{folder}/images_best.pt", f"{folder}/labels_best.pt"):
        (made,) = read(path, DATA, "standardise")
        assert torch.equal(made.inputs, x) and torch.equal(made.labels, y)
    (made,) = read(f"{folder}/images_500.pt", DATA, "standardise")
    assert torch.equal(made.inputs, -x)
    os.unlink(f"{folder}/images_best.pt")
    with pytest.raises(PotstillError, match=r"no images_best.pt; name one of its files: images_500.pt"):
        read(folder, DATA, "standardise")
    os.unlink(f"{folder}/labels_500.pt")
    with pytest.raises(PotstillError, match=r"needs labels_500.pt beside it"):
        read(f"{folder}/images_500.pt", DATA, "standardise")


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train"), ("x", "y"), ("data", "labels")])
@pytest.mark.parametrize("form", ["first", "last", "grey", "float64"])
def test_npz(tmp_path, names, form):
    x, y = pair()
    x = {"first": x, "last": x.permute(0, 2, 3, 1), "grey": x[:, 0], "float64": x.double()}[form]
    np.savez(tmp_path / "a.npz", **dict(zip(names, (x.numpy(), y.int().numpy()), strict=True)))
    (made,) = read(tmp_path / "a.npz", DATA, "standardise")
    assert torch.equal(made.inputs, pair()[0]) and torch.equal(made.labels, y) and made.inputs.dtype == torch.float32


def test_soft_labels(tmp_path):
    x, y = pair()
    soft = torch.softmax(Key(0).normal(9, 3) + 3 * torch.eye(3)[y], 1)
    (made,) = read(mtt(tmp_path / "a", x, soft), DATA, "standardise")
    assert torch.equal(made.labels, soft) and made.meta.labels == "soft"
    assert made.meta.ipc == torch.bincount(made.classes, minlength=3).tolist()
    with pytest.raises(PotstillError, match="no probabilities"):
        read(mtt(tmp_path / "b", x, 3 * soft), DATA, "standardise")


def test_rgb_and_vectors(tmp_path):
    for shape in ((3, 6, 5), (7,)):
        data, _ = data_of(shape)
        x, y = pair(0, data)
        (made,) = read(dc(tmp_path / "a.pt", [(x, y)]), data, "standardise")
        assert made.shape == shape and made.meta.student == ("mlp" if len(shape) == 1 else "convnet")
    with pytest.raises(PotstillError, match=r"inputs of shape \(9, 7\); made has inputs of shape \(3, 6, 5\)"):
        read(tmp_path / "a.pt", data_of((3, 6, 5))[0], "standardise")


# --- normalisation


def test_what_was_done_to_the_pixels_is_done_to_the_test_data(tmp_path):
    data, raw = data_of((3, 6, 5))
    raw = torch.from_numpy(raw[:9])
    unit, y = raw.float() / 255, data.train.labels[:9]
    own = Standardise((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    for stated, x, transform in [
        ("0.4,0.5,0.6/0.2,0.3,0.25", own.apply(unit), own),
        ("0.5/0.25", (unit - 0.5) / 0.25, Standardise((0.5,) * 3, (0.25,) * 3)),
        ("standardise", data.prepare(raw), data.transform),
        ("unit", unit, data.transform),
        ("unit", raw, data.transform),
    ]:
        torch.save({"data": [[x, y]]}, tmp_path / "a.pt")
        (made,) = read(tmp_path / "a.pt", data, stated)
        assert made.standardise == transform
        assert torch.allclose(made.inputs, made.transform(raw.numpy()), atol=1e-6), "the set and the test data agree"
        assert torch.allclose(made.images, unit, atol=1e-6)
        if stated != "unit":
            assert torch.equal(made.inputs, x)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (None, "--normalisation is needed"),
        (None, "0.4914,0.4822,0.4465/0.2023,0.1994,0.2010"),
        (None, "ZCA"),
        ("zca", "'zca' is not standardise, unit, or MEAN/STD"),
        ("0.5", "is not standardise, unit, or MEAN/STD"),
        ("0.5/0.2/0.1", "is not standardise, unit, or MEAN/STD"),
        ("a/b", "is not standardise, unit, or MEAN/STD"),
        ("0.5,0.4/0.2,0.1", "has 2 means and 2 deviations for 1 channels"),
        ("0.5/0", "a deviation that is not above 0"),
        ("0.5/-1", "a deviation that is not above 0"),
        ("nan/1", "not finite"),
    ],
)
def test_normalisation_is_asked_for_and_checked(tmp_path, stated, words):
    file = dc(tmp_path / "a.pt", [pair()])
    with pytest.raises(PotstillError) as caught:
        read(file, DATA, stated)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_says_its_own_normalisation_is_not_contradicted(tmp_path):
    x, y = pair()
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy(), normalisation="0.5/0.25")
    for stated in (None, "0.5/0.25"):
        assert read(tmp_path / "a.npz", DATA, stated)[0].standardise == Standardise((0.5,), (0.25,))
    with pytest.raises(PotstillError, match="normalised by 0.5/0.25; leave --normalisation unit out"):
        read(tmp_path / "a.npz", DATA, "unit")
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy(), normalisation=np.zeros(3))
    with pytest.raises(PotstillError, match="is not standardise, unit, or MEAN/STD"):
        read(tmp_path / "a.npz", DATA)


def test_bytes_that_are_said_to_be_normalised(tmp_path):
    data, raw = data_of((1, 8, 8))
    np.savez(tmp_path / "a.npz", x=raw[:9], y=np.arange(9) % 3)
    with pytest.raises(PotstillError, match="so --normalisation unit"):
        read(tmp_path / "a.npz", data, "0.5/0.5")
    np.savez(tmp_path / "a.npz", x=raw[:9].astype(np.float32), y=np.arange(9) % 3)
    with pytest.raises(PotstillError, match="which are no pixels from 0 to 1"):
        read(tmp_path / "a.npz", data, "unit")


# --- hostile and damaged files


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


class Shell(Bomb):
    def __reduce__(self):
        return (os.system, (f"mkdir {self.target}",))


class Scalar(Bomb):
    """NumPy's own reader of numbers, given a pickle to open."""

    def __reduce__(self):
        return (np.float64(0).__reduce__()[0], (np.dtype("O"), pickle.dumps(Shell(self.target))))


class Array(Bomb):
    def __reduce__(self):
        return (np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"))


class Evaluated(Bomb):
    def __reduce__(self):
        return (eval, (f"__import__('os').mkdir({self.target!r})",))


@pytest.mark.parametrize("kind", [Bomb, Shell, Scalar, Array, Evaluated])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, capsys, npz, kind, form):
    mark, file = tmp_path / "planted", tmp_path / "evil.pt"
    held = {"data": [list(pair())], "accs_all_exps": kind(mark)}
    if form == "plain":
        file.write_bytes(pickle.dumps(held["accs_all_exps"]))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=form == "zip")
    if kind in (Bomb, Shell):  # the trap is a real one
        with open(file, "rb") as f:
            torch.load(f, weights_only=False) if form != "plain" else pickle.load(f)
        assert mark.exists()
        mark.rmdir()
    assert main(["evaluate", str(file), "--data", npz, "--normalisation", "standardise"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("potstill: ") and "\n" not in error and "evil.pt is" in error
    assert not mark.exists()
    if form != "plain" and kind is Shell:
        assert "it wants posix.system to be run" in error
    assert "PyTorch" not in error and "weights_only" not in error, "advice on options that nobody has here"


def test_the_allow_list_holds_only_while_a_file_is_read(tmp_path):
    before = set(torch.serialization.get_safe_globals())  # listed from a set: its order may change, and says nothing
    read(dc(tmp_path / "a.pt", [pair()]), DATA, "standardise")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)
    assert not any(getattr(f[0], "__module__", "").startswith("numpy") for f in foreign.ALLOWED)


def test_hostile_npz(tmp_path):
    mark = tmp_path / "planted"
    np.savez(tmp_path / "a.npz", x=np.array([Shell(mark)], dtype=object), y=np.zeros(1, int))
    with pytest.raises(PotstillError, match=r"a.npz is not a whole .npz of plain arrays"):
        read(tmp_path / "a.npz", DATA, "standardise")
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_cut_of_a_file_is_refused_in_a_line(tmp_path, legacy):
    dc(tmp_path / "a.pt", [pair()], legacy)
    whole = (tmp_path / "a.pt").read_bytes()
    for cut in [0, 1, 7, 100, len(whole) // 2, len(whole) - 40]:
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(PotstillError) as caught:
            read(tmp_path / "cut.pt", DATA, "standardise")
        assert "cut.pt" in str(caught.value) and "\n" not in str(caught.value)
    np.savez(tmp_path / "b.npz", x=pair()[0].numpy(), y=pair()[1].numpy())
    whole = (tmp_path / "b.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(PotstillError, match=r"cut.npz is not a whole .npz"):
            read(tmp_path / "cut.npz", DATA, "standardise")


def test_more_samples_than_memory_behind_them(tmp_path):
    x, _ = pair()
    wide = x[:1].as_strided((10**9, *x.shape[1:]), (0, *x.stride()[1:]))
    torch.save({"data": [[wide, torch.zeros(1, dtype=torch.long).expand(10**9)]]}, tmp_path / "a.pt")
    with pytest.raises(PotstillError, match="fewer inputs than it says"):
        read(tmp_path / "a.pt", DATA, "standardise")


X, Y = pair()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([], "is no set of DC, DSA or DM"),
        ({}, "is no set of DC, DSA or DM"),
        ({"data": []}, "is no set of DC, DSA or DM"),
        ({"data": [[X]]}, "is no set of DC, DSA or DM"),
        ({"data": X}, "is no set of DC, DSA or DM"),
        ({"state_dict": {"w": X}}, "is no set of DC, DSA or DM"),
        (X, "images_NAME.pt with labels_NAME.pt beside it"),
        ({"data": [[X, "labels"]]}, "labels that are no plain array of numbers (str)"),
        ({"data": [[None, Y]]}, "inputs that are no plain array of numbers (NoneType)"),
        ({"data": [[X.to_sparse(), Y]]}, "inputs that are no plain array of numbers"),
        ({"data": [[X + 0j, Y]]}, "inputs that are no plain array of numbers"),
        ({"data": [[X[0, 0, 0, 0], Y]]}, "inputs that are no plain array of numbers"),
        ({"data": [[X.to("meta"), Y]]}, ""),
        ({"data": [[X[:, :, :7], Y]]}, "has inputs of shape (9, 1, 7, 8)"),
        ({"data": [[X.expand(9, 3, 8, 8).clone(), Y]]}, "has inputs of shape (9, 3, 8, 8)"),
        ({"data": [[X[:0], Y[:0]]]}, "has inputs of shape (0, 1, 8, 8)"),
        ({"data": [[X, Y[:-1]]]}, "has 8 labels for 9 inputs"),
        ({"data": [[X, Y + 1]]}, "has labels from 1 to 3; the data have 3 classes"),
        ({"data": [[X, Y - 1]]}, "has labels from -1 to 1"),
        ({"data": [[X, Y + 0.5]]}, "has labels of shape (9,)"),
        ({"data": [[X, torch.eye(4)[Y]]]}, "has labels of shape (9, 4)"),
        ({"data": [[X * float("nan"), Y]]}, "not finite"),
        ({"data": [[X, Y * float("inf")]]}, ""),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, held, words):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(PotstillError) as caught:
        read(tmp_path / "a.pt", DATA, "standardise")
    assert words in str(caught.value) and "a.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_npz_that_lacks_something(tmp_path):
    for arrays, words in [
        ({"x": X, "z": Y}, "lacks y_train or labels or y; it has x, z"),
        ({"y": Y}, "lacks x_train or images or x or data"),
        ({"x": X, "y": Y, "lr": torch.zeros(2, 2)}, "learning rate (lr) that is not one number"),
    ]:
        np.savez(tmp_path / "a.npz", **{k: v.numpy() for k, v in arrays.items()})
        with pytest.raises(PotstillError) as caught:
            read(tmp_path / "a.npz", DATA, "standardise")
        assert words in str(caught.value)


def test_a_number_that_claims_more_than_it_has(tmp_path):
    """A pickle that asks NumPy's reader for an odd type, through the names that are let in."""
    for kind, content in (("V99999999", b"x"), ("O", b"x"), ("f8", b""), ("f8", None), (7, b"12345678")):
        body = b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n"
        body += pickle.dumps((kind, False, True), 2)[2:-1] + b"R" + pickle.dumps(content, 2)[2:-1] + b"\x86R."
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
            z.writestr("a/data.pkl", body)
            z.writestr("a/version", b"3\n")
        with pytest.raises(PotstillError, match="a.pt is"):
            read(tmp_path / "a.pt", DATA, "standardise")
    assert struct.unpack("<d", b"\0" * 8) == (foreign._scalar(foreign._Kind("f8"), b"\0" * 8),)


# --- judged


def test_a_foreign_set_scores_what_the_same_set_of_ours_scores(tmp_path):
    """The same tensors through our own file, DC's, MTT's and a .npz: the same accuracies to the last digit."""
    x, y = pair()
    counts = torch.bincount(y, minlength=3).tolist()
    ours = DistilledSet(x, y, describe_set(DATA, METHODS["random"]("paper"), counts, 0, 0))
    ours.save(tmp_path / "ours.safetensors")
    export_set(ours, "npz", tmp_path / "out")
    dc(tmp_path / "dc.pt", [(x, y), (x, y)])
    mtt(tmp_path / "mtt", x, y)
    t = DATA.transform
    paths = [tmp_path / p for p in ("ours.safetensors", "dc.pt", "mtt", "out/set.npz", "dc.pt#1")]
    lines = []
    results = evaluate(paths, DATA, networks=["mlp-w16"], protocol="dc", repeats=2, say=lines.append,
                       normalisation=f"{t.mean[0]!r}/{t.std[0]!r}")  # fmt: skip
    assert [os.path.basename(r.set) for r in results] == [
        "ours.safetensors",
        "dc.pt#0",
        "dc.pt#1",
        "mtt",
        "set.npz",
        "dc.pt#1",
    ]
    assert all(r.accuracies == results[0].accuracies for r in results) and results[0].accuracy_mean > 0.6
    assert {r.method for r in results} == {"random", "foreign"} and results[1].ipc == ours.meta.ipc
    assert sum("asks for nothing; unless you do, network convnet, protocol dsa" in line for line in lines) == 4


def test_a_wrong_statement_costs_accuracy(tmp_path):
    """What is stated is used: pixels far from where the test data are put teach nothing."""
    file = dc(tmp_path / "a.pt", [pair()])
    right, wrong = (
        evaluate(file, DATA, networks=["mlp-w16"], protocol="dc", repeats=2, normalisation=n)[0].accuracy_mean
        for n in ("standardise", "100/0.001")
    )
    assert right > wrong


def test_what_is_a_foreign_path(tmp_path):
    (tmp_path / "mtt").mkdir()
    assert not is_foreign(tmp_path / "mtt") and not is_foreign("a/set.safetensors") and not is_foreign("runs/x")
    (tmp_path / "mtt" / "images_3.pt").write_bytes(b"")
    assert is_foreign(tmp_path / "mtt") and is_foreign("a.pt") and is_foreign("b.npz") and is_foreign("a.pt#3")
    (tmp_path / "mtt" / "set.safetensors").write_bytes(b"")
    assert not is_foreign(tmp_path / "mtt")
    (tmp_path / "a.pt#1").mkdir()
    assert not is_foreign(tmp_path / "a.pt#1")


def test_baselines_beside_a_set_that_lacks_a_class(tmp_path):
    x, y = pair()
    file = dc(tmp_path / "a.pt", [(x[y > 0], y[y > 0])])
    results = evaluate(file, DATA, networks=["mlp-w8"], protocol="dc", repeats=2, normalisation="standardise",
                       baselines=["random"])  # fmt: skip
    assert [r.method for r in results] == ["foreign", "random"] and results[0].ipc[0] == 0
    assert results[0].images == results[1].images == int((y > 0).sum())


def test_the_command(tmp_path, capsys, npz):
    file = dc(tmp_path / "res.pt", [pair(0), pair(1)])
    out = str(tmp_path / "r.json")
    fast = ["--networks", "mlp-w8", "--repeats", "2", "--compile", "off"]
    assert main(["evaluate", file, "--data", npz, "--normalisation", "standardise", *fast, "--json", out]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(r["set"], r["protocol"], r["dataset"]) for r in rows] == [(f"{file}#{i}", "dsa", "toy") for i in range(2)]
    assert "asks for nothing" in capsys.readouterr().out
    for arguments, words in [
        ([file, "--normalisation", "standardise"], "--data is needed with"),
        ([file, "--data", npz], "--normalisation is needed"),
        ([file, "--data", npz, "--normalisation", "zca"], "'zca' is not standardise"),
        ([file, "--data", "digits", "--normalisation", "standardise", "--networks", "nope"], "no network 'nope'"),
        ([file + "#7", "--data", npz, "--normalisation", "standardise"], "there is no number 7"),
        ([str(tmp_path / "no.pt"), "--data", npz], "no set at"),
        ([str(tmp_path), "--data", npz, "--normalisation", "unit"], "--normalisation is for other projects' files"),
    ]:
        assert main(["evaluate", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("potstill: ") and "\n" not in error and words in error
    assert isinstance(potstill.load_data(npz), Data)


def test_data_of_another_scale(tmp_path):
    """Digits are in sixteenths: 0 to 1 after division by the data's own scale."""
    data = potstill.load_data("digits")
    x, y = data.train.inputs[:20].float() / 16, data.train.labels[:20]
    torch.save({"data": [[x, y]]}, tmp_path / "a.pt")
    (made,) = read(tmp_path / "a.pt", data, "unit")
    assert torch.allclose(made.inputs, data.prepare(data.train.inputs[:20]), atol=1e-6)
    assert not made.meta.mirror
