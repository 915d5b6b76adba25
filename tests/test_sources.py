"""Data from folders of images, tables, published layouts and datasets; the cache of what is decoded; names."""

import builtins
import errno
import json
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_exchange import set_of
from torch.utils.data import Dataset, TensorDataset

from potstill import distill, export_set, load_data, loaders, pictures
from potstill.cli import main
from potstill.data import Data, holdout_order
from potstill.errors import PotstillError
from potstill.loaders import load_named

REAL = Path(os.environ.get("POTSTILL_DATA") or "/nonexistent")


def picture(rng, size=(10, 14), mode="RGB"):
    """An image of a given size (height, width)."""
    depth = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (*size, *depth), dtype=np.uint8))


def make(folder, counts={"cat": 5, "dog": 9, "eel": 3}, test="test", suffix="png", mode="RGB", size=(10, 14)):  # noqa: B006
    """A folder of images with unequal classes; returns the training pixels (N, C, H, W) in order of names."""
    rng, kept = np.random.default_rng(0), []
    for part in ("train", test):
        for c, n in counts.items():
            (folder / part / c).mkdir(parents=True)
            for i in range(n if part == "train" else 2):
                image = picture(rng, size, mode)
                image.save(folder / part / c / f"{i:02}.{suffix}")
                if part == "train":
                    array = np.asarray(image)
                    kept.append(array[None] if mode == "L" else array.transpose(2, 0, 1))
    return np.stack(kept)


def refused(source, root=None):
    with pytest.raises(PotstillError) as caught:
        load_data(source, root)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def own(tmp_path):
    """A folder of images."""
    make(tmp_path / "pets")
    return tmp_path / "pets"


# --- folders


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 4)])
@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_rectangles_with_unequal_classes(tmp_path, mode, channels, test):
    x = make(tmp_path / "pets", mode=mode, test=test)
    data = load_data(tmp_path / "pets")
    assert data.shape == (channels, 10, 14) and data.counts.tolist() == [5, 9, 3] and len(data.test) == 6
    assert data.class_names == ("cat", "dog", "eel") and data.name == "pets" and data.scale == 255
    np.testing.assert_allclose(data.transform.mean, (x / 255).mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.transform.std, (x / 255).std((0, 2, 3)), atol=1e-6)
    # every picture once, with its label
    want = {(a.tobytes(), y) for a, y in zip(x, np.repeat([0, 1, 2], [5, 9, 3]), strict=True)}
    train = data.train
    assert {(a.numpy().tobytes(), int(y)) for a, y in zip(train.inputs, train.labels, strict=True)} == want


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "bmp", "webp", "tif", "PNG", "gif"])
def test_formats_of_pictures(tmp_path, suffix):
    make(tmp_path / "pets", suffix=suffix)
    data = load_data(tmp_path / "pets")
    with Image.open(tmp_path / "pets" / "test" / "cat" / f"00.{suffix}") as image:
        assert np.array_equal(data.test.inputs[0].numpy(), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_what_file_managers_leave_is_not_seen(own):
    for name in (".DS_Store", "Thumbs.db"):
        (own / "train" / "cat" / name).write_bytes(b"x")
    (own / ".git").mkdir()
    assert load_data(own).counts.tolist() == [5, 9, 3]


def test_an_image_that_does_not_decode_is_named(own):
    path = own / "train" / "dog" / "04.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "pets: train/dog/04.png cannot be decoded" in refused(own)
    path.write_bytes(b"no picture")
    assert "pets: train/dog/04.png cannot be decoded" in refused(own)


def test_the_first_of_several_odd_images_is_named(tmp_path):
    make(tmp_path / "pets", counts={"cat": 300, "dog": 300}, size=(4, 4))
    for name in ("dog/290", "dog/10", "cat/299"):
        (tmp_path / "pets" / "train" / f"{name}.png").write_bytes(b"")
    assert "train/cat/299.png" in refused(tmp_path / "pets")


@pytest.mark.parametrize(
    ("size", "mode", "words"),
    [((14, 10), "RGB", "10x14 RGB"), ((10, 14), "L", "14x10 grey"), ((10, 14), "RGBA", "14x10 RGBA")],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_mixed_sizes_and_modes_name_the_first_odd_file(own, size, mode, words, part):
    picture(np.random.default_rng(1), size, mode).save(own / part / "eel" / "01.png")
    text = refused(own)
    assert f"{part}/eel/01.png is {words}" in text and "train/cat/00.png is 14x10 RGB" in text and "equal" in text


def test_a_mode_that_is_not_taken_says_which_are(own):
    Image.new("CMYK", (14, 10)).save(own / "train" / "cat" / "01.tif")
    text = refused(own)
    assert "train/cat/01.tif has mode CMYK" in text and "RGB" in text


def test_an_empty_class_folder_is_named(own):
    (own / "train" / "fox").mkdir()
    assert "class folder train/fox is empty" in refused(own)


@pytest.mark.parametrize(("where", "lacks"), [("test", "train"), ("train", "test")])
def test_classes_that_differ_are_named(own, where, lacks):
    (own / where / "fox").mkdir()
    picture(np.random.default_rng(0)).save(own / where / "fox" / "0.png")
    text = refused(own)
    assert f"{where}/ has the class folder 'fox' that {lacks}/ lacks" in text


def test_other_layouts_are_refused_with_what_is_needed(own, tmp_path):
    (own / "train" / "cat" / "more").mkdir()
    assert "train/cat/more is a folder in a class folder" in refused(own)
    (own / "train" / "cat" / "more").rmdir()
    (own / "train" / "cat" / "notes.txt").write_text("x")
    assert "train/cat/notes.txt is no image" in refused(own)
    (own / "train" / "cat" / "notes.txt").unlink()
    (own / "train" / "stray.png").write_text("x")
    assert "train/stray.png is no class folder" in refused(own)
    (own / "train" / "stray.png").unlink()
    (own / "test").rename(own / "later")
    assert "neither test/ nor val/" in refused(own)
    make(tmp_path / "one", counts={"cat": 3})
    assert "one class folder only (cat)" in refused(tmp_path / "one")
    (tmp_path / "none").mkdir()
    assert "is no data set" in refused(tmp_path / "none")
    (tmp_path / "file.txt").write_text("x")
    assert "is no data set" in refused(tmp_path / "file.txt")
    assert "no file or folder" in refused(tmp_path / "gone")
    assert "no data set" in refused("x" * 5000) and "no data set" in refused("a\0b")


@pytest.mark.parametrize("kind", ["file", "class", "part"])
def test_links_out_of_the_folder_are_refused(own, tmp_path, kind):
    outside = tmp_path / "outside"
    make(outside)
    if kind == "file":
        (own / "train" / "cat" / "99.png").symlink_to(outside / "train" / "cat" / "00.png")
    elif kind == "class":
        (own / "train" / "fox").symlink_to(outside / "train" / "cat")
    else:
        (own / "test").rename(tmp_path / "aside")
        (own / "test").symlink_to(outside / "test")
    assert "is a link out of the data set's folder" in refused(own)


def test_links_within_the_folder_and_to_it_are_harmless(own, tmp_path):
    (own / "train" / "cat" / "99.png").symlink_to(own / "train" / "cat" / "00.png")
    (tmp_path / "alias").symlink_to(own)
    assert load_data(tmp_path / "alias").counts.tolist() == [6, 9, 3]
    (own / "train" / "cat" / "99.png").unlink()
    (own / "train" / "cat" / "98.png").symlink_to(own / "gone.png")
    assert "a link to nothing" in refused(own)


def test_a_name_with_a_line_break_stays_in_one_line(own):
    (own / "train" / "cat" / "a\nb.png").write_bytes(b"")
    assert "a\\nb.png" in refused(own)


# --- the cache


@pytest.fixture
def decoded(monkeypatch):
    """Counts what is decoded."""
    calls, lock, decode = [], threading.Lock(), pictures.decode

    def counting(content, convert=None):
        with lock:
            calls.append(content)
        return decode(content, convert)

    monkeypatch.setattr(pictures, "decode", counting)
    return calls


def test_the_cache_is_used_again_and_made_anew_on_a_change(own, decoded):
    first = load_data(own)
    assert len(decoded) == 24  # 17 and 6, and the first once more for its size
    again = load_data(own)
    assert len(decoded) == 24 and again.fingerprint == first.fingerprint and again.transform == first.transform
    assert torch.equal(again.train.inputs, first.train.inputs) and again.class_names == first.class_names
    path = own / "train" / "cat" / "00.png"
    stat = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_data(own).fingerprint == first.fingerprint and len(decoded) == 48
    path.unlink()
    assert load_data(own).counts.tolist() == [4, 9, 3] and len(decoded) == 71
    cache = Path(os.environ["POTSTILL_CACHE"]) / "decoded"
    assert len(list(cache.iterdir())) == 1  # the older ones are gone


def test_a_cache_that_is_not_whole_is_never_used(own, decoded):
    first = load_data(own)
    (folder,) = (Path(os.environ["POTSTILL_CACHE"]) / "decoded").iterdir()
    for i, name in enumerate([*pictures.FILES, "known.json"], 1):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        again = load_data(own)
        assert len(decoded) == 24 * (i + 1) and again.fingerprint == first.fingerprint
        assert torch.equal(again.test.inputs, first.test.inputs)


def test_an_error_or_interrupt_leaves_no_cache(own, monkeypatch):
    def stop(content, convert=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            load_data(own)
    assert not list((Path(os.environ["POTSTILL_CACHE"]) / "decoded").iterdir())
    assert len(load_data(own).train) == 17


def test_a_cache_that_cannot_be_written_is_one_line(own, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    assert "POTSTILL_CACHE names another place" in refused(own)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved here")
@pytest.mark.parametrize("at", range(4))  # inputs and hashes of train and test
def test_a_disk_that_is_full_is_one_line_and_leaves_no_cache(own, tmp_path, monkeypatch, capsys, at):
    """Room is taken before pictures are put into mapped files: a page without any would kill the process."""
    reserve, taken = os.posix_fallocate, []

    def full(handle, start, size):
        taken.append((start, size) == (0, os.fstat(handle).st_size))
        if len(taken) - 1 == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(handle, start, size)

    command = ["distill", str(own), "--method", "random", "--no-evaluate", "--out", str(tmp_path / "run")]
    cache = Path(os.environ["POTSTILL_CACHE"]) / "decoded"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert main(command) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"cannot be kept in {cache} (No space left on device)" in error[0]
    assert taken == [True] * (at + 1) and not list(cache.iterdir())
    assert main(command) == 0
    assert len(list(cache.iterdir())) == 1 and len(load_data(own).train) == 17


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_where_no_room_can_be_reserved_pictures_are_decoded_all_the_same(own, monkeypatch, number):
    def lacks(handle, start, size):
        raise OSError(number, os.strerror(number))

    if number is None:  # macOS
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", lacks, raising=False)
    assert len(load_data(own).train) == 17


def test_mapped_inputs_give_the_same_batches(own, monkeypatch):
    read = load_data(own)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "MAPPED_SHARE", 0.0)
        kinds, load = [], np.load
        patch.setattr(np, "load", lambda *a, **k: (kinds.append(k.get("mmap_mode")), load(*a, **k))[1])
        mapped = load_data(own)
    assert kinds == ["c", None, "c", None]
    index = torch.tensor([3, 0, 16, 3])
    for a, b in ((read, mapped), (read.hold_out(0.3), mapped.hold_out(0.3))):
        assert torch.equal(
            a.prepare(a.train.inputs[index % len(a.train)]), b.prepare(b.train.inputs[index % len(b.train)])
        )
        assert torch.equal(a.heldout.inputs, b.heldout.inputs) and torch.equal(a.train.labels, b.train.labels)
    runs = [
        distill(
            d,
            "dm",
            steps=2,
            preset="small",
            network="convnet-w8-d1",
            holdout=0,
            evaluate=False,
            out=own.parent / str(i),
        )
        for i, d in enumerate((read, mapped))
    ]
    assert torch.equal(runs[0].set.inputs, runs[1].set.inputs)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5])
def test_what_is_held_out_is_the_end_and_no_copy(tmp_path, fraction):
    make(tmp_path / "pets", counts={"cat": 31, "dog": 10, "eel": 2}, size=(4, 6))
    data = load_data(tmp_path / "pets")
    held = data.hold_out(fraction)
    assert held.train.inputs.data_ptr() == data.train.inputs.data_ptr()
    assert torch.bincount(held.heldout.labels, minlength=3).tolist() == [round(fraction * n) for n in (31, 10, 2)]
    assert torch.equal(held.whole.inputs, data.train.inputs) and torch.equal(held.whole.labels, data.train.labels)
    assert held.whole.inputs.data_ptr() == data.train.inputs.data_ptr()
    again = held.hold_out(0.2)
    assert torch.equal(again.heldout.inputs, data.hold_out(0.2).heldout.inputs)


def test_holdout_order_is_a_fixed_order_of_all_rows():
    labels = torch.arange(50) % 3
    order = holdout_order(labels)
    assert order.sort().values.tolist() == list(range(50)) and torch.equal(order, holdout_order(labels))


# --- names that lead back


def test_names_below_the_data_root_lead_back(tmp_path, monkeypatch):
    root = tmp_path / "root"
    make(root / "pets")
    make(root / "lab" / "cells", size=(6, 8))
    make(root / "digits", size=(5, 7))
    x = np.random.default_rng(0).random((20, 5, 12, 20), dtype=np.float32)
    np.savez(root / "toy.npz", x_train=x, y_train=np.arange(20) % 2, x_test=x, y_test=np.arange(20) % 2)
    monkeypatch.chdir(tmp_path)
    for path, name, slug in (
        (root / "pets", "pets", "pets"),
        (root / "lab" / "cells", "lab/cells", "lab-cells"),
        (root / "toy.npz", "toy", "toy"),
        ("root/pets", "pets", "pets"),
        (root / "digits", "./digits", ".-digits"),
    ):
        data = load_data(path, root)
        assert (data.name, data.slug) == (name, slug)
        assert load_named(data.name, root).fingerprint == data.fingerprint
        monkeypatch.setenv("POTSTILL_DATA", str(root))
        assert load_named(data.name).fingerprint == data.fingerprint
        monkeypatch.delenv("POTSTILL_DATA")
    assert load_data(root / "pets", tmp_path / "other").name == "pets"
    toy = load_data("toy", root)
    assert toy.shape == (5, 12, 20) and len(toy.transform.mean) == 5
    np.testing.assert_allclose(toy.transform.mean, x.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(toy.transform.std, x.std((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "a/../../b", "~/x", "hf:../x", "hf:/etc", "C:\\x", "..\\x", "a\nb", "hf:hf:x"]
)
def test_a_name_in_a_set_never_leads_out(tmp_path, name):
    with pytest.raises(PotstillError, match="no name below the data root") as caught:
        load_named(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_set_of_a_folder_is_judged_by_the_data_root_alone(own, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--holdout", "0", "--steps", "1", "--preset", "small", "--network", "convnet-w8-d1", "--repeats", "1"]
    assert main(["distill", str(own), "--out", str(out), "--data-root", str(tmp_path), "--no-evaluate", *options]) == 0
    assert str(tmp_path) not in (out / "record.json").read_text()
    capsys.readouterr()
    root = ["--data-root", str(tmp_path)]
    assert main(["evaluate", str(out), "--repeats", "1", "--protocol", "whole", *root]) == 0
    assert "convnet-w8-d1" in capsys.readouterr().out
    assert main(["evaluate", str(out), "--repeats", "1", "--data-root", str(tmp_path / "else")]) == 2
    assert "--data gives others" in capsys.readouterr().err


# --- tables


def table(folder, labels, feature, cells=None, splits=("train", "test"), size=(6, 9), column="label"):
    """A folder of Parquet files, one for each split; returns the pixels of train."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split in splits:
        images = [picture(rng, size) for _ in labels]
        if split == "train":
            kept = np.stack([np.asarray(i).transpose(2, 0, 1) for i in images])
        rows = [{"bytes": content(i), "path": None} for i in images] if cells is None else cells
        features = datasets.Features({"img": datasets.Image(), column: feature(datasets)})
        made = datasets.Dataset.from_dict({"img": rows, column: list(labels)}, features=features)
        made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return kept


def content(image):
    import io

    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def classes(*names):
    return lambda datasets: datasets.ClassLabel(names=list(names) or ["ant", "bee"])


@pytest.fixture
def offline(monkeypatch):
    """The library asks no server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_folder_of_tables(tmp_path, decoded, offline):
    x = table(tmp_path / "insects", [0, 1, 1, 0, 1], classes())
    data = load_data(f"hf:{tmp_path / 'insects'}")
    assert data.name == "insects" and data.shape == (3, 6, 9) and data.class_names == ("ant", "bee")
    assert data.counts.tolist() == [2, 3] and len(data.test) == 5
    np.testing.assert_allclose(data.transform.mean, (x / 255).mean((0, 2, 3)), atol=1e-6)
    count = len(decoded)
    for source in ("insects", "hf:insects", tmp_path / "insects"):
        assert load_data(source, tmp_path).fingerprint == data.fingerprint
    assert len(decoded) == count
    table(tmp_path / "insects", [0, 1, 1, 0, 0], classes())
    assert load_data("hf:insects", tmp_path).counts.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [([3, 7, 3], "int64", ("3", "7")), (["b", "a", "b"], "string", ("a", "b")), ([True, False, True], "bool", None)],
)
def test_labels_of_tables_without_class_names(tmp_path, offline, labels, kind, names):
    table(tmp_path / "t", labels, lambda d: d.Value(kind), splits=("train", "validation"))
    data = load_data(f"hf:{tmp_path / 't'}")
    assert data.task.classes == 2 and (names is None or data.class_names == names)


@pytest.mark.parametrize(
    ("labels", "feature", "words"),
    [
        ([0, 1, -1], classes(), "row 2 of train has label -1; 0 to 1"),
        ([0, 1, -4], lambda d: d.Value("int64"), "row 2 of train has label -4"),
        ([0, 0, 0], classes(), "no sample of class 1 (bee)"),
        ([0, 0, 0], classes("ant"), "one class only (ant)"),
        ([0.5, 1.0, 2.0], lambda d: d.Value("float32"), "one class per row"),
    ],
)
def test_labels_that_are_refused(tmp_path, offline, labels, feature, words):
    table(tmp_path / "t", labels, feature)
    assert words in refused(f"hf:{tmp_path / 't'}")


def test_tables_that_do_not_fit_are_refused(tmp_path, offline):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = {"bytes": content(picture(np.random.default_rng(0))), "path": None}
    for i, (cell, words) in enumerate(
        [
            ({"bytes": b"no picture", "path": None}, "row 1 of train cannot be decoded"),
            ({"bytes": content(Image.new("L", (14, 10))), "path": None}, "row 1 of train is 14x10 grey"),
            ({"bytes": None, "path": "../secret.png"}, "row 1 of train names a file outside"),
            ({"bytes": None, "path": "/etc/passwd"}, "row 1 of train names a file outside"),
            ({"bytes": None, "path": "gone.png"}, "row 1 of train cannot be decoded"),
            (None, "row 1 of train has no image"),
        ]
    ):
        (tmp_path / f"t{i}").mkdir()
        for split in ("train", "test"):
            kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
            made = pyarrow.table({"img": pyarrow.array([good, cell], kind), "label": [0, 1]})
            parquet.write_table(made, tmp_path / f"t{i}" / f"{split}.parquet")
        assert words in refused(f"hf:{tmp_path / f't{i}'}")
    table(tmp_path / "one", [0, 1], classes(), splits=("train",))
    assert "has the splits train; train and one of test" in refused(f"hf:{tmp_path / 'one'}")
    table(tmp_path / "named", [0, 1], lambda d: d.Value("int64"), column="thing")
    assert "no column of labels; its columns are img, thing" in refused(f"hf:{tmp_path / 'named'}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    assert "hf:" not in refused("broken", tmp_path) and "cannot be read" in refused("broken", tmp_path)
    assert "neither a folder that is there nor a repository's name" in refused("hf:../../x")


def named(folder, paths, **more):
    """A README whose one configuration has these files for the splits."""
    files = [{"split": split, "path": path} for split, path in paths.items()]
    configs = [{"config_name": "default", "data_files": files, **more}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\nwords\n")  # JSON is YAML


OUTSIDE = ["../secret/train.parquet", "ABSOLUTE", "//ABSOLUTE", "file:ABSOLUTE", "local:ABSOLUTE", "file://ABSOLUTE",
           "http://localhost:9/train.parquet", "hf://datasets/a/b/train.parquet", "../../*/secret/*.parquet", "..\\x.parquet",
           "data/../../secret/train.parquet", "zip://train.parquet::../x.zip", "~/x.parquet", ["train-*", "../x"], 3]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_readme_of_a_folder_of_tables_leads_nowhere_else(tmp_path, offline, path):
    table(tmp_path / "insects", [0, 1, 1], classes())
    table(tmp_path / "secret", [0, 0, 1], classes())
    if isinstance(path, str):
        path = path.replace("ABSOLUTE", str(tmp_path / "secret" / "train-00000-of-00001.parquet"))
    named(tmp_path / "insects", {"train": path, "test": "test-*.parquet"})
    words = refused(f"hf:{tmp_path / 'insects'}")
    assert "README.md names" in words and "no file outside of the data set's folder is read" in words


def test_no_other_way_leads_out_of_a_folder_of_tables(tmp_path, offline):
    own, secret = tmp_path / "insects", tmp_path / "secret"
    table(own, [0, 1, 1], classes()), table(secret, [0, 0, 1], classes())
    for where in ("../secret", str(secret), "file://" + str(secret)):  # a folder in place of files
        named(own, {"train": "train*.parquet", "test": "test*.parquet"}, data_dir=where)
        assert "no file outside of the data set's folder is read" in refused(f"hf:{own}")
    (own / "README.md").unlink()
    files = [{"split": s, "path": str(secret / f"{s}-00000-of-00001.parquet")} for s in ("train", "test")]
    hidden = {"configs": [{"config_name": "default", "data_files": files}]}
    (own / ".huggingface.yaml").write_text(json.dumps(hidden))  # which the library obeys, too
    assert load_data(f"hf:{own}").counts.tolist() == [1, 2]
    (own / "train-00000-of-00001.parquet").unlink()
    (own / "train-00000-of-00001.parquet").symlink_to(secret / "train-00000-of-00001.parquet")
    assert "is a link out of the data set's folder" in refused(f"hf:{own}")
    (own / "train-00000-of-00001.parquet").unlink()
    (own / "train").symlink_to(secret)
    named(own, {"train": "train/train-*.parquet", "test": "test-*.parquet"})
    assert "is a link out of the data set's folder" in refused(f"hf:{own}")
    (own / "README.md").unlink()
    (own / "README.md").symlink_to(secret / "train-00000-of-00001.parquet")
    assert "is a link out of the data set's folder" in refused(f"hf:{own}")


def test_a_readme_that_grows_as_it_is_read_is_refused_at_once(tmp_path, offline):
    """Lists of nine lists of nine lists: 400 million words, if they were written out."""
    table(tmp_path / "insects", [0, 1, 1], classes())
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{to}: &{to} [{', '.join([f'*{of}'] * 9)}]" for of, to in zip("abcdefgh", "bcdefghi", strict=True)]
    for files in ("*i", "[{split: train, path: *i}]", "[{split: *i, path: x}]"):
        text = "\n".join([*lines, f"configs: [{{config_name: x, data_files: {files}}}]"])
        (tmp_path / "insects" / "README.md").write_text(f"---\n{text}\n---\n")
        began = time.perf_counter()
        assert "names what is no path" in refused(f"hf:{tmp_path / 'insects'}")
        assert time.perf_counter() - began < 4


def test_a_readme_says_which_of_a_folders_own_tables_are_which(tmp_path, offline):
    own = tmp_path / "insects"
    table(own, [0, 1, 1, 0, 1], lambda d: d.Value("int64"))
    (own / "parts").mkdir()
    (own / "train-00000-of-00001.parquet").rename(own / "parts" / "a.parquet")
    (own / "test-00000-of-00001.parquet").rename(own / "parts" / "b.parquet")
    assert "has the splits train" in refused(f"hf:{own}")  # by their names they are all the same
    named(own, {"train": "parts/a.parquet", "test": ["parts/[b-z].parquet", "parts/none-*"]})
    data = load_data(f"hf:{own}")
    assert data.counts.tolist() == [2, 3] and len(data.test) == 5 and data.class_names == ("0", "1")
    named(own, {"train": "a.parquet", "test": "b.parquet"}, data_dir="parts")
    assert load_data(f"hf:{own}").fingerprint == data.fingerprint
    named(own, {"train": "parts/gone.parquet", "test": "parts/b.parquet"})
    assert "there is no parts/gone.parquet" in refused(f"hf:{own}")
    kinds = "{names: {'0': ant, '1': bee}}"
    types = f"[{{name: img, dtype: image}}, {{name: label, dtype: {{class_label: {kinds}}}}}]"
    files = "[{split: train, path: parts/a.parquet}, {split: test, path: parts/b.parquet}]"
    text = f"configs: [{{config_name: x, data_files: {files}}}]\ndataset_info: {{config_name: x, features: {types}}}\n"
    (own / "README.md").write_text(f"---\n{text}---\n")
    assert load_data(f"hf:{own}").class_names == ("ant", "bee")
    (own / "README.md").write_text("---\nconfigs: [{config_name: x}, {config_name: y}]\n---\n")
    assert "has 2 configs, and not one that is the default" in refused(f"hf:{own}")


def test_other_files_of_a_folder_of_tables_are_passed_over(tmp_path, offline):
    """Such as the card of an export, which has no configuration, and Arrow files are tables as well."""
    own, datasets = tmp_path / "insects", pytest.importorskip("datasets")
    table(own, [0, 1, 1, 0, 1], classes())
    plain = load_data(f"hf:{own}")
    export_set(set_of(), "parquet", tmp_path / "export")
    (own / "README.md").write_bytes((tmp_path / "export" / "README.md").read_bytes())
    (own / "record.json").write_text("{}")
    assert load_data(f"hf:{own}").fingerprint == plain.fingerprint
    (tmp_path / "arrow").mkdir()
    for split in ("train", "test"):
        part = datasets.Dataset.from_parquet(str(own / f"{split}-00000-of-00001.parquet"), cache_dir=tmp_path / "c")
        part.save_to_disk(tmp_path / split)
        (arrow,) = (tmp_path / split).glob("*.arrow")
        arrow.rename(tmp_path / "arrow" / f"{split}.arrow")
    assert load_data(f"hf:{tmp_path / 'arrow'}").fingerprint == plain.fingerprint
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("a,label\n1,2\n")
    assert "has no tables; files that end in .parquet or .arrow are needed" in refused(f"hf:{tmp_path / 'csv'}")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch, offline):
    table(tmp_path / "t", [0, 1], classes())
    take = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return take(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'potstill[hf]'" in refused(f"hf:{tmp_path / 't'}")


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "cifar10-jpeg75").is_dir(), reason="POTSTILL_DATA has no cifar10-jpeg75")
def test_cifar10_from_tables(offline):
    pytest.importorskip("datasets")
    data = load_data("hf:cifar10-jpeg75", REAL)
    assert (len(data.train), len(data.test), data.shape) == (50000, 10000, (3, 32, 32))
    assert data.name == "cifar10-jpeg75" and data.counts.tolist() == [5000] * 10
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"
    np.testing.assert_allclose(data.transform.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)


# --- published layouts


def tiny(root):
    rng = np.random.default_rng(0)
    folder = root / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            picture(rng, (64, 64), "L" if i == 1 else "RGB").save(folder / "train" / wnid / "images" / f"{i}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    for i in range(2):
        picture(rng, (64, 64)).save(folder / "val" / "images" / f"val_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tsnail\nn03\tother\n")
    return folder


def test_tiny_imagenet(tmp_path):
    tiny(tmp_path)
    data = load_data("tiny-imagenet", tmp_path)
    assert data.shape == (3, 64, 64) and data.class_names == ("goldfish", "snail") and data.counts.tolist() == [3, 3]
    assert data.test.labels.tolist() == [1, 0] and data.name == "tiny-imagenet"


def test_tiny_imagenet_that_is_absent_or_damaged(tmp_path):
    text = refused("tiny-imagenet", tmp_path)
    assert "tiny-imagenet-200.zip" in text and "--data-root" in text
    file = tiny(tmp_path) / "val" / "val_annotations.txt"
    whole = file.read_text()
    file.write_text(whole.replace("val_1", "../../train/n01/images/0"))
    assert "line 2 of val/val_annotations.txt" in refused("tiny-imagenet", tmp_path)
    file.write_text(whole.replace("n02", "n09"))
    assert "line 1 of val/val_annotations.txt" in refused("tiny-imagenet", tmp_path)
    file.write_text(whole.splitlines()[0])
    assert "val/images/val_1.JPEG has no line" in refused("tiny-imagenet", tmp_path)
    file.unlink()
    assert "val/val_annotations.txt cannot be read" in refused("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar_as_torchvision_reads_it(tmp_path, monkeypatch, kind):
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *a, **k: True)
    maker, rng = getattr(cifar, kind), np.random.default_rng(0)
    folder = tmp_path / maker.base_folder
    folder.mkdir()
    key, count = ("labels", 10) if maker is CIFAR10 else ("fine_labels", 100)
    for file, _ in maker.train_list + maker.test_list:
        rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": rows, key: list(range(count))}))
    names = {maker.meta["key"]: [f"c{i}" for i in range(count)]}
    (folder / maker.meta["filename"]).write_bytes(pickle.dumps(names))
    data = load_data(kind.lower(), tmp_path)
    assert data.shape == (3, 32, 32) and data.task.classes == count and data.mirror and data.name == kind.lower()
    assert np.array_equal(data.test.inputs[count - 1].numpy().ravel(), rows[-1])


def test_absent_cifar_names_its_archive(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = refused("cifar10", tmp_path)
    assert "cannot be downloaded" in text and "cifar-10-python.tar.gz" in text and "cifar-10-batches-py" in text


def test_a_growing_archive_is_waited_for(tmp_path):
    import time

    def slow():
        for i in range(4):
            time.sleep(0.3)
            (tmp_path / "a.tar.gz").write_bytes(b"x" * (i + 1))

    loaders._download(slow, "cifar10", tmp_path / "a", patience=0.8, archive="a.tar.gz")
    assert (tmp_path / "a.tar.gz").stat().st_size == 4


# --- datasets through the API


class Items(Dataset):
    def __init__(self, items, classes=None):
        self.items = items
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_datasets_of_images_tensors_and_arrays():
    rng = np.random.default_rng(0)
    images = [picture(rng, (3, 4)) for _ in range(6)]
    made = Items([(x, i % 2) for i, x in enumerate(images)], ["ant", "bee"])
    data = Data.from_datasets(made, made, name="mine")
    assert data.shape == (3, 3, 4) and data.class_names == ("ant", "bee") and data.scale == 255 and data.name == "mine"
    assert np.array_equal(data.train.inputs[1].permute(1, 2, 0).numpy(), np.asarray(images[1]))
    x = torch.rand(6, 3, 3, 3)  # only a tensor's channels are known to be first
    data = Data.from_datasets(TensorDataset(x, torch.arange(6) % 3), TensorDataset(x, torch.arange(6) % 3))
    assert torch.equal(data.train.inputs, x) and data.task.classes == 3
    made = Items([(x.permute(1, 2, 0).numpy(), np.int64(i % 2)) for i, x in enumerate(torch.rand(6, 3, 8, 9))])
    assert Data.from_datasets(made, made).shape == (3, 8, 9)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "train has no sample"),
        ([(torch.zeros(3), 0), (torch.zeros(4), 1)], "train[1] has shape (4,)"),
        ([(torch.zeros(3), 0), torch.zeros(3)], "train[1] is of type Tensor; a pair"),
        ([(torch.zeros(3), 0), (torch.zeros(3), 2)], "train[1] has label 2; 0 to 1"),
        ([(torch.zeros(3), 0), (torch.zeros(3), -1)], "train[1] has label -1; 0 to 1"),
        ([(torch.zeros(3), 0), (torch.zeros(3), "b")], "train[1] has the label 'b'"),
        ([(torch.zeros(3), 0), (torch.zeros(3), 0.5)], "train[1] has the label '0.5'"),
        ([(torch.zeros(3), 0), (torch.zeros(3), 0)], "no sample of class 1 (bee)"),
        ([(Image.new("CMYK", (3, 3)), 0)], "train[0] has mode CMYK"),
        ([("text", 0)], "train[0] has elements"),
    ],
)
def test_datasets_that_are_refused(items, words):
    good = Items([(torch.zeros(3), 0), (torch.ones(3), 1)])
    with pytest.raises(PotstillError) as caught:
        Data.from_datasets(Items(items), good, class_names=["ant", "bee"])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PotstillError, match="map-style"):
        Data.from_datasets(iter(items), good)


def test_channels_as_said():
    x, y = np.random.default_rng(0).random((4, 3, 3, 3)), [0, 1, 0, 1]
    with pytest.raises(PotstillError, match="channels 'first' or 'last'|channels='first'"):
        Data.from_arrays(x, y, x, y)
    first, last = (Data.from_arrays(x, y, x, y, channels=c).train.inputs for c in ("first", "last"))
    assert torch.equal(last, first.permute(0, 3, 1, 2))
    with pytest.raises(PotstillError, match="neither 'first' nor 'last'"):
        Data.from_arrays(x, y, x, y, channels="middle")


def test_the_list_names_every_source(capsys):
    assert main(["list", "datasets"]) == 0
    out = capsys.readouterr().out
    assert all(w in out for w in ("cifar10 ", "cifar100", "tiny-imagenet", "FOLDER", "hf:OWNER/NAME", "FILE.npz"))


def test_a_repository_keeps_its_prefix(tmp_path, offline, decoded, monkeypatch):
    table(tmp_path / "t", [0, 1, 1], classes())
    import datasets

    monkeypatch.setattr(
        loaders.tables,
        "fetch",
        lambda where, name: datasets.load_dataset(str(tmp_path / "t"), cache_dir=tmp_path / "c"),
    )
    data = load_data("hf:owner/insects")
    assert data.name == "hf:owner/insects" and data.slug == "owner-insects" and data.counts.tolist() == [1, 2]
    count = len(decoded)
    assert load_named(data.name).fingerprint == data.fingerprint and len(decoded) == count
