"""Files from strangers: nothing in them runs, takes all memory, leads out of a folder, or becomes markup."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tomllib
from collections import Counter, OrderedDict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import mutate
from PIL import Image
from safetensors.torch import save
from test_exchange import data_of, set_of
from test_foreign import DATA, pair
from test_page import cell, folder_of, spent

import potstill
from potstill import strict
from potstill.bench import Bench
from potstill.benchmark import Benchmark
from potstill.cli import main
from potstill.errors import PotstillError, one_line
from potstill.exchange import HEADER, load
from potstill.export import export_set
from potstill.foreign import read
from potstill.pickles import checked
from potstill.records import read_json, write_sealed
from potstill.rows import suites
from potstill.transforms import digest_of
from potstill.zoo import cells, rows

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></script><svg onload=alert(1)>",
    "--><iframe src=//x></iframe><!--",
    "{{ 7 * 7 }}{% for x in y %}",
    "]]></svg><b>",
    "&lt;b&gt;&#60;b&#62;",
    "](javascript:alert(1)) ![x](//y) `</code>`",
    "\x1b[2J\x1b]0;owned\x07\r\n# h\n---\n",
]
PLAIN = [f"class {i}" for i in range(len(HOSTILE))]


# --- mutated inputs, in processes with limits


@pytest.mark.parametrize("kind", ["set", "pt", "npz", "recipe", "rows", "experts", "checkpoint"])
def test_mutated_files_load_or_are_refused_in_a_line(kind):
    """The whole run is `python tests/fuzz/run.py KIND --count 20000`; docs/reliability.md has its figures."""
    fuzzed(kind, 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_mutated_pictures_load_or_are_refused_in_a_line(kind):
    if kind == "parquet":
        pytest.importorskip("datasets")
    fuzzed(kind, 100)


def fuzzed(kind, count):
    command = [sys.executable, str(Path(__file__).parent / "fuzz" / "run.py"), kind, "--count", str(count), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert found["tried"] == count and not found["unexpected"], found["shown"]
    assert min(found["loaded"], found["refused"]) > count // 25, "mutations that break all or nothing find nothing"


# --- pickles


class Planted:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def forms(mark):
    """Pickles in every place where a file is read, with what opens them."""
    bomb = Planted(mark)
    for legacy in (False, True):
        for held in (
            {"data": [[pair()[0], bomb]]},
            {"data": [[bomb, pair()[1]], [bomb, bomb]]},
            {"data": OrderedDict(a=[bomb])},
            [bomb],
            {"data": [[pair()[0], pair()[1]]], "accs_all_exps": {"ConvNet": [{"deep": (1, [bomb])}]}},
        ):
            buffer = io.BytesIO()
            torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
            yield "res.pt", buffer.getvalue()
    yield "res.pt", pickle.dumps({"data": [[bomb, bomb]]}, protocol=5)
    for names in (("x", "y"), ("x_train", "y_train", "x_test", "y_test")):
        buffer = io.BytesIO()
        np.savez(buffer, **{n: np.array([bomb], dtype=object) for n in names})
        yield "a.npz", buffer.getvalue()
        yield "a.npz", mutate.archive({f"{n}.npy": pickle.dumps(bomb) for n in names})
    for content in (pickle.dumps(bomb), mutate.archive({"archive/data.pkl": pickle.dumps(bomb)})):
        for name in ("set.safetensors", "checkpoint.safetensors", "experts.json", "recipe.toml"):
            yield name, content


def test_a_planted_pickle_is_refused_wherever_it_lies(tmp_path, capsys):
    mark, seen = tmp_path / "planted", 0
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "the trap is a real one"
    mark.rmdir()
    data = str(npz(tmp_path))
    for i, (name, content) in enumerate(forms(mark)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / name).write_bytes(content)
        file = str(folder / name)
        usual = ["distill", data, "--method", "random", "--no-evaluate", "--out"]
        commands = {
            "res.pt": [["evaluate", file, "--data", data, "--normalisation", "standardise"]],
            "a.npz": [["evaluate", file, "--data", data, "--normalisation", "unit"], [usual[0], file, *usual[2:], str(folder / "o")]],
            "set.safetensors": [["evaluate", file, "--data", data], ["export", str(folder), "--to", "png", "--out", str(folder / "o")]],
            "checkpoint.safetensors": [["distill", data, "--method", "dm", "--network", "convnet-w8-d1", "--resume", "--out", str(folder)]],
            "experts.json": [["distill", data, "--method", "mtt", "--experts", str(folder), "--out", str(folder / "o")]],
            "recipe.toml": [["distill", data, "--recipe", file, "--out", str(folder / "o")]],
        }[name]  # fmt: skip
        for command in commands:
            assert main(command) == 2, command
            error = capsys.readouterr().err.strip()
            assert error.startswith("potstill: ") and "\n" not in error and len(error) < 1500
            assert not mark.exists(), command
            seen += 1
    assert seen > 25


def npz(folder, names=("a", "b", "c"), **changes):
    """A data set as a file."""
    y, t = (np.array(names)[s.labels.numpy()] for s in (DATA.train, DATA.test))
    np.savez(folder / "data.npz", x_train=DATA.train.inputs, y_train=y, x_test=DATA.test.inputs, y_test=t, **changes)
    return folder / "data.npz"


def test_code_from_outside_is_not_run_because_a_file_names_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'planted')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    data = str(npz(tmp_path))
    for field in ("network", "student"):
        assert main(["show", "dm"]) == 0
        text = capsys.readouterr().out
        (tmp_path / "r.toml").write_text(re.sub(rf'^{field} = ".*"', f'{field} = "evil:run"', text, flags=re.MULTILINE))
        assert main(["distill", data, "--recipe", str(tmp_path / "r.toml"), "--out", str(tmp_path / "o")]) == 2
        assert "is not run because a file says so" in capsys.readouterr().err
    command = ["experts", data, "--count", "1", "--epochs", "4", "--network", "convnet-w4-d1", "--augment", "none"]
    assert main([*command, "--out", str(tmp_path / "experts")]) == 0
    index = tmp_path / "experts" / "experts.json"
    write_sealed(index, {**read_json(index), "network": "evil:run"})  # a stranger can make a checksum, too
    capsys.readouterr()
    ask = ["distill", data, "--method", "mtt", "--experts", str(tmp_path / "experts"), "--out", str(tmp_path / "o")]
    assert main(ask) == 2
    assert "is not run because a file says so" in capsys.readouterr().err
    made = set_of(student="evil:run")
    made.save(tmp_path / "s.safetensors")
    with pytest.raises(PotstillError, match="is not run because a file says so"):
        potstill.evaluate(tmp_path / "s.safetensors", data_of()[0])
    assert not (tmp_path / "planted").exists()


ROW = 'method = "dm"\ndata = "digits"\nipc = 1\nsteps = 1\n'
NAMES = {
    "method": ("performance", ROW.replace('"dm"', '"evil.part:run"') + "REST"),
    "network": ("performance", ROW + 'network = "evil.part:run"\nREST'),
    "networks": ("transfer", ROW + 'networks = ["mlp", "evil.part:run"]\nprotocol = "dc"'),
    "a setting": ("performance", ROW + 'settings = { "network" = "evil.part:run" }\nREST'),
    "a setting of a part": ("performance", ROW + 'settings = { init = { kind = ["evil.part:run"] } }\nREST'),
    "a coreset's setting": ("performance", ROW.replace("dm", "random-soft") + 'settings = {student = "evil.part:run"}\nREST'),
    "a recording": ("performance", ROW.replace("dm", "mtt") + 'experts = "e"\nREST\n[experts.e]\ndata = "digits"\ncount = 1\nepochs = 1\nnetwork = "evil.part:run"'),
    "a method of costs": ("cost", 'method = "evil.part:run"\ndata = "digits"\nipc = 1'),
    "a network of costs": ("cost", 'method = "dm"\ndata = "digits"\nipc = 1\nnetwork = "evil.part:run"'),
}  # fmt: skip


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A package whose import leaves a folder behind."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'planted')!r})\n")
    (tmp_path / "evil" / "part.py").write_text("from potstill.methods import dm as run\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "planted"
    for name in ("evil", "evil.part"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", NAMES)
def test_code_from_outside_is_not_run_because_a_row_names_it(tmp_path, evil, capsys, kind):
    table, row = NAMES[kind]
    row = row.replace("REST", 'networks = ["mlp-w4"]\nprotocol = "dc"')
    (tmp_path / "rows.toml").write_text(f'title = "t"\ntable = "{table}"\n[[row]]\n{row}\n')
    command = ["benchmark", str(tmp_path / "rows.toml"), "--out", str(tmp_path / "out"), "--no-zoo"]
    for more in (["--plan"], [], ["--networks", "mlp-w4"], ["--code", "evil,other,evil.part.run"]):
        assert main([*command, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert "rows.toml asks for 'evil.part:run', which is code from outside" in said and "\n" not in said
        assert "evil.part" in said.rpartition("--code ")[2].split(",")
        with pytest.raises(PotstillError, match="is not run because a file says so"):
            suites(str(tmp_path / "rows.toml"), [])
    assert not evil.exists() and not (tmp_path / "out").exists()


def test_a_row_runs_code_that_the_command_line_names(tmp_path, evil, capsys):
    row = NAMES["method"][1].replace("REST", 'networks = ["mlp-w4"]\nprotocol = "dc"\nname = "mine"')
    (tmp_path / "rows.toml").write_text(f'title = "t"\ntable = "performance"\n[[row]]\n{row}\n')
    command = ["benchmark", str(tmp_path / "rows.toml"), "--out", str(tmp_path / "out"), "--no-zoo", "--plan"]
    assert main([*command, "--code", "other,evil.part"]) == 0
    assert "digits/mine/1" in capsys.readouterr().out and evil.exists()
    (suite,) = suites(str(tmp_path / "rows.toml"), [], ["evil.part"])
    assert suite.rows[0].method == "evil.part:run" and suite.code == ("evil.part",)
    work = Benchmark([suite], Bench(tmp_path / "out", zoo=False))
    (planned,) = work.plan()
    assert "--code evil.part" in work._command(planned)
    for wrong in ("evil.part:run", "../evil", ".evil"):
        assert main([*command, "--code", wrong]) == 2
        assert f"--code '{wrong}' is no module" in capsys.readouterr().err
    (tmp_path / "rows.toml").write_text((tmp_path / "rows.toml").read_text().replace("evil.part:run", ".evil:run"))
    assert main(command) == 2 and "'.evil:run' is no name; package.module:name" in capsys.readouterr().err


def test_a_reader_that_is_allowed_to_run_code_would(tmp_path):
    """The check before PyTorch's reader and the reader itself hold each on its own."""
    mark = tmp_path / "planted"
    torch.save({"data": [[Planted(mark)]]}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError, match="posix"):
        checked((tmp_path / "a.pt").read_bytes())
    with pytest.raises(pickle.UnpicklingError, match="posix"):
        torch.load(tmp_path / "a.pt", weights_only=True)
    assert not mark.exists()


@pytest.mark.parametrize("gone", ["check", "weights_only"])
def test_either_of_the_two_is_enough(tmp_path, monkeypatch, gone):
    mark = tmp_path / "planted"
    torch.save({"data": [[Planted(mark)]]}, tmp_path / "a.pt")
    true = torch.load
    if gone == "check":
        monkeypatch.setattr("potstill.foreign.checked", lambda content: content)
    else:
        monkeypatch.setattr(torch, "load", lambda *a, **k: true(*a, **{**k, "weights_only": False}))
    with pytest.raises(PotstillError, match=r"it wants posix.mkdir to be run"):
        read(tmp_path / "a.pt", DATA, "standardise")
    assert not mark.exists()


# --- memory: what a file promises is held against what it has, before anything is made of it

CALL = b"%s\x8a\x09%s\x85R0"


def pickled(before):
    """A `.pt` of DC with opcodes put before its content."""
    buffer = io.BytesIO()
    torch.save({"data": [list(pair())]}, buffer)
    found = mutate.members(buffer.getvalue())
    name = next(n for n in found if n.endswith("data.pkl"))
    return mutate.archive({**found, name: found[name][:2] + before + found[name][2:]})


def bombs():
    """Small files that promise gigabytes."""
    giga = 30 << 30
    head = b"\x93NUMPY\1\0" + struct.pack("<H", 118)
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 1, 8, 8)}"
    big, lie = ((head + (text % n).ljust(117).encode() + b"\n") for n in (giga // 256, 10**12))
    y = mutate.members(saved(y=np.zeros(4, int)))["y.npy"]
    yield "a.npz", mutate.bomb({"x.npy": giga, "y.npy": 0}, {"x.npy": big, "y.npy": y})
    yield "a.npz", mutate.archive({"x.npy": lie + b"\0" * 999, "y.npy": y})
    yield "a.npz", mutate.archive({"x.npy": y, "y.npy": lie})
    yield "a.npz", saved(x=np.zeros((1 << 18, 1, 8, 8), np.float32), y=np.zeros(1 << 18, int))
    yield "a.pt", mutate.bomb({"a/data.pkl": giga, "a/version": 0}, {"a/data.pkl": b"\x80\2"})
    yield "a.pt", mutate.bomb({"a/data.pkl": 0, "a/data/0": giga}, {"a/data.pkl": b"\x80\2N."})
    number = (10**10).to_bytes(9, "little")
    yield "a.pt", pickled(CALL % (b"cbuiltins\nbytearray\n", number))
    yield "a.pt", pickled(CALL % (b"ctorch\nFloatTensor\n", number))
    hexed = (
        b"c_codecs\nencode\n" * 40
        + b"X\x10\0\0\0"
        + b"a" * 16
        + b"X\6\0\0\0latin1\x86R"
        + b"X\3\0\0\0hex\x86R" * 39
        + b"0"
    )
    yield "a.pt", pickled(hexed)
    yield "a.pt", pickled(b"cbuiltins\nset\n(" + b"K\1" * 100 + b"lR0")
    for shape, length in (
        ([10**12, 1, 8, 8], None),
        ([4, 1, 8, 8], 2**63),
        ([4, 1, 8, 8], 10**11),
        ([2**40, 2**40], None),
    ):
        header, data = mutate.split(save({"inputs": torch.zeros(4, 1, 8, 8), "labels": torch.zeros(4).long()}))
        header["inputs"]["shape"] = shape
        yield "set.safetensors", mutate.join(json.dumps(header).encode(), data, length)
    deep = json.dumps({HEADER: "[" * 10**6 + "]" * 10**6})
    yield "set.safetensors", mutate.join(b'{"__metadata__":' + deep.encode() + b"}", b"")
    yield "a.toml", b"a" + b".a" * 200_000 + b" = 1"
    yield "a.toml", b"x = " + b"[" * 200_000
    yield "a.toml", b"[" + b"a." * 100_000 + b"a]"
    yield "a.toml", b"x = 1\n" * 10**6
    head = b"IHDR" + struct.pack(">II", 11000, 11000) + b"\x08\x06\0\0\0"
    yield "train/a/a.png", head


def saved(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


READ = """
import resource, sys, zlib
from pathlib import Path
import torch
from potstill import foreign, pictures, recipe
from potstill.errors import PotstillError
from potstill.exchange import load
from potstill.testing import toy

def status(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) << 10 for l in lines if l.startswith(word + ":"))

data = toy()
torch.save({"data": [[data.train.inputs[:9], data.train.labels[:9]]]}, sys.argv[1] + "/warm.pt")
foreign.read(sys.argv[1] + "/warm.pt", data, "standardise")
limit = status("VmData") + (256 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = status("VmHWM")
for path in sorted(Path(sys.argv[1]).glob("*/*")):
    content = path.read_bytes()
    now = status("VmHWM")
    try:
        if path.name == "set.safetensors":
            load(path)
        elif path.suffix == ".toml":
            recipe.read(path)
        elif path.suffix == ".png":
            try:
                pictures.decode(path)
            except pictures.Odd as error:
                raise PotstillError(str(error))
        else:
            foreign.read(path, data, "standardise")
        print(f"{path.parent.name} LOADED")
    except PotstillError as error:
        grown = max(0, status("VmHWM") - max(now, before) - 4 * len(content)) >> 20
        print(f"{path.parent.name} {grown} {error}")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits and sizes are the system's")
def test_bombs_are_refused_before_they_take_memory(tmp_path):
    made = list(bombs())
    for i, (name, content) in enumerate(made):
        (tmp_path / f"{i:02d}").mkdir()
        if name.endswith("png"):
            buffer = io.BytesIO()
            Image.new("L", (11000, 11000)).save(buffer, "PNG", compress_level=9)
            content, name = buffer.getvalue(), "a.png"
        (tmp_path / f"{i:02d}" / name).write_bytes(content)
    command = [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(made), done.stderr[-2000:] + done.stdout
    for (name, _), line in zip(made, lines, strict=True):
        _, grown, error = line.split(" ", 2)
        assert grown.isdigit() and int(grown) < 64, f"{name}: {line[:300]}"
        assert len(error) < 1500 and "MemoryError" not in error and "allocate" not in error, line[:300]
    assert "archive bomb" in lines[0] and "archive bomb" in lines[4] and "1000000000000" in lines[1]


def test_large_files_that_are_what_they_say_still_load(tmp_path):
    """Zeros are no bomb by themselves: a mask, or the margins of pictures, compress as well."""
    x = np.zeros((30, 1, 8, 8), np.float32)
    x[:, 0, 0, 0] = np.arange(30)
    (tmp_path / "a.npz").write_bytes(saved(x=x, y=np.arange(30) % 3, more=np.zeros(4 << 20)))
    assert len(read(tmp_path / "a.npz", DATA, "standardise")[0]) == 30
    strict.check_archive(io.BytesIO(saved(x=np.random.default_rng(0).random((1 << 20,)), mask=np.zeros(2 << 20))))


# --- numbers and text


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(tmp_path, capsys, bad):
    x, y = pair()
    x[3, 0, 2, 2] = float(bad)
    np.savez(tmp_path / "a.npz", x=x.numpy(), y=y.numpy())
    torch.save({"data": [[x, y]]}, tmp_path / "a.pt")
    for file in ("a.npz", "a.pt"):
        with pytest.raises(PotstillError, match="not finite"):
            read(tmp_path / file, DATA, "standardise")
    arrays = {"x_train": x.numpy(), "y_train": y.numpy(), "x_test": x.numpy(), "y_test": y.numpy()}
    np.savez(tmp_path / "b.npz", **arrays)
    assert main(["distill", str(tmp_path / "b.npz"), "--out", str(tmp_path / "o")]) == 2
    assert "not finite (NaN or infinity), first in sample 3" in capsys.readouterr().err
    for field, words in (("scale", "not finite"), ("limits", "not finite"), ("seed", "not finite")):
        value = [float(bad), 1.0] if field == "limits" else float(bad)
        set_of(**{field: value}).save(tmp_path / "set.safetensors")
        with pytest.raises(PotstillError, match=words):
            load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": NaN}', "not finite"),
        ('{"a": -Infinity}', "not finite"),
        ('{"a": 99999999999999999999999}', "64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
    ],
)
def test_json_that_python_would_take(text, words):
    with pytest.raises(ValueError, match=words):
        strict.read_json(text)


def test_errors_are_one_line_of_printable_characters():
    assert str(PotstillError("no class '\x1b[31m\n\u202e\ud800'")) == r"no class '\x1b[31m\n\u202e\ud800'"
    assert str(PotstillError("é ± … ü 'x'")) == "é ± … ü 'x'"
    for text in ("x" * 10**6, "\x1b" * 10**6, "\U000e0001" * 10**6):
        assert len(one_line(text)) < 1300 and one_line(text).isprintable()
    several = str(PotstillError("two mistakes", "a\nb", "c"))
    assert several == "two mistakes\n  a\\nb\n  c"
    assert str(PotstillError(*map(str, range(100)))).endswith("\n  ... and 80 more")
    assert str(pickle.loads(pickle.dumps(PotstillError("one line")))) == "one line"


def test_no_terminal_is_written_to_by_a_file(tmp_path, capsys):
    """Control characters in every name that a file can bring: none reaches standard output or error."""
    evil = "\x1b[2J\x1b]0;x\x07\r\n"
    place = tmp_path / "zoo" / "d" / "m" / "1"
    place.mkdir(parents=True)
    made = set_of(class_names=[evil, "b", "c"], data=data_of()[0])
    fields = ("method", "data", "student", "protocol", "software", "fingerprint")
    made.meta = replace(made.meta, **{f: evil for f in fields})
    made.save(place / "set.safetensors")
    results = folder_of(tmp_path / "results", [cell(evil, data=evil) | {"cell": "a/b/1"}])
    record = json.loads((results / "cells/performance/a/b/1.json").read_text())
    (results / "cells/performance/a/b/2.json").write_text(json.dumps({**record, "status": evil}))
    row = {"method": "dm", "data": evil, "ipc": 1, "networks": [evil], "protocol": evil}
    (tmp_path / "rows.toml").write_text(
        "table = 'performance'\n[[row]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in row.items())
    )
    data = str(npz(tmp_path, (evil, "b", "c")))
    out = ["--out", str(tmp_path / "o")]
    codes = []
    for command in (
        ["evaluate", str(place)],
        ["evaluate", str(place), "--data", "digits"],
        ["export", str(place), "--to", "npz", *out],
        ["report", str(results), "--out", str(tmp_path / "p.html")],
        ["benchmark", str(tmp_path / "rows.toml"), "--plan"],
        ["distill", data, "--method", "random", "--no-evaluate", "--out", str(tmp_path / "run")],
        ["distill", str(tmp_path / f"{evil}.npz"), *out],
    ):
        codes.append(main(command))
    text = capsys.readouterr()
    print(table := rows(cells(tmp_path / "zoo")))
    capsys.readouterr()
    from potstill.cli import columns

    for shown in (text.out, text.err, columns(table)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown), shown
    assert codes == [2, 2, 0, 2, 2, 0, 2]


# --- markup


class Skeleton(HTMLParser):
    """What of a page is markup: elements with the names of their attributes, and the text of scripts."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.found, self.scripts, self.inside, self.words = Counter(), [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found[(tag, tuple(k for k, _ in attrs))] += 1
        self.inside = tag
        self.words += [v for _, v in attrs if v]

    def handle_endtag(self, tag):
        self.found["/" + tag] += 1
        self.inside = ""

    def handle_comment(self, data):
        self.found["comment"] += 1

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        self.words.append(data)


def test_class_names_of_a_file_stay_words_in_the_page_of_a_run(tmp_path, capsys):
    """The same data under harmless and hostile names, through the command line: the pages have the same markup."""
    pages = []
    for kind, names in (("plain", PLAIN), ("hostile", HOSTILE)):
        names = sorted(names)
        y = np.repeat(np.array(names), 3)
        x = np.random.default_rng(0).integers(0, 255, (len(y), 1, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{kind}.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        out = tmp_path / kind
        command = ["distill", str(tmp_path / f"{kind}.npz"), "--method", "random", "--no-evaluate", "--out", str(out)]
        assert main(command) == 0
        pages.append(Skeleton((out / "report.html").read_text()))
        if kind == "hostile":
            assert json.loads((out / "record.json").read_text())["data"]["class_names"] == names
            for name in names:  # they are there, in full, as words
                assert any(" ".join(name.split()) in " ".join(w.split()) for w in pages[-1].words), name
    plain, hostile = pages
    assert hostile.found == plain.found and hostile.scripts == plain.scripts
    # the same names as folders of pictures, and in a card
    export_set(tmp_path / "hostile", "png", tmp_path / "pictures")
    inside = [p.relative_to(tmp_path / "pictures").as_posix() for p in (tmp_path / "pictures").rglob("*")]
    assert len(inside) == 2 * len(HOSTILE) + 2
    assert all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and ".." not in name for name in inside)
    card = (tmp_path / "pictures" / "README.md").read_text()
    check_card(card)


def check_card(card):
    """Nothing of a name acts in Markdown: what is left unescaped is what the card itself writes."""
    prose = re.sub(r"```.*?```", "", card.split("\n---\n", 1)[1], flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", prose), "HTML"
    assert not re.search(r"(?<!\\)\]\(", re.sub(r"\(https?://[^)]*\)", "", prose)), "a link"
    titles = [line for line in prose.splitlines() if line.startswith("#")]
    assert len(titles) == len([t for t in titles if re.match(r"#{1,2} ", t)]) and "# h" not in titles
    assert all(c.isprintable() or c == "\n" for c in card)
    assert card.count("\n---\n") == 1 and card.startswith("---\n")


def everything(folder):
    """All files below a folder with their content, and all folders."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_card_and_its_set_under_hostile_names(tmp_path, monkeypatch):
    """Nothing acts in the card, and nothing is written or changed beside the folder that was asked for."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # names that are paths would lead from here
    for i, evil in enumerate([*HOSTILE, "../../up", "../up/", str(tmp_path / "absolute")]):
        made = set_of(class_names=[evil, "b", "c"])
        fields = ("method", "data", "student", "protocol", "software", "fingerprint")
        made.meta = replace(made.meta, **{f: evil for f in fields}, recipe={evil: {evil: evil}, "method": evil})
        made.save(tmp_path / f"{i}.safetensors")
        for to in ("png", "npz"):
            out = tmp_path / f"{to}{i}"
            before = everything(tmp_path)
            export_set(tmp_path / f"{i}.safetensors", to, out)
            after = everything(tmp_path)
            assert {p: c for p, c in after.items() if p.split("/")[0] != out.name} == before
            assert out.name in after and f"{out.name}/README.md" in after
            check_card((out / "README.md").read_text())


def test_words_of_records_and_sets_stay_words_in_a_benchmarks_page(tmp_path):
    """`potstill report` over records and sets with hostile names: the markup is that of harmless ones."""
    for i, evil in enumerate(" ".join(HOSTILE[k::3]) for k in range(3)):
        pages = []
        for kind, word in (("plain", "a name"), ("hostile", evil)):
            root = tmp_path / f"{kind}{i}"
            good = cell(word, data=word, suite=word, command=word, cell="x/y/1", software={word: word, "machine": {"processor": word}}, published={"accuracy": 0.5, "spread": None, "source": word, "mark": word})  # fmt: skip
            good["results"] = [{**r, "network": word, "protocol": word, "protocol_hash": word} for r in good["results"]]
            good["sets"] = [{**good["sets"][0], "path": "runs/a"}]
            bad = cell(word, data=word, suite=word, cell="x/z/1", status="failed", reason=word, sets=[], results=[])
            dear = [spent(word, ipc, float(ipc), data=word, network=word) | {"cell": f"c/{ipc}"} for ipc in (1, 2)]
            moved = cell(word, data=word, table="transfer", cell="x/t/1", results=good["results"], sets=[])
            finding = {"name": word, "claim": word, "verdict": word, "numbers": word, "command": word}
            results = folder_of(root, [good, bad, moved, *dear], [finding])
            (results / "runs" / "a").mkdir(parents=True)
            made = set_of(class_names=[word, word, "c"])
            made.meta = replace(made.meta, method=word, data=word)
            made.save(results / "runs" / "a" / "set.safetensors")
            assert main(["report", str(results), "--out", str(root / "page.html")]) == 0
            assert main(["report", str(results), "--out", str(root / "page.md")]) == 0
            pages.append(Skeleton((root / "page.html").read_text()))
        plain, hostile = pages
        assert hostile.found == plain.found, (evil, hostile.found - plain.found, plain.found - hostile.found)
        assert hostile.scripts == plain.scripts and len(hostile.scripts) == 1
        assert hostile.found[("figure", ())] == 3, "the set is in the gallery"
        lines = [(root / "page.md").read_text() for root in (tmp_path / f"plain{i}", tmp_path / f"hostile{i}")]
        assert len(lines[0].splitlines()) == len(lines[1].splitlines()) and "<" not in lines[1]
        assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines[0].splitlines()] == [
            len(re.findall(r"(?<!\\)\|", line)) for line in lines[1].splitlines()
        ]


# --- what is installed


def test_the_lock_file_has_every_dependency_with_hashes_and_names_no_place():
    home = Path(__file__).parent.parent
    lock = (home / "requirements.lock").read_text()
    project = tomllib.loads((home / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in wanted}
    entries = dict(re.findall(r"^([\w-]+)==\S+((?:.*\\\n)+)", lock, re.MULTILINE))
    assert names - set(entries) == set() and lock.count("--hash=sha256:") > len(entries)
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|/(home|root|tmp|opt|work)/", lock)


# --- paths


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..\\x", "0" * 16 + "/../x", "0" * 15 + "\0", "0" * 16 + "\n"])
def test_a_whitening_matrix_is_looked_for_beside_its_set_only(tmp_path, name):
    made = set_of(
        transform={"name": "zca", "mean": [0.5] * 3, "std": [0.25] * 3, "trailing": 2, "reg": 0.1, "matrix": name}
    )
    (tmp_path / "in").mkdir()
    made.save(tmp_path / "in" / "set.safetensors")
    for outside in ("zca-x.safetensors", "x.safetensors", "x"):
        (tmp_path / outside).write_bytes(b"")
    with pytest.raises(PotstillError, match="which is no hash"):
        load(tmp_path / "in")


@pytest.mark.parametrize("fingerprint", ["../out/aa", "*", "[0-9a-f]*", "aa/../../out/aa", ""])
def test_a_whitening_matrix_of_the_cache_is_that_of_its_data_only(tmp_path, monkeypatch, fingerprint):
    """Missing beside its set, a matrix is looked for by the fingerprint in a foreign header: that leads nowhere else."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    matrix = torch.eye(int(np.prod(set_of().shape)))
    digest = digest_of(matrix)
    for place in ("cache/zca/aa-9-0.1", "cache/out/aa-9-0.1", "out/aa-9-0.1"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / f"zca-{digest}.safetensors").write_bytes(save({"matrix": matrix}))
    said = {"name": "zca", "mean": [0.5] * 3, "std": [0.25] * 3, "trailing": 2, "reg": 0.1, "matrix": digest}
    for mark, found in ((fingerprint, False), ("aa", True)):
        set_of(transform=said, fingerprint=mark).save(tmp_path / "set.safetensors")
        assert load(tmp_path / "set.safetensors").blind != found


def test_members_of_archives_are_never_written_anywhere(tmp_path):
    x, y = pair()
    found = mutate.members(saved(x=x.numpy(), y=y.numpy()))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.npz").write_bytes(mutate.archive({**found, "../evil.npy": found["y.npy"], "/tmp/evil": b""}))
    assert len(read(tmp_path / "in" / "a.npz", DATA, "standardise")) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "in"]


@pytest.mark.parametrize("path", ["../outside", "/abs", "runs/../../outside", "zoo:../../outside", "zoo:/etc"])
def test_a_record_shows_no_set_from_outside_its_folder(tmp_path, path):
    outside = tmp_path / "outside"
    outside.mkdir()
    set_of(class_names=["SECRET", "b", "c"]).save(outside / "set.safetensors")
    path = str(outside) if path == "/abs" else path
    record = cell("dm")
    record["sets"] = [{**record["sets"][0], "path": path}]
    results = folder_of(tmp_path / "results", [record])
    assert main(["report", str(results), "--out", str(tmp_path / "p.html")]) == 0
    assert "SECRET" not in (tmp_path / "p.html").read_text()
