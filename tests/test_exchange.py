"""Sets as files, checkpoints' trees as JSON, and files that are whole or not there."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch.utils.data import DataLoader

from potstill.data import Data
from potstill.errors import PotstillError, Stopped
from potstill.exchange import HEADER, DistilledSet, Meta, load, pack, read_tensors, unpack
from potstill.functional import Key
from potstill.records import digest, read_json, write_json, write_whole


def data_of(shape=(3, 6, 5), kind="bytes", classes=3):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, *shape), dtype=np.uint8)
    x = {"bytes": x, "floats": x * 0.3 - 20, "bool": x > 100, "ints": x.astype(np.int64) * 7}[kind]
    y = np.arange(30) % classes
    return Data.from_arrays(x, y, x, y, name="made", class_names=["å", "b", "c"]), x


def meta_of(data, ipc=(1, 2, 1), **changed):
    t, raw = data.transform, data.train.inputs
    given = {
        "method": "dm",
        "data": data.name,
        "fingerprint": data.fingerprint,
        "class_names": list(data.class_names),
        "ipc": list(ipc),
        "labels": "hard",
        "transform": {"name": t.name, "mean": list(t.mean), "std": list(t.std), "trailing": t.trailing},
        "scale": data.scale,
        "limits": [0.0, 1.0] if data.scale != 1 else [float(raw.min()), float(raw.max())],
        "mirror": False,
        "student": "convnet-w8",
        "protocol": "dc",
        "recipe": {"method": "dm", "objective": {"kind": "means", "lr": 0.1}, "learn": ["inputs"], "steps": None},
        "seed": 2**40,
        "steps": 17,
        "software": "9.9.9",
    }
    return Meta(**given | changed)


def set_of(data=None, *, soft=False, lr=True, **changed):
    data = data or data_of()[0]
    inputs = 3 * Key(0).fold("set").normal(4, *data.shape)  # leaves the range of pictures
    labels = torch.tensor([0, 1, 1, 2])
    if soft:
        labels = torch.softmax(Key(0).fold("labels").normal(4, 3) + 5 * torch.eye(3)[labels], 1)
    return DistilledSet(inputs, labels, meta_of(data, **changed), torch.tensor(0.0123) if lr else None)


# --- save and load


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lr", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 8, 8), (7,)])
def test_a_round_trip_changes_nothing(tmp_path, soft, lr, shape):
    first = set_of(data_of(shape)[0], soft=soft, lr=lr, labels="soft" if soft else "hard")
    first.save(tmp_path / "set.safetensors")
    for path in (tmp_path, str(tmp_path), tmp_path / "set.safetensors"):
        again = load(path)
        assert torch.equal(again.inputs, first.inputs) and torch.equal(again.labels, first.labels)
        assert again.inputs.dtype == torch.float32 and again.labels.dtype == first.labels.dtype
        assert (again.lr is None) is not lr and (not lr or torch.equal(again.lr, first.lr))
        for field in fields(Meta):
            assert getattr(again.meta, field.name) == getattr(first.meta, field.name), field.name
        assert again.standardise == first.standardise and again.shape == shape
        assert again.classes.tolist() == [0, 1, 1, 2]


def test_views_and_strides_are_saved_as_what_they_show(tmp_path):
    data, _ = data_of()
    big = Key(0).normal(9, 5, 6, 3).permute(0, 3, 2, 1)
    made = DistilledSet(big[1:5], torch.arange(8)[:6:2] % 3, meta_of(data, (1, 1, 1)))
    made = DistilledSet(made.inputs[:3], made.labels, made.meta)
    assert not made.inputs.is_contiguous()
    made.save(tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert torch.equal(again.inputs, big[1:4]) and again.labels.tolist() == [0, 2, 1]


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from test_exchange import set_of
set_of(soft=True, labels="soft").save({path!r})
"""


def test_the_same_set_is_the_same_bytes(tmp_path):
    """Saved twice, after a round trip, and by processes whose hashes of strings differ."""
    made = set_of(soft=True, labels="soft")
    made.save(tmp_path / "a.safetensors")
    made.save(tmp_path / "b.safetensors")
    load(tmp_path / "a.safetensors").save(tmp_path / "c.safetensors")
    turned = dict(reversed(made.meta.recipe.items()))
    set_of(soft=True, labels="soft", recipe=turned).save(tmp_path / "turned.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    assert all((tmp_path / f"{name}.safetensors").read_bytes() == whole for name in ("b", "c", "turned"))
    runs = []
    for seed in ("1", "2"):
        code = SCRIPT.format(here=str(Path(__file__).parent), path=str(tmp_path / f"p{seed}.safetensors"))
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen([sys.executable, "-c", code], env=environment))
    assert [run.wait() for run in runs] == [0, 0]
    assert all((tmp_path / f"p{seed}.safetensors").read_bytes() == whole for seed in "12")
    assert str(tmp_path).encode() not in whole and os.fsencode(Path.home()) + b"/" not in whole


def test_saving_over_an_old_set_replaces_it_and_leaves_no_other_file(tmp_path):
    set_of().save(tmp_path / "set.safetensors")
    set_of(seed=1).save(tmp_path / "set.safetensors")
    assert load(tmp_path).meta.seed == 1 and [p.name for p in tmp_path.iterdir()] == ["set.safetensors"]
    with pytest.raises(Stopped, match=r"x\.safetensors"):
        set_of().save(tmp_path / "no such folder" / "x.safetensors")


# --- damaged files


def refused(path):
    with pytest.raises(PotstillError) as caught:
        load(path)
    text = str(caught.value)
    assert path.name in text and "\n" not in text
    return text


def tampered(tmp_path, tensors=None, drop=(), **changed):
    """A set's file with some of its header or tensors replaced."""
    made = set_of()
    header = {"format": 1, **asdict(made.meta), **changed}
    for name in drop:
        header.pop(name, None)
    content = {"inputs": made.inputs, "labels": made.labels, "lr": made.lr} | (tensors or {})
    content = {k: v for k, v in content.items() if k not in drop}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(save(content, metadata={HEADER: json.dumps(header)}))
    return path


def test_truncated_at_any_length(tmp_path):
    set_of().save(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for size in [*range(40), *range(40, len(whole), 61), len(whole) - 1]:
        (tmp_path / "a.safetensors").write_bytes(whole[:size])
        refused(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(whole + b"\0")
    assert "damaged" in refused(tmp_path / "a.safetensors")


def test_not_changed_is_accepted(tmp_path):
    assert len(load(tampered(tmp_path))) == 4  # so that the refusals below are due to what they change


def raw(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        save({"weight": torch.zeros(3)}),
        save({"inputs": torch.zeros(3, 2), "labels": torch.zeros(3)}, metadata={"format": "pt"}),
        save({"inputs": torch.zeros(3, 2)}, metadata={HEADER: "{"}),
        save({"inputs": torch.zeros(3, 2)}, metadata={HEADER: "[1]"}),
        save({"inputs": torch.zeros(3, 2)}, metadata={HEADER: "null"}),
        raw({"__metadata__": None}),
        raw({}),
        raw(b"{}}"),
        raw(b"\xff\xfe"),
        b"PK\x03\x04 a zip",
        b"\xff" * 64,
        b"",
    ],
)
def test_another_programs_file(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    assert "potstill" in (text := refused(path)) or "damaged" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ipc": [1, 1, 1]}, ["damaged", "ipc [1, 1, 1]"]),
        ({"ipc": [2, 2]}, ["damaged", "ipc [2, 2]"]),
        ({"class_names": ["a", "b"], "ipc": [1, 3]}, ["labels", "2 classes"]),
        ({"format": 99}, ["format", "newer"]),
        ({"drop": ["format"]}, ["no distilled set", "format"]),
        ({"drop": ["student"]}, ["no distilled set", "student"]),
        ({"drop": ["inputs"]}, ["no distilled set", "inputs"]),
        ({"drop": ["labels"], "labels": "hard"}, ["no distilled set", "labels"]),
        ({"surprise": 1}, ["no distilled set", "surprise"]),
        ({"format": 99, "surprise": 1}, ["format", "newer"]),
        ({"tensors": {"labels": torch.tensor([0, 1, 1, 3])}}, ["labels", "3 classes"]),
        ({"tensors": {"labels": torch.tensor([0, -1, 1, 2])}}, ["labels", "3 classes"]),
        ({"tensors": {"labels": torch.tensor([0.0, 1, 1, 2])}}, ["labels"]),
        ({"tensors": {"labels": torch.full((4, 2), 0.5)}}, ["labels", "3 classes"]),
        ({"tensors": {"labels": torch.full((4, 4), 0.25)}}, ["labels", "3 classes"]),
        ({"tensors": {"labels": torch.full((4, 3), torch.nan)}}, ["not finite"]),
        ({"tensors": {"labels": torch.tensor([0, 1, 1])}}, ["damaged", "(3,)"]),
        ({"tensors": {"labels": torch.tensor(0)}}, ["no distilled set"]),
        ({"tensors": {"inputs": torch.full((4, 3, 6, 5), torch.nan)}}, ["not finite"]),
        ({"tensors": {"inputs": torch.full((4, 3, 6, 5), -torch.inf)}}, ["not finite"]),
        ({"tensors": {"inputs": torch.zeros(4, 3, 6, 5, dtype=torch.uint8)}}, ["damaged"]),
        ({"tensors": {"inputs": torch.zeros(())}}, ["no distilled set"]),
        ({"tensors": {"inputs": torch.zeros(4)}}, ["damaged"]),
        ({"tensors": {"inputs": torch.zeros(4, 2, 6, 5)}}, ["transform", "(2, 6, 5)"]),
        ({"tensors": {"inputs": torch.zeros(4, 3)}}, ["transform", "(3,)"]),
        ({"tensors": {"lr": torch.tensor(torch.inf)}}, ["not finite"]),
        (
            {"tensors": {"inputs": torch.zeros(0, 3, 6, 5), "labels": torch.zeros(0).long()}, "ipc": [0, 0, 0]},
            ["damaged", "(0, 3, 6, 5)"],
        ),
        ({"transform": {"name": "standardise"}}, ["no distilled set", "mean"]),
        ({"transform": None}, ["no distilled set"]),
        ({"ipc": None}, ["no distilled set"]),
        ({"ipc": ["1", "2", "1"]}, ["no distilled set"]),
        ({"class_names": 3}, ["no distilled set"]),
    ],
)
def test_a_header_that_does_not_fit_its_tensors(tmp_path, changed, words):
    text = refused(tampered(tmp_path, **changed))
    assert all(word in text for word in words), text


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PotstillError, match=r"no set at .*set\.safetensors"):
        load(tmp_path / "empty")
    with pytest.raises(PotstillError, match="no set at .*gone"):
        load(tmp_path / "gone")


# --- as a user has it


def test_it_is_a_dataset(tmp_path):
    made = set_of()
    x, y = made[2]
    assert torch.equal(x, made.inputs[2]) and int(y) == 1 and len(made) == 4
    batches = list(DataLoader(made, batch_size=3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 6, 5), (1, 3, 6, 5)]
    assert torch.equal(torch.cat([x for x, _ in batches]), made.inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), made.labels)
    assert sum(1 for _ in made) == 4  # and ends


@pytest.mark.parametrize("kind", ["bytes", "floats", "ints", "bool"])
@pytest.mark.parametrize("shape", [(3, 6, 5), (6, 5), (1, 8, 8), (7,)])
def test_transform_is_what_the_data_had(shape, kind):
    """`data.prepare` of what the data set stored equals `transform` of what the user has, of any number of axes."""
    data, x = data_of(shape, kind)
    made = set_of(data)
    wanted = data.prepare(data.train.inputs)
    for given_ in (x, torch.from_numpy(x), x.reshape(30, *data.shape), x[::-1][::-1]):
        out = made.transform(given_)
        assert out.dtype == torch.float32 and torch.equal(out, wanted)
    assert torch.equal(made.transform(x[4]), wanted[4])
    assert torch.equal(made.transform(x[:1].reshape(1, *data.shape)), wanted[:1])


def test_transform_of_pictures_as_pil_gives_them():
    data, x = data_of((3, 6, 5))
    made, wanted = set_of(data), data.prepare(data.train.inputs)
    picture = Image.fromarray(x[0].transpose(1, 2, 0))
    assert torch.equal(made.transform(x[0].transpose(1, 2, 0)), wanted[0])
    assert torch.equal(made.transform(np.asarray(picture)), wanted[0])  # a read-only array
    assert torch.equal(made.transform(picture), wanted[0])
    grey, g = data_of((8, 8))
    one, wanted = set_of(grey), grey.prepare(grey.train.inputs)
    assert torch.equal(one.transform(Image.fromarray(g[3])), wanted[3])
    assert torch.equal(one.transform(g[3][:, :, None]), wanted[3])
    assert one.transform(g[:8]).shape == (8, 1, 8, 8)  # eight pictures, not one of eight channels


def test_transform_takes_its_own_layout_first():
    cube = DistilledSet(torch.zeros(3, 3, 3, 3), torch.arange(3), meta_of(data_of((3, 5, 5))[0], (1, 1, 1)))
    own = Key(0).integers(256, 3, 3, 3).byte()
    assert torch.equal(cube.transform(own), cube.standardise.apply(own.float() / 255))


@pytest.mark.parametrize("shape", [(5, 6), (6, 6), (3, 5, 6), (2, 6, 5), (4, 4, 6, 5), (6,), (), (0,), (30,)])
def test_transform_refuses_other_shapes(shape):
    with pytest.raises(PotstillError, match=r"do not fit") as caught:
        set_of().transform(np.zeros(shape, np.uint8))
    assert str(shape) in str(caught.value) and "(3, 6, 5)" in str(caught.value)


def test_transform_refuses_what_is_no_number():
    with pytest.raises(PotstillError, match="numbers"):
        set_of(data_of((7,))[0]).transform(["a"] * 7)


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_images_are_the_pictures_again(kind):
    """In [0, 1] for what the source held, and not clamped beyond."""
    data, x = data_of((3, 6, 5), kind)
    wanted = torch.from_numpy((x - x.min()) / (x.max() - x.min()) if kind == "floats" else x / 255).float()
    made = DistilledSet(data.prepare(data.train.inputs), data.train.labels, meta_of(data, (10, 10, 10)))
    torch.testing.assert_close(made.images, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(made.images, data.display(made.inputs), rtol=0, atol=2e-6)
    free = set_of(data)
    assert float(free.images.min()) < 0 and float(free.images.max()) > 1


# --- trees


class Pair(NamedTuple):
    a: object
    b: object


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8]).flatmap(
        lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda s: torch.ones(s).mul(3).to(dtype))
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(["tensor", "dict", "list"])), inner, max_size=3),
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def through(tree, path):
    """A tree by way of a file."""
    tensors = {}
    packed = pack(tree, tensors)
    path.write_bytes(save(tensors, metadata={HEADER: json.dumps({"tree": packed})}))
    tensors, header, _ = read_tensors(path, "tree")
    return unpack(header["tree"], tensors)


@given(tree=TREES)
@settings(max_examples=80, deadline=None)
def test_any_tree_survives_a_file(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    assert same(through(tree, path), tree)


def test_named_tuples_shared_and_strided_tensors(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    tree = {"pair": Pair(x, (None, 1.5)), "again": [x, x.T, x[0], x[:, ::2], x.expand(2, 3, 4)], "leaf": x[1, 2]}
    tree["grad"] = torch.ones(2, requires_grad=True)
    out = through(tree, tmp_path / "t")
    assert type(out["pair"]) is tuple and same(out["pair"], (x, (None, 1.5)))
    assert same(out["again"], tree["again"]) and same(out["leaf"], x[1, 2])
    assert torch.equal(out["grad"], torch.ones(2)) and not out["grad"].requires_grad
    out["again"][0].zero_()
    assert x.sum() == 66 and out["pair"][0].sum() == 66  # each its own


def test_packing_keeps_a_snapshot():
    x, tensors = torch.zeros(3), {}
    packed = pack({"x": x}, tensors)
    x.add_(1)
    assert unpack(packed, tensors)["x"].sum() == 0


# --- files that are whole or not there

FULL_DISK = """
import resource, sys
from pathlib import Path
from potstill.errors import Stopped
from potstill.records import write_whole
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_whole(path, b"fits")
path.with_name("old").write_bytes(b"old" * 100)
try:
    write_whole(path.with_name("old"), b"new" * 5000)
except Stopped as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "a")], capture_output=True, text=True)
    assert run.returncode == 7, run.stderr
    assert "old cannot be written" in run.stdout and "too large" in run.stdout and "untouched" in run.stdout
    assert (tmp_path / "a").read_bytes() == b"fits" and (tmp_path / "old").read_bytes() == b"old" * 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "old"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    write_whole(tmp_path / "a", b"old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(Stopped, match="a cannot be written"):
            write_whole(tmp_path / "a", b"new")
    finally:
        tmp_path.chmod(0o755)
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("where", ["gone/a", "a folder", "file/a"])
def test_places_that_cannot_be_written(tmp_path, where):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(Stopped, match="cannot be written"):
        write_whole(tmp_path / where, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a folder", "file"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_an_interrupt_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def interrupt(new, old):
        assert Path(new).parent == Path(old).parent  # one file system, or replacing is no single step
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_written_whole(tmp_path):
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"")
    assert (tmp_path / "a").read_bytes() == b"" and len(list(tmp_path.iterdir())) == 1


def test_records_round_trip_and_damage_is_named(tmp_path):
    record = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "r.json", record)
    assert read_json(tmp_path / "r.json") == record and list(read_json(tmp_path / "r.json")) == ["b", "a"]
    whole = (tmp_path / "r.json").read_bytes()
    for content in (b"", whole[:-3], b"\xff"):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(PotstillError, match=r"r\.json"):
            read_json(tmp_path / "r.json")
    with pytest.raises(PotstillError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")


def test_a_number_that_json_lacks_is_not_written(tmp_path):
    write_json(tmp_path / "r.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", {"x": float("nan")})
    assert read_json(tmp_path / "r.json") == 1


def test_digest_sees_values_and_not_their_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, None)}) == 6
