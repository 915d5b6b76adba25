"""Mutations of bytes, JSON, safetensors, zip archives and pickles; all randomness comes from the generator that is given."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from random import Random
from typing import Any

import numpy as np

WORDS = [
    "",
    "a",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "\x1b[31m\x1b]0;owned\x07",
    "a\nb\n" * 300,
    "\u202e\u2066",
    "\ud800",
    "\0",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "os:system",
    "nan",
    "zca",
    "standardise",
    "none",
    "soft",
    "centred",
    "F64",
    "BOOL",
    "I64",
]
INTS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**12,
    10**30,
    10**300,
]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]


class Raw:
    """JSON text that no Python value gives: it is put in as it is."""

    def __init__(self, text: str) -> None:
        self.text = text


def value(rng: Random, raw: bool = True) -> Any:
    """Something where something else is expected."""
    kind = rng.randrange(11 if raw else 8)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(INTS)
    if kind in (3, 4):
        return rng.choice(FLOATS)
    if kind == 5:
        return rng.choice(WORDS)
    if kind == 6:
        return rng.choice(
            [
                [],
                {},
                [[]],
                [None],
                [0] * rng.choice([1, 2, 3, 100, 10000]),
                {"kind": "none"},
                {"name": "zca"},
                ["a", "b"],
            ]
        )
    if kind == 7:
        deep: Any = rng.choice([0, "x", []])
        for _ in range(rng.choice([5, 50, 200])):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if kind == 8:
        depth = rng.choice([600, 2000, 20000, 100000])
        return Raw("[" * depth + "]" * depth)
    if kind == 9:
        depth = rng.choice([600, 2000, 20000])
        return Raw('{"a":' * depth + "1" + "}" * depth)
    return Raw(
        rng.choice(
            [
                "9" * 5000,
                "1e999",
                "-1e999",
                "NaN",
                "Infinity",
                "1" + "0" * 400,
                "9" * 400 + ".5",
                '"\\ud800"',
                "00",
                "1.",
                '"\\u0000"',
            ]
        )
    )


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node below the root."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        found.append((*at, key))
        found += places(inner, (*at, key))
    return found


def tree(rng: Random, plain: Any, raw: bool = True, times: int | None = None) -> Any:
    """Plain values, a few of them changed, deleted, renamed or doubled."""
    for _ in range(times or rng.choice([1, 1, 1, 2, 4])):
        every = places(plain)
        if not every:
            return value(rng, raw)
        # shallow places as often as the many deep ones
        depth = rng.choice(sorted({len(p) for p in every}))
        path = rng.choice([p for p in every if len(p) == depth])
        parent = plain
        for key in path[:-1]:
            parent = parent[key]
        key, act = path[-1], rng.randrange(8)
        if act < 4:
            parent[key] = value(rng, raw)
        elif act == 4:
            del parent[key]
        elif act == 5 and isinstance(parent, dict):
            parent[rng.choice(WORDS)] = parent.pop(key)
        elif act == 6 and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif isinstance(parent[key], bool) or not isinstance(parent[key], int | float):
            parent[key] = rng.choice([[parent[key]], str(parent[key])[:99], {"a": parent[key]}])
        else:
            parent[key] = rng.choice(
                [
                    parent[key] + 1,
                    -parent[key],
                    parent[key] - 1,
                    float(parent[key]),
                    str(parent[key]),
                    parent[key] * 1000,
                ]
            )
    return plain


def dumps(plain: Any) -> bytes:
    """JSON, with the raw pieces in it."""
    pieces: list[str] = []

    def mark(x: Any) -> Any:
        if isinstance(x, Raw):
            pieces.append(x.text)
            return f"@raw{len(pieces) - 1}@"
        if isinstance(x, dict):
            return {str(k): mark(v) for k, v in x.items()}
        return [mark(v) for v in x] if isinstance(x, list) else x

    text = json.dumps(mark(plain))
    for i, piece in enumerate(pieces):
        text = text.replace(f'"@raw{i}@"', piece)
    return text.encode("utf-8", "surrogatepass")


def raw(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """Bytes with bits flipped, numbers set, parts cut out, doubled or taken from another file."""
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        n = len(out)
        if not n:
            return rng.randbytes(rng.randrange(64))
        # headers stand at both ends of files: there half of the changes are made
        where = rng.choice([rng.randrange(n), rng.randrange(min(n, 200)), n - 1 - rng.randrange(min(n, 200))])
        act = rng.randrange(10)
        if act < 3:
            out[where] ^= 1 << rng.randrange(8)
        elif act == 3:
            out[where] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif act == 4:
            size = rng.choice([2, 4, 8])
            number = rng.choice(INTS) & ((1 << (8 * size)) - 1)
            out[where : where + size] = number.to_bytes(size, rng.choice(["little", "big"]))
        elif act == 5:
            del out[where:]
        elif act == 6:
            del out[where : where + rng.choice([1, 2, 8, 100])]
        elif act == 7:
            out[where:where] = out[where : where + rng.choice([1, 8, 100])] * rng.choice([1, 3])
        elif act == 8:
            out[where:where] = rng.randbytes(rng.choice([1, 4, 40]))
        elif other:
            start = rng.randrange(len(other))
            out[where:] = other[start:]
    return bytes(out)


# --- safetensors


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a whole safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Header and data as a file; the length may lie."""
    return struct.pack("<Q", (len(header) if length is None else length) & (2**64 - 1)) + header + data


def safetensors(rng: Random, content: bytes, own: str = "potstill") -> bytes:
    """A safetensors file with another header, another inner header, other entries or other numbers."""
    header, data = split(content)
    act = rng.randrange(6)
    if act == 0:
        return join(
            dumps(header),
            data,
            rng.choice([0, 1, 2, 7, 2**31, 2**32, 2**63, 2**64 - 1, 10**8, len(dumps(header)) + rng.choice([-1, 1])]),
        )
    if act == 1:
        return join(dumps(tree(rng, header)), data)
    if act in (2, 3) and own in header.get("__metadata__", {}):
        inner = dumps(tree(rng, json.loads(header["__metadata__"][own])))
        inner = raw(rng, inner) if rng.random() < 0.1 else inner
        header["__metadata__"][own] = inner.decode("utf-8", "replace")
        return join(dumps(header), data)
    entries = [k for k in header if k != "__metadata__"]
    if act == 4 and entries:
        entry = header[rng.choice(entries)]
        what = rng.randrange(5)
        if what == 0:
            entry["dtype"] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "U64"]
            )
        elif what == 1:
            entry["shape"] = rng.choice(
                [
                    [],
                    [0],
                    [1],
                    [10**12],
                    [2**32, 2**32],
                    [2**63],
                    [10**6] * 6,
                    [-1],
                    [0, 2**62],
                    entry["shape"][::-1],
                    [1] * 100,
                    [*entry["shape"], 1],
                    [*entry["shape"][:-1], 0],
                ]
            )
        elif what == 2:
            entry["data_offsets"] = [
                rng.choice([0, 1, 8, 2**32, 2**63, len(data)]),
                rng.choice([0, 1, 8, 2**40, 2**64 - 1, len(data)]),
            ]
        elif what == 3:
            header[rng.choice([*WORDS, "inputs", "labels", "matrix", "lr"])] = dict(entry)
        else:
            name = rng.choice(entries)
            header[rng.choice(["lr", "matrix", "inputs", "labels", "00000"])] = header.pop(name)
        return join(dumps(header), data)
    if len(data) >= 8:
        out = bytearray(data)
        for _ in range(rng.choice([1, 3])):
            at = 4 * rng.randrange(len(out) // 4)
            out[at : at + 4] = rng.choice(
                [
                    b"\0\0\xc0\x7f",
                    b"\0\0\x80\x7f",
                    b"\0\0\x80\xff",
                    b"\xff\xff\x7f\x7f",
                    b"\0\0\0\0",
                    b"\xff" * 4,
                    b"\1\0\0\0",
                    b"\0\0\0\x80",
                ]
            )
        return join(dumps(header), bytes(out))
    return raw(rng, content)


# --- zip archives


def members(content: bytes) -> dict[str, bytes]:
    """The files in an archive, by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        return {i.filename: opened.read(i) for i in opened.infolist()}


def archive(found: dict[str, bytes], deflated: bool = False) -> bytes:
    """An archive with right checksums, so that its content reaches the parser."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as opened:
        for name, content in found.items():
            opened.writestr(
                zipfile.ZipInfo(name.encode(errors="replace").decode()),
                content,
                zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED,
            )
    return buffer.getvalue()


def bomb(sizes: dict[str, int], heads: dict[str, bytes] | None = None) -> bytes:
    """An archive of members that inflate to so many zeros behind a head; written without inflating them.

    A gigabyte of zeros is a thousand equal deflate blocks; checksums are left wrong, as a bomb need not be right.
    """
    heads = heads or {}
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    whole = block.compress(b"\0" * (1 << 20)) + block.flush(zlib.Z_FULL_FLUSH)
    local, central, offset = [], [], 0
    for name, size in sizes.items():
        first = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = first.compress(heads.get(name, b"")) + first.flush(zlib.Z_FULL_FLUSH) + whole * (size >> 20) + b"\x03\0"
        size = len(heads.get(name, b"")) + (size >> 20 << 20)
        encoded = name.encode()
        extra = struct.pack("<HHQQ", 1, 16, size, len(body))
        common = struct.pack("<HHHHHLLLHH", 45, 0, 8, 0, 33, 0, 2**32 - 1, 2**32 - 1, len(encoded), len(extra))
        local.append(b"PK\3\4" + common + encoded + extra + body)
        central.append(
            b"PK\1\2" + struct.pack("<H", 45) + common + struct.pack("<HHHLL", 0, 0, 0, 0, offset) + encoded + extra
        )
        offset += len(local[-1])
    middle = b"".join(central)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, len(central), len(central), len(middle), offset, 0)
    return b"".join(local) + middle + end


def zipped(rng: Random, content: bytes, inner: Any, other: bytes = b"") -> bytes:
    """An archive with a member changed by `inner`, renamed, doubled, left out or blown up."""
    found = members(content)
    name, act = rng.choice(list(found)), rng.randrange(10)
    if act < 6:
        found[name] = inner(rng, name, found[name])
    elif act == 6:
        found[rng.choice([*WORDS[:10], "../" + name, "data.pkl", "x.npy", name.upper()])[:60000]] = found.pop(name)
    elif act == 7:
        del found[name]
    elif act == 8:
        return raw(rng, archive(found, rng.random() < 0.5), other)
    elif rng.random() < 0.1:
        return bomb({n: 300 << 20 if n == name else 0 for n in found}, {n: c for n, c in found.items()})
    else:
        found["comment/" + name] = rng.randbytes(10)
    return archive(found, rng.random() < 0.3)


def npy(rng: Random, name: str, content: bytes) -> bytes:
    """An array's file with another header, other numbers or other bytes."""
    act = rng.randrange(6)
    if act == 0 or not content.startswith(b"\x93NUMPY"):
        return raw(rng, content)
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if act == 1:
        kind = rng.choice(
            ["f8", "f4", "f2", ">f4", "c8", "i8", "i2", "u8", "u4", "?", "U3", "S3", "O", "M8[s]", "m8[s]"]
        )
        array = (
            array.astype(object)
            if kind == "O"
            else np.resize(
                np.zeros(1, kind) if array.dtype.kind == "U" else array.astype("i8").astype(kind), array.shape
            )
        )
    elif act == 2 and array.dtype.kind == "f" and array.size:
        array.flat[rng.randrange(array.size)] = rng.choice(FLOATS)
    elif act == 2 and array.dtype.kind in "iu" and array.size:
        array.flat[rng.randrange(array.size)] = (
            rng.randrange(-100, 100) % 256 if array.dtype.itemsize == 1 else rng.choice([-1, 0, 3, 99, 2**31 - 1])
        )
    elif act == 3:
        array = np.atleast_1d(array)
        array = rng.choice(
            [
                array[:0],
                array[:1],
                array.reshape(-1),
                array[..., None],
                array[None],
                np.asarray(array.flat[0] if array.size else 0),
                array[:, None],
                array.T,
            ]
        )
    elif act == 4:
        head = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        key = rng.choice(list(head))
        head[key] = {
            "descr": rng.choice(
                [
                    "<f8",
                    "|O",
                    "<U1000000000",
                    "|V99999999999",
                    "<f4 ",
                    "os",
                    [("a", "<f8")] * 3,
                    [("a", [("b", "|O")])],
                    None,
                    "<c16",
                    ">i8",
                    "|S0",
                    "<U0",
                ]
            ),
            "fortran_order": rng.choice([True, 1, None, "x"]),
            "shape": rng.choice(
                [
                    (10**12,),
                    (2**63,),
                    (-1,),
                    (10**6, 10**6),
                    (2**32, 2**32),
                    (),
                    (0, 10**15),
                    (1,) * 70,
                    "x",
                    (1.5,),
                    (True,),
                    [3],
                    10**9,
                    (10**9,),
                    (10**10,),
                ]
            ),
        }[key]
        text = (repr(head) if rng.random() < 0.9 else "(" * 3000 + ")" * 3000).encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", min(len(text), 65535)) + text + array.tobytes()
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


# --- pickles


class Bomb:
    """Makes a folder when a pickle of it is opened by a reader that runs what it is told."""

    def __init__(self, mark: str, how: int = 0) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> Any:
        if self.how % 6 == 5:
            return np.float64(0).__reduce__()[0], (np.dtype("O"), pickle.dumps(Bomb(self.mark)))
        return [
            (os.mkdir, (self.mark,)),
            (os.system, (f"mkdir {self.mark}",)),
            (eval, (f"__import__('os').mkdir({self.mark!r})",)),
            (exec, (f"import os; os.mkdir({self.mark!r})",)),
            (os.makedirs, (self.mark,)),
        ][self.how % 6]


GLOBALS = [
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\nbytearray\n",
    b"c_codecs\nencode\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nTensor\n",
    b"ctorch\nFloatTensor\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch\nload\n",
    b"ctorch\nSize\n",
    b"cnumpy._core.multiarray\nscalar\n",
    b"cnumpy\ndtype\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nmkdir\n",
]
OPCODES = b"(.012FIJKLMNRSTUVXabcdhjgilopqrstue}])\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98BCGQ"


def pickled(rng: Random, name: str, content: bytes) -> bytes:
    """A pickle with other opcodes, numbers, strings or calls in it; other members of an archive with other bytes."""
    if "data/" in name or name.endswith(("version", "byteorder", "alignment", ".storage_alignment")):
        return raw(rng, content)
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, act = rng.randrange(max(1, len(out))), rng.randrange(8)
        if act == 0 and out:
            out[at] = rng.choice(OPCODES)
        elif act == 1:
            out[at:at] = bytes([rng.choice(OPCODES)])
        elif act == 2:
            number = rng.choice(INTS)
            size = (number.bit_length() + 8) // 8
            out[at:at] = b"\x8a" + bytes([min(size, 255)]) + number.to_bytes(max(size, 1), "little", signed=True)[:255]
        elif act == 3:
            out[at:at] = rng.choice(GLOBALS)
        elif act == 4:  # a call with a number, its result taken off the stack again
            number = rng.choice([0, 1, 10**6, 10**10, 10**12, 2**62])
            out[2:2] = rng.choice(GLOBALS) + b"\x8a\x09" + number.to_bytes(9, "little") + b"\x85R0"
        elif act == 5:  # numbers in place of numbers
            spots = [i for i in range(len(out) - 5) if out[i] in b"KMJ"]
            if spots:
                i = rng.choice(spots)
                size = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[out[i]]
                number = rng.choice(INTS)
                out[i : i + 1 + size] = rng.choice(
                    [
                        bytes([out[i]]) + (number & ((1 << 8 * size) - 1)).to_bytes(size, "little"),
                        b"\x8a\x09" + (number & (2**71 - 1)).to_bytes(9, "little"),
                    ]
                )
        elif act == 6:
            deep = rng.choice([10, 100, 1000, 1000, 5000])
            out[2:2] = b"]" * deep + b"a" * (deep - 1) + b"0"
        else:
            return raw(rng, bytes(out))
    return bytes(out)
