"""Sets for other programs: nothing lost, nothing overwritten, nothing taken at a stranger's word."""

import hashlib
import io
import json
import os
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_exchange import data_of, meta_of, set_of

import potstill
from potstill import records
from potstill.cli import main
from potstill.errors import PotstillError, Stopped
from potstill.exchange import DistilledSet, load
from potstill.export import FORMATS, NAME, export_set, safe_name
from potstill.foreign import read
from potstill.records import write_folder
from potstill.transforms import describe


def saved(tmp_path, **options):
    (tmp_path / "run").mkdir()
    made = set_of(**options)
    made.save(tmp_path / "run" / "set.safetensors")
    return made, tmp_path / "run"


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- PNG


@pytest.mark.parametrize(("shape", "mode"), [((3, 6, 5), "RGB"), ((1, 8, 7), "L")])
def test_pictures_in_a_folder_for_each_class(tmp_path, shape, mode):
    made, run = saved(tmp_path, data=data_of(shape)[0])
    assert export_set(run, "png", tmp_path / "out") == tmp_path / "out"
    assert [f for f in tree(tmp_path / "out") if "." in f] == [
        "0-å/0.png", "1-b/1.png", "1-b/2.png", "2-c/3.png", "README.md", "labels.json",
    ]  # fmt: skip
    about = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert about["class_names"] == ["å", "b", "c"] and about["learning_rate"] == pytest.approx(0.0123)
    assert float(made.images.min()) < 0 and float(made.images.max()) > 1
    for row, image, label in zip(about["images"], made.images, made.labels, strict=True):
        picture = Image.open(tmp_path / "out" / row["file"])
        there = torch.from_numpy(np.array(picture)).float().view(*shape[1:], shape[0]).permute(2, 0, 1) / 255
        assert picture.mode == mode and (there - image.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
        assert row["label"] == int(label) and "soft_label" not in row


def test_soft_labels_lie_beside_the_pictures(tmp_path):
    made, run = saved(tmp_path, soft=True, labels="soft", lr=False)
    export_set(run, "png", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert about["learning_rate"] is None
    assert torch.equal(torch.tensor([r["soft_label"] for r in about["images"]]), made.labels)


def test_folders_are_in_the_order_of_classes(tmp_path):
    names = [f"{99 - i}" for i in range(12)]
    data, _ = data_of()
    made = set_of(data, class_names=names, ipc=[1] * 4 + [0] * 8)
    made.labels = torch.tensor([0, 1, 2, 11])
    export_set(made, "png", tmp_path / "out")
    assert tree(tmp_path / "out")[:8:2] == ["00-99", "01-98", "02-97", "11-88"]


HOSTILE = ["../../x", "/etc/passwd", "\0", "x" * 5000, "CON", "..", ".", "", "a\nb", "C:\\x", "nul.txt", "~/.ssh", "é" * 500,
           "\u202egpj", "a/../../b", "-rf", "$(id)", "`id`", "| x |", "日本語", "trailing. ", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_class_name_stays_in_the_folder(tmp_path, name):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    made = set_of(class_names=[name, "b", name])
    for to in FORMATS:
        export_set(made, to, tmp_path / "deep" / "er" / to)
    there = tree(tmp_path)
    assert len([f for f in there if f.endswith(".png")]) == 4
    assert all(f.startswith("deep/er/") for f in there if f not in ("deep", "deep/er"))
    folder = next(f for f in there if f.startswith("deep/er/png/0") and f.endswith(".png")).split("/")[3]
    assert folder.startswith("0") and len(folder) <= NAME + 2 and len(folder.encode()) < 255
    assert not set(folder) & set('/\\:*?"<>|\0\n$`~\u202e') and not folder.endswith((".", " ", "-"))
    text = (tmp_path / "deep" / "er" / "png" / "README.md").read_text()
    assert text.count("\n| classes |") == 1
    about = json.loads((tmp_path / "deep" / "er" / "png" / "labels.json").read_text())
    assert about["class_names"] == [name, "b", name], "the true name is kept where it can do no harm"


def test_safe_names():
    assert safe_name("T-shirt/top") == "T-shirt-top" and safe_name("../x") == "x" and safe_name("日本") == "日本"
    assert safe_name("..") == safe_name("\0") == safe_name("/") == ""


def test_other_channel_counts_are_refused_with_what_to_use(tmp_path):
    for shape in ((5, 12, 20), (7,)):
        made = set_of(data_of(shape)[0])
        with pytest.raises(PotstillError, match="--to npz and --to parquet hold any"):
            export_set(made, "png", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- npz


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 8, 8), (7,)])
@pytest.mark.parametrize("out", ["out", "one.npz"])
def test_npz_loses_nothing(tmp_path, soft, shape, out):
    data, raw = data_of(shape)
    made, run = saved(tmp_path, data=data, soft=soft, labels="soft" if soft else "hard")
    export_set(run, "npz", tmp_path / out)
    file = tmp_path / out / "set.npz" if out == "out" else tmp_path / out
    with np.load(file, allow_pickle=False) as f:
        assert np.array_equal(f["x_train"], made.inputs.numpy()) and f["x_train"].dtype == np.float32
        assert f["y_train"].tolist() == [0, 1, 1, 2] and list(f["class_names"]) == ["å", "b", "c"]
        assert ("soft_labels" in f.files) == soft
        mine = (raw[:4].astype(np.float32) / np.float32(f["scale"]) - f["mean"]) / f["std"]
        assert np.array_equal(mine, made.transform(raw[:4]).numpy())
        assert str(f["readme"]).startswith("---\n")
    (again,) = read(file, data)
    assert torch.equal(again.inputs, made.inputs) and torch.equal(again.labels, made.labels)
    assert torch.equal(again.lr, made.lr) and again.standardise == made.standardise
    assert again.meta.ipc == made.meta.ipc and again.meta.labels == made.meta.labels


def test_the_card_of_npz_runs(tmp_path, monkeypatch):
    data, raw = data_of()
    _, run = saved(tmp_path, data=data)
    export_set(run, "npz", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    room = ran(tmp_path / "out" / "README.md")
    assert room["x"].shape == (4, 3, 6, 5) and room["y"].tolist() == [0, 1, 1, 2]
    assert room["prepare"](raw).shape == raw.shape


def test_the_card_of_png_runs(tmp_path, monkeypatch):
    for k, shape in enumerate([(3, 6, 5), (1, 6, 5)]):
        data, _ = data_of(shape, "floats" if k else "bytes")
        made = set_of(data)
        low, high = made.meta.limits
        unit = low + (high - low) * torch.arange(4 * made.inputs[0].numel()).view(4, *shape).remainder(256) / 255
        made.inputs = made.standardise.apply(unit)  # nothing to clamp: the pictures are the set
        export_set(made, "png", tmp_path / str(k))
        monkeypatch.chdir(tmp_path / str(k))
        room = ran(tmp_path / str(k) / "README.md")
        got = torch.stack([x for x, _ in room["set_"]])
        assert torch.allclose(got, made.inputs, atol=1e-3) and [y for _, y in room["set_"]] == [0, 1, 1, 2]


def ran(card):
    """The names that a card's program makes."""
    program = card.parent.parent / f"{card.parent.name}.py"
    program.write_text(card.read_text().split("```python\n")[1].split("```")[0])
    return runpy.run_path(str(program))


# --- Parquet


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 8, 8), (5, 4, 6), (7,)])
@pytest.mark.parametrize("soft", [False, True])
def test_parquet_loses_nothing(tmp_path, soft, shape):
    pq = pytest.importorskip("pyarrow.parquet")
    made, run = saved(tmp_path, data=data_of(shape)[0], soft=soft, labels="soft" if soft else "hard")
    export_set(run, "parquet", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    picture = shape[0] in (1, 3)
    assert table.column_names == ["image"] * picture + ["input", "label"] + ["soft_label"] * soft
    rows = table.to_pylist()
    assert torch.equal(torch.tensor([r["input"] for r in rows]), made.inputs)
    assert [r["label"] for r in rows] == [0, 1, 1, 2]
    if soft:
        assert torch.equal(torch.tensor([r["soft_label"] for r in rows]), made.labels)
    if picture:
        assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (shape[2], shape[1])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == ["å", "b", "c"] and set(features) == set(table.column_names)
    export_set(run, "parquet", tmp_path / "one.parquet")
    assert pq.read_table(tmp_path / "one.parquet").equals(table)


def test_datasets_reads_the_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    made, run = saved(tmp_path, soft=True, labels="soft", class_names=["a", "b", "a"])
    export_set(run, "parquet", tmp_path / "out")
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["label"].names == ["a (0)", "b", "a (2)"]
    assert found[0]["image"].size == (5, 6) and found[0]["label"] == 0
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache2")
    room = ran(tmp_path / "out" / "README.md")
    assert torch.equal(room["x"], made.inputs) and torch.equal(room["y"], made.labels)
    assert room["prepare"](made.images).shape == made.inputs.shape


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PotstillError, match=r"pip install 'potstill\[parquet\]'"):
        export_set(set_of(), "parquet", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- the card


def test_the_card_has_the_accuracy_of_this_set_and_no_other(tmp_path):
    _, run = saved(tmp_path)
    row = {"set": "this set", "network": "convnet", "protocol": "dsa", "accuracy_mean": 0.7071, "accuracy_std": 0.01}
    record = {"set": {"sha256": ""}, "results": [{**row, "repeats": 5, "more": 1}]}
    for right in (False, True):
        if right:
            record["set"]["sha256"] = hashlib.sha256((run / "set.safetensors").read_bytes()).hexdigest()
        (run / "record.json").write_text(json.dumps(record))
        export_set(run, "npz", tmp_path / str(right))
        text = (tmp_path / str(right) / "README.md").read_text()
        assert ("| this set | convnet | dsa | 70.7 % ± 1.0 | 5 |" in text) == right
        assert ("Not measured here" in text) != right
    for k, bad in enumerate(["{", "[]", '{"set": 3}', json.dumps({**record, "results": [{**row, "repeats": "<b>"}]})]):
        (run / "record.json").write_text(bad)
        export_set(run, "npz", tmp_path / f"bad{k}")
        assert "Not measured here" in (tmp_path / f"bad{k}" / "README.md").read_text()


def test_the_card_says_what_is_not_known_and_believes_no_one(tmp_path):
    made = set_of(class_names=["```\n# h", "b", "c"])
    made.meta = replace(made.meta, data="x\n---\nlicense: mit\n<script>alert(1)</script> | [a](b)")
    export_set(made, "npz", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    header = text.split("\n---\n")[0]
    assert "license: unknown" in header and "\nlicense: mit" not in text and "**Licence.** Not known" in text
    assert "<script>" not in text and "\n# h" not in text and '"kind": "means"' in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": "1); import os; (1"},
        {"scale": 0},
        {"limits": [0.0, float("nan")]},
        {"limits": [1.0, 1.0]},
        {"limits": [0.0]},
        {"class_names": [["a"], "b", "c"]},
        {"transform": {"name": "standardise", "mean": ["x"] * 3, "std": [1.0] * 3, "trailing": 2}},
    ],
)
@pytest.mark.parametrize("to", FORMATS)
def test_a_header_that_is_no_header_is_refused(tmp_path, changed, to):
    with pytest.raises(PotstillError, match="header is damaged"):
        export_set(set_of(**changed), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_strange_steps_stay_in_their_cell(tmp_path):
    export_set(set_of(steps="<b>\n# h"), "npz", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<b>" not in text and "\n# h" not in text


# --- what may go wrong


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_that_is_there_is_lost(tmp_path, to):
    made = set_of()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / f"file.{to}").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PotstillError, match=r"full is a folder that is not empty \(notes.txt\)"):
        export_set(made, to, tmp_path / "full")
    with pytest.raises(PotstillError, match="is there already"):
        export_set(made, to, tmp_path / f"file.{to}")
    with pytest.raises(PotstillError, match="is there already"):
        export_set(made, to, tmp_path / "link")
    assert tree(tmp_path) == [f"file.{to}", "full", "full/notes.txt", "link"]
    (tmp_path / "empty").mkdir()
    export_set(made, to, tmp_path / "empty")
    export_set(made, to, tmp_path / "new" / "deeper")
    assert tree(tmp_path / "empty") == tree(tmp_path / "new" / "deeper") != []


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    made, real = set_of(), records.Path.write_bytes
    calls = []

    def full(self, content):
        calls.append(self)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(records.Path, "write_bytes", full)
    with pytest.raises(Stopped, match="No space left on device"):
        export_set(made, "png", tmp_path / "out")
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_a_folder_that_is_filled_meanwhile_is_not_lost(tmp_path):
    def files():
        yield "a.txt", b"1"
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(Stopped):
        write_folder(tmp_path / "out", files())
    assert tree(tmp_path) == ["out", "out/mine"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def files():
        yield "a/b.txt", b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", files())
    assert not list(tmp_path.iterdir())


def real_set(transform, shape=(3, 6, 5), kind="bytes"):
    """A set of the first training samples as they are under a transform, and the raw samples."""
    data, raw = data_of(shape, kind)
    data = data.with_transform(transform)
    meta = replace(meta_of(data_of(shape, kind)[0]), transform=describe(data.transform))
    inputs = data.prepare(data.train.inputs[[0, 1, 4, 2]])
    matrix = data.transform.matrix if transform == "zca" else None
    made = DistilledSet(inputs, torch.tensor([0, 1, 1, 2]), meta, matrix=matrix)
    return data, raw[[0, 1, 4, 2]].astype(np.float64), made


@pytest.mark.parametrize("shape", [(3, 6, 5), (2, 4, 6), (7,)])
@pytest.mark.parametrize("transform", ["zca", "none"])
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_other_transforms_are_undone_to_mean_and_deviation(tmp_path, transform, shape, kind):
    """What lies in the file leads back to the raw samples with nothing but what lies beside it."""
    pq = pytest.importorskip("pyarrow.parquet")
    data, raw, made = real_set(transform, shape, kind)
    with np.load(export_set(made, "npz", tmp_path / "a.npz")) as f:
        back = (f["x_train"].astype(np.float64) * f["std"] + f["mean"]) * f["scale"]
        assert np.abs(back - raw).max() < 0.02 * raw.std()
        assert np.abs(f["x_train"] - made.inputs.numpy()).max() < 1e-6 or transform == "zca"
        assert ("whitening is undone" in str(f["readme"])) == (transform == "zca")
    (again,) = read(tmp_path / "a.npz", data)  # states its own mean and deviation: judged as it is
    assert torch.allclose(again.images, made.images, atol=1e-2)
    out = export_set(made, "parquet", tmp_path / "b.parquet")
    assert torch.equal(torch.tensor(pq.read_table(out).column("input").to_pylist()), again.inputs)


@pytest.mark.parametrize("transform", ["zca", "none", "standardise"])
def test_a_set_in_one_file_needs_no_other(tmp_path, monkeypatch, transform):
    _, raw, made = real_set(transform)
    (tmp_path / "a").mkdir()
    file = export_set(made, "safetensors", tmp_path / "a" / "one.safetensors")
    assert tree(tmp_path / "a") == ["one.safetensors"], "the matrix is inside"
    export_set(made, "safetensors", tmp_path / "b")
    assert tree(tmp_path / "b") == ["README.md", "set.safetensors"]
    assert (tmp_path / "b" / "set.safetensors").read_bytes() == file.read_bytes()
    again = load(file)
    assert torch.equal(again.inputs, made.inputs) and torch.equal(again.labels, made.labels) and again.meta == made.meta
    monkeypatch.chdir(tmp_path / "b")
    got = ran(tmp_path / "b" / "README.md")
    assert torch.equal(got["prepare"](torch.tensor(raw).float()), made.transform(torch.tensor(raw).float()))
    assert "whitening is undone" not in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("transform", ["zca", "none"])
def test_the_card_of_png_leads_to_the_standardised_space(tmp_path, monkeypatch, transform):
    data, raw, made = real_set(transform)
    export_set(made, "png", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    got = torch.stack([x for x, _ in ran(tmp_path / "out" / "README.md")["set_"]])
    plain = data.transform.standardise if transform == "zca" else None
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in ((plain.mean, plain.std) if plain else ([0.0] * 3, [1.0] * 3)))
    expected = (raw / 255 - mean) / std
    assert np.abs(got.numpy() - expected).max() < 0.02


def test_the_command(capsys, tmp_path):
    made, run = saved(tmp_path)
    out = str(tmp_path / "out")
    assert main(["export", str(run), "--to", "npz", "--out", out]) == 0
    assert capsys.readouterr().out.strip() == out
    for arguments, words in [
        (["export", str(run), "--to", "npz", "--out", out], "is a folder that is not empty"),
        (["export", str(run), "--to", "pgn", "--out", out], "did you mean 'png'?"),
        (["export", str(tmp_path / "no"), "--to", "png", "--out", out], "no set at"),
        (["export", str(run), "--to", "png"], "required: --out"),
        (["export", str(run), "--to", "npz", "--out", str(tmp_path / "no" / "a.npz")], "in a folder that is not there"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("potstill: ") and "\n" not in error and words in error
    (tmp_path / "broken.safetensors").write_bytes((run / "set.safetensors").read_bytes()[:-3])
    assert main(["export", str(tmp_path / "broken.safetensors"), "--to", "png", "--out", str(tmp_path / "b")]) == 2
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert torch.equal(load(run).inputs, made.inputs) and potstill.export_set is export_set
    assert os.stat(out).st_mode & 0o777 == 0o755
