"""Data sets: what is accepted, what is refused and how, the transform, the split, files that are damaged or absent."""

import hashlib
import os
import pickle
import socket
import struct
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import loaders as module
from potstill.data import Data, load_data, stratified
from potstill.errors import PotstillError
from potstill.functional import Key
from potstill.loaders import LOADERS, shown
from potstill.transforms import Standardise

REAL = Path(os.environ.get("POTSTILL_DATA") or "/nonexistent")
real = pytest.mark.skipif(not (REAL / "FashionMNIST" / "raw").is_dir(), reason="POTSTILL_DATA has no FashionMNIST/raw")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def arrays(*shape, n=24, classes=3, seed=0):
    """Training and test arrays of a given shape per sample."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return rng.random((n, *shape), dtype=np.float32), y, rng.random((n // 2, *shape), dtype=np.float32), y[: n // 2]


def refused(*parts, **options):
    with pytest.raises(PotstillError) as caught:
        Data.from_arrays(*parts, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- digits


def test_digits():
    data = load_data("digits")
    assert data.shape == (1, 8, 8) and data.train.inputs.dtype == torch.uint8 and data.scale == 16
    assert len(data.train) + len(data.test) == 1797 and len(data.heldout) == 0
    assert data.class_names == tuple("0123456789") and data.task.outputs == 10
    share = torch.bincount(data.test.labels) / (torch.bincount(data.test.labels) + data.counts)
    assert len(share) == 10 and (share - 0.2).abs().max() < 0.005
    assert not data.mirror  # a mirrored 2 is no 2
    x = data.prepare(data.train.inputs)
    assert x.dtype == torch.float32 and abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-4
    assert data.describe()["train"] == len(data.train)


def test_digits_are_the_same_every_time():
    a = load_data("digits")
    torch.manual_seed(1), np.random.seed(1)
    b = load_data("digits")
    assert a.fingerprint == b.fingerprint and torch.equal(a.test.inputs, b.test.inputs)
    assert torch.equal(a.train.labels, b.train.labels)


def test_fingerprint_sees_every_part():
    x, y, tx, ty = arrays(5)
    first = Data.from_arrays(x, y, tx, ty)
    assert Data.from_arrays(x.copy(), y, tx, ty, name="other").fingerprint == first.fingerprint
    assert Data.from_arrays(x.astype(np.float64), y, tx, ty).fingerprint == first.fingerprint
    marks = {first.fingerprint}
    for i in range(4):
        parts = [p.copy() for p in (x, y, tx, ty)]
        parts[i][0], parts[i][1] = parts[i][1].copy(), parts[i][0].copy()
        marks.add(Data.from_arrays(*parts).fingerprint)
    marks.add(Data.from_arrays(x.reshape(-1, 5, 1), y, tx.reshape(-1, 5, 1), ty).fingerprint)
    assert len(marks) == 6


# --- what is held out


def ragged_data():
    """Classes of 10, 31, 1 and 7 samples, every sample known by its first feature."""
    y = np.repeat([0, 1, 2, 3], [10, 31, 1, 7])
    x = np.stack([np.arange(49.0), np.random.default_rng(0).random(49)], 1)
    return Data.from_arrays(x, y, x, y)


@pytest.mark.parametrize(("fraction", "counts"), [(0.1, [1, 3, 0, 1]), (0.5, [5, 16, 0, 4]), (0, [0, 0, 0, 0])])
def test_hold_out_is_stratified_and_disjoint(fraction, counts):
    data = ragged_data()
    held = data.hold_out(fraction)
    got = torch.bincount(held.heldout.labels, minlength=4).tolist()
    assert got == counts
    train, out = (set(s.inputs[:, 0].tolist()) for s in (held.train, held.heldout))
    assert not train & out and train | out == set(range(49))
    assert held.counts.tolist() == [n - m for n, m in zip([10, 31, 1, 7], counts, strict=True)]
    assert held.fingerprint == data.fingerprint and held.transform == data.transform
    assert torch.equal(held.test.inputs, data.test.inputs) and len(data.heldout) == 0 and len(data.train) == 49
    for split in (held.train, held.heldout):  # inputs and labels still belong together
        assert torch.equal(split.labels, data.train.labels[split.inputs[:, 0].long()])


def test_hold_out_is_the_same_part_every_time():
    first = ragged_data().hold_out(0.2)
    torch.manual_seed(99), np.random.seed(99)
    again = ragged_data().hold_out(0.2)
    assert torch.equal(first.heldout.inputs, again.heldout.inputs) and len(first.heldout) > 0


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0, 10, float("nan"), float("inf")])
def test_hold_out_refuses_other_fractions(fraction):
    with pytest.raises(PotstillError, match=r"--holdout .* 0 and 0\.5"):
        ragged_data().hold_out(fraction)


def test_stratified_leaves_one_of_each():
    groups = torch.tensor([0] * 4 + [1] + [2] * 2)
    mask = stratified(groups, 1.0, Key(0))
    assert torch.bincount(groups[~mask], minlength=3).tolist() == [1, 1, 1]
    assert not torch.equal(stratified(groups.repeat(9), 0.5, Key(0)), stratified(groups.repeat(9), 0.5, Key(1)))


# --- the transform


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 4, 4), (7,)])
@pytest.mark.parametrize("bytes_", [True, False])
def test_standardise_is_numpys_mean_and_std(shape, bytes_):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5000, *shape)) if bytes_ else rng.normal(3, 2, (5000, *shape))  # more than one part
    x = x.astype(np.uint8 if bytes_ else np.float32)
    scale = 255.0 if bytes_ else 1.0
    made = Standardise.of(torch.from_numpy(x), scale)
    axes = (0, *range(2, x.ndim))
    unit = x.astype(np.float64) / scale
    np.testing.assert_allclose(made.mean, unit.mean(axes), atol=6e-7)
    np.testing.assert_allclose(made.std, unit.std(axes), atol=6e-7)
    u = torch.from_numpy(unit)
    z = made.apply(u)
    np.testing.assert_allclose(
        z.numpy(), (unit - unit.mean(axes, keepdims=True)) / unit.std(axes, keepdims=True), atol=1e-4
    )
    torch.testing.assert_close(made.invert(z), u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.apply(u[None])[0], z, rtol=0, atol=0)  # any leading axes
    torch.testing.assert_close(made.apply(u[0]), z[0], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.7, 1000.1, 1e6 / 3, 1e-9])
def test_a_constant_channel_has_std_one_and_becomes_zero(value):
    """Also where the mean square would cancel in float64."""
    x = np.random.default_rng(0).random((5000, 3), dtype=np.float32)
    x[:, 1] = value
    y = np.arange(5000) % 2
    data = Data.from_arrays(x, y, x, y)
    assert data.transform.std[1] == 1 and 0.2 < data.transform.std[0] < 0.4
    z = data.prepare(data.train.inputs)
    assert z.isfinite().all() and z[:, 1].abs().max() <= 1e-6 + 1e-6 * abs(value)


@pytest.mark.parametrize("unit", [1e-9, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_the_unit_of_a_feature_does_not_matter(unit, offset):
    """A feature in seconds or in nanoseconds is standardised alike."""
    x = ((np.random.default_rng(0).normal(size=(500, 2)) + offset) * unit).astype(np.float32)
    y = np.arange(500) % 2
    data = Data.from_arrays(x, y, x, y)
    z = data.prepare(data.train.inputs).double()
    assert float(z.mean(0).abs().max()) < 2e-4 and float((z.std(0) - 1).abs().max()) < 2e-3


def test_display_is_the_picture_again():
    x = np.random.default_rng(0).integers(0, 256, (30, 6, 6), dtype=np.uint8)
    y = np.arange(30) % 2
    data = Data.from_arrays(x, y, x, y)
    torch.testing.assert_close(
        data.display(data.prepare(data.train.inputs))[:, 0], torch.from_numpy(x) / 255, rtol=0, atol=1e-6
    )
    floats = Data.from_arrays(x * 3.0 - 50, y, x * 3.0 - 50, y)
    shown_ = floats.display(floats.prepare(floats.train.inputs))
    assert float(shown_.min()) == pytest.approx(0, abs=1e-5) and float(shown_.max()) == pytest.approx(1, abs=1e-5)


# --- from_arrays: what is accepted


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((6,), (6,)),
        ((6, 5), (1, 6, 5)),
        ((3, 8, 9), (3, 8, 9)),
        ((8, 9, 3), (3, 8, 9)),
        ((1, 28, 28), (1, 28, 28)),
        ((28, 28, 1), (1, 28, 28)),
        ((5, 4, 8), (5, 4, 8)),
        ((32, 40, 4), (4, 32, 40)),
    ],
)
def test_shapes(given, shape):
    x, y, tx, ty = arrays(*given)
    data = Data.from_arrays(x, y, tx, ty)
    assert data.shape == shape
    wanted = x.transpose(0, 3, 1, 2) if len(given) == 3 and shape != given else x.reshape(len(x), *shape)
    assert np.array_equal(data.train.inputs.numpy(), wanted) and data.train.inputs.is_contiguous()
    assert torch.equal(data.train.labels, torch.from_numpy(y)) and data.test.labels.dtype == torch.int64


@pytest.mark.parametrize("given", [(8, 9, 8), (3, 9, 3), (2, 9, 4), (4, 4, 3), (64, 64, 64), (40, 9, 33)])
def test_ambiguous_axes_are_refused(given):
    x, y, tx, ty = arrays(*given)
    text = refused(x, y, tx, ty)
    assert "x_train" in text and str(x.shape) in text and "channels" in text


@pytest.mark.parametrize(
    ("dtype", "kept", "scale"),
    [
        (np.uint8, torch.uint8, 255),
        (bool, torch.uint8, 255),
        (np.int64, torch.float32, 1),
        (np.int8, torch.float32, 1),
        (np.uint16, torch.float32, 1),
        (np.float16, torch.float32, 1),
        (np.float32, torch.float32, 1),
        (np.float64, torch.float32, 1),
        (np.longdouble, torch.float32, 1),
        (">f4", torch.float32, 1),
        (">i4", torch.float32, 1),
    ],
)
def test_types(dtype, kept, scale):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2 if dtype is bool else 100, (12, 5)).astype(dtype)
    y = np.arange(12) % 3
    data = Data.from_arrays(x, y, x, y)
    assert data.train.inputs.dtype == kept and data.scale == scale
    unit = x.astype(np.float64) / (1 if dtype is bool else scale)
    np.testing.assert_allclose(data.train.inputs.double().numpy() / scale, unit)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64, torch.bfloat16, torch.bool])
def test_tensors(dtype):
    x, y = (torch.arange(60).view(12, 5) % 2).to(dtype), torch.arange(12) % 3
    data = Data.from_arrays(x, y, x, y)
    assert torch.equal(data.train.inputs.float() / data.scale * (255 if dtype == torch.uint8 else 1), x.float())
    assert torch.equal(data.train.labels, y)


def test_lists_read_only_and_strided_arrays():
    x, y = [[1.0, 2.0], [3.0, 5.0]], ["a", "b"]
    assert Data.from_arrays(x, y, x, y).train.inputs.tolist() == x
    fixed = np.frombuffer(bytes(range(40)), np.uint8).reshape(10, 4)
    every = np.arange(160, dtype=np.float32).reshape(20, 8)[::2, ::-2]
    for given in (fixed, every):
        data = Data.from_arrays(given, np.arange(10) % 2, given, np.arange(10) % 2)
        assert np.array_equal(data.train.inputs.numpy(), given)


def test_a_requires_grad_tensor_is_only_read():
    x = torch.rand(6, 3, requires_grad=True)
    data = Data.from_arrays(x, [0, 1] * 3, x, [0, 1] * 3)
    assert not data.train.inputs.requires_grad and torch.equal(data.train.inputs, x.detach())


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["dog", "cat", "eel"], ("cat", "dog", "eel")),
        ([10, -3, 7], ("-3", "7", "10")),
        ([2.0, 0.0, 5.0], ("0", "2", "5")),
        ([b"dog", b"cat", b"eel"], ("cat", "dog", "eel")),
        (np.array([3, 1, 2], np.uint8), ("1", "2", "3")),
        (torch.tensor([30, 10, 20]), ("10", "20", "30")),
    ],
)
def test_labels_of_any_kind_become_classes_in_sorted_order(values, names):
    x, y, tx, ty = arrays(4)
    order = np.argsort(np.argsort(np.asarray(values)))
    values = values if isinstance(values, torch.Tensor) else np.asarray(values)
    data = Data.from_arrays(x, values[y], tx, values[ty])
    assert data.class_names == names and data.task.classes == 3
    assert np.array_equal(data.train.labels.numpy(), order[y]) and np.array_equal(data.test.labels.numpy(), order[ty])


def test_two_classes_as_booleans_and_a_column_of_labels():
    x, y, tx, ty = arrays(4, classes=2)
    assert Data.from_arrays(x, y == 1, tx, ty == 1).class_names == ("False", "True")
    data = Data.from_arrays(x, y[:, None], tx, ty[:, None])
    assert torch.equal(data.train.labels, torch.from_numpy(y))


def test_class_names_scale_name_and_mirror_as_given():
    x, y, tx, ty = arrays(4)
    data = Data.from_arrays(x, y, tx, ty, name="mine", class_names=["p", "q", "r"], scale=2.0, mirror=False)
    assert (data.name, data.class_names, data.scale, data.mirror) == ("mine", ("p", "q", "r"), 2.0, False)
    np.testing.assert_allclose(data.transform.mean, (x / 2).mean(0), atol=1e-6)
    assert "2 class names for 3 classes" in refused(x, y, tx, ty, class_names=["p", "q"])


def test_test_data_may_lack_a_class():
    x, y, tx, ty = arrays(4)
    data = Data.from_arrays(x, y, tx[ty < 2], ty[ty < 2])
    assert data.task.classes == 3 and int(data.test.labels.max()) == 1


# --- from_arrays: what is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_a_value_that_is_not_finite_is_named_with_its_sample(bad, where):
    parts = list(arrays(4, 4))
    parts[where][5, 2, 1] = bad
    parts[where][9, 0, 0] = bad
    text = refused(*parts)
    assert ("x_train", "x_test")[where // 2] in text and "sample 5" in text


def test_numbers_too_large_for_float32_are_not_finite():
    x, y, tx, ty = arrays(4)
    x = x.astype(np.float64)
    x[3, 1] = 1e300
    assert "sample 3" in refused(x, y, tx, ty)


def parts_with(**changed):
    parts = dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays(4), strict=True))
    return tuple((parts | changed).values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"y_train": np.full(24, 7)}, ["y_train", "one class only (7)"]),
        ({"y_test": np.arange(12)}, ["y_test", "lacks", "3, 4, 5"]),
        ({"y_train": np.zeros(23, int)}, ["y_train", "23 labels for 24 samples"]),
        ({"y_test": np.zeros(13, int)}, ["y_test", "13 labels for 12 samples"]),
        ({"x_test": np.zeros((12, 5))}, ["x_train", "(4,)", "x_test", "(5,)"]),
        ({"x_test": np.zeros((12, 4, 4))}, ["(4,)", "(1, 4, 4)"]),
        ({"x_train": np.zeros(24)}, ["x_train", "(24,)"]),
        ({"x_train": np.zeros((24, 1, 1, 1, 4))}, ["x_train", "(24, 1, 1, 1, 4)"]),
        ({"x_train": np.zeros((0, 4)), "y_train": []}, ["x_train", "(0, 4)"]),
        ({"x_test": np.zeros((0, 4)), "y_test": []}, ["x_test", "(0, 4)"]),
        ({"x_train": np.zeros((24, 4), object)}, ["x_train", "object", "numbers"]),
        ({"x_train": np.full((24, 4), "a")}, ["x_train", "numbers"]),
        ({"x_train": np.zeros((24, 4), complex)}, ["x_train", "complex128"]),
        ({"x_train": None}, ["x_train", "object"]),
        ({"x_train": [[1.0, 2.0], [3.0]]}, ["x_train", "no regular array"]),
        ({"y_train": np.array([None] * 24)}, ["y_train", "object"]),
        ({"y_train": np.arange(24) + 0.5}, ["y_train", "float64", "one class per sample"]),
        ({"y_train": np.full(24, np.nan)}, ["y_train", "float64"]),
        ({"y_train": np.eye(24, 3)}, ["y_train", "(24, 3)", "one class per sample"]),
        ({"y_train": 3}, ["y_train", "()"]),
    ],
)
def test_refusals_name_the_argument_and_its_value(changed, words):
    text = refused(*parts_with(**changed))
    assert all(word in text for word in words), text


def test_numbers_and_their_texts_are_not_taken_for_the_same_class():
    """ "10" sorts before "2": whatever is done with such labels, it is not a silent reordering."""
    x, _, tx, _ = arrays(4)
    y = np.arange(24) % 12
    try:
        data = Data.from_arrays(x, y, tx, y[:12].astype(str))
    except PotstillError as error:
        assert "y_test" in str(error)
    else:
        assert data.test.labels.tolist() == y[:12].tolist()


# --- npz


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "made.npz"
    np.savez_compressed(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays(4, 4), strict=True)))
    return path


def refused_file(path):
    with pytest.raises(PotstillError) as caught:
        load_data(path)
    text = str(caught.value)
    assert path.name in text and "\n" not in text
    return text


def test_npz(npz):
    x, y, tx, ty = arrays(4, 4)
    data, direct = load_data(npz), Data.from_arrays(x, y, tx, ty)
    assert data.name == "made" and data.fingerprint == direct.fingerprint
    assert load_data(str(npz)).shape == (1, 4, 4)


def test_npz_with_missing_arrays_names_them(tmp_path):
    x, y, _, _ = arrays(4)
    np.savez(tmp_path / "part.npz", x_train=x, y_train=y, other=y)
    text = refused_file(tmp_path / "part.npz")
    assert "lacks x_test, y_test" in text and "other" in text


def test_npz_truncated_or_damaged_anywhere(npz):
    whole = npz.read_bytes()
    for size in [0, 1, 3, 4, 10, 100, *range(150, len(whole), 97), len(whole) - 1]:
        npz.write_bytes(whole[:size])
        refused_file(npz)
    outcomes = set()
    for place in range(0, len(whole), 7):  # one flipped bit: refused, or one that the format does not look at
        npz.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            outcomes.add(load_data(npz).fingerprint)
        except PotstillError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    npz.write_bytes(whole)
    assert outcomes == {"refused", load_data(npz).fingerprint}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello, world", b"\x93NUMPY"])
def test_npz_that_is_no_zip(tmp_path, content):
    (tmp_path / "odd.npz").write_bytes(content)
    assert "not a whole .npz" in refused_file(tmp_path / "odd.npz")


def test_npy_by_the_name_of_npz(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "not a whole .npz" in refused_file(tmp_path / "one.npz")


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_is_refused_and_not_run(tmp_path, inside):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.npz"
    if inside:
        _, y, tx, ty = arrays(4)
        np.savez(path, x_train=np.array([Trap(sprung)], dtype=object), y_train=y, x_test=tx, y_test=ty)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    assert "not a whole .npz of plain arrays" in refused_file(path)
    assert not sprung.exists()
    if inside:
        with np.load(path, allow_pickle=True) as file:
            file["x_train"]
        assert sprung.exists()  # the trap works


def test_names_and_paths_that_do_not_exist(tmp_path):
    with pytest.raises(PotstillError, match="no data set 'digit'; did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(PotstillError, match="no data set 'fashion_mnist'; did you mean 'fashion-mnist'"):
        load_data("fashion_mnist")
    with pytest.raises(PotstillError, match=r"no file .*gone\.npz"):
        load_data(tmp_path / "gone.npz")
    assert set(LOADERS) >= {"digits", "mnist", "fashion-mnist"}


# --- Fashion-MNIST


@real
def test_fashion_mnist():
    data = load_data("fashion-mnist", REAL)
    assert (len(data.train), len(data.test), data.shape) == (60000, 10000, (1, 28, 28))
    assert data.transform.mean[0] == pytest.approx(0.2861, abs=1e-4)
    assert data.transform.std[0] == pytest.approx(0.3530, abs=1e-4)
    assert data.counts.tolist() == [6000] * 10 and data.mirror
    assert data.class_names[0] == "T-shirt/top" and data.class_names[9] == "Ankle boot"
    assert data.train.inputs.dtype == torch.uint8
    digest = hashlib.sha256(data.test.inputs.numpy().tobytes()).hexdigest()
    raw = (REAL / "FashionMNIST" / "raw" / IDX[2]).read_bytes()[16:]
    assert digest == hashlib.sha256(raw).hexdigest()
    held = data.hold_out(0.1)
    assert torch.bincount(held.heldout.labels).tolist() == [600] * 10 and len(held.train) == 54000


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small(tmp_path):
    """A folder laid out as torchvision's Fashion-MNIST, of 20 and 20 images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for name, array in zip(IDX, [images, np.arange(20, dtype=np.uint8) % 10] * 2, strict=True):
        (raw / name).write_bytes(idx(array))
    return tmp_path


@pytest.fixture
def no_mirror(monkeypatch):
    """Downloads go to a closed port of this machine."""
    from torchvision.datasets import FashionMNIST

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("name", IDX)
def test_a_truncated_file_is_one_clear_error(small, no_mirror, name):
    assert load_data("fashion-mnist", small).shape == (1, 28, 28)
    path = small / "FashionMNIST" / "raw" / name
    whole = path.read_bytes()
    for size in (0, 2, 4, 7, 8, 15, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(PotstillError) as caught:
            load_data("fashion-mnist", small)
        text = str(caught.value)
        assert "fashion-mnist" in text and "cannot be read" in text and "FashionMNIST/raw" in text and "\n" not in text
        assert path.read_bytes() == whole[:size]


def test_images_without_their_labels(small):
    path = small / "FashionMNIST" / "raw" / IDX[1]
    path.write_bytes(idx(np.arange(19, dtype=np.uint8) % 10))
    with pytest.raises(PotstillError, match="different number of images and labels"):
        load_data("fashion-mnist", small)


@pytest.mark.parametrize("some", [False, True])
def test_absent_data_and_no_network_name_the_four_files(small, no_mirror, some, monkeypatch):
    if some:
        (small / "FashionMNIST" / "raw" / IDX[2]).unlink()
    root = small if some else small / "elsewhere"
    monkeypatch.setenv("POTSTILL_DATA", str(root))
    start, timeout = time.monotonic(), socket.getdefaulttimeout()
    with pytest.raises(PotstillError) as caught:
        load_data("fashion-mnist")
    text = str(caught.value)
    assert time.monotonic() - start < 30
    assert all(name in text for name in IDX) and "$POTSTILL_DATA/FashionMNIST/raw" in text and str(root) not in text
    assert socket.getdefaulttimeout() == timeout and "\n" not in text


def test_a_server_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        start = time.monotonic()
        with pytest.raises(PotstillError, match="nothing arrived for 1 s") as caught:
            module._download(lambda: opener.open(url), "fashion-mnist", tmp_path / "FashionMNIST" / "raw", patience=1)
        assert 0.9 < time.monotonic() - start < 5
        assert all(name in str(caught.value) for name in IDX)


def test_a_slow_download_that_grows_is_waited_for(tmp_path):
    def slow():
        for i in range(5):
            time.sleep(0.3)
            (tmp_path / "file").write_bytes(b"x" * (i + 1))

    start = time.monotonic()
    module._download(slow, "mnist", tmp_path, patience=0.8)
    assert time.monotonic() - start >= 1.4 and (tmp_path / "file").stat().st_size == 5


# --- paths


@pytest.mark.parametrize(
    ("root", "path", "text"),
    [
        ("/data", "/data/FashionMNIST/raw", "$POTSTILL_DATA/FashionMNIST/raw"),
        ("/data/", "/data", "$POTSTILL_DATA"),
        ("/data", "/data2/x", "/data2/x"),
        ("/data", "/mnt/data/x", "/mnt/data/x"),
        (None, "/data/x", "/data/x"),
        ("", "/data/x", "/data/x"),
    ],
)
def test_the_data_root_is_shown_by_its_name(monkeypatch, root, path, text):
    if root is None:
        monkeypatch.delenv("POTSTILL_DATA", raising=False)
    else:
        monkeypatch.setenv("POTSTILL_DATA", root)
    assert shown(Path(path)) == text
