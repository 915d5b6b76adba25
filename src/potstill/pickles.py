"""What may stand in the pickles of a `.pt`: checked opcode by opcode before PyTorch reads them.

PyTorch's own reader runs no code of a file (`weights_only`), but what it allows can still take all memory: a byte array
of a stated size, text encoded over and over. A distilled set needs none of that.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import re
import zipfile
from pickle import UnpicklingError

from .strict import check_archive

MOST = 4 << 20  # bytes of the pickles alone; tensors lie outside of them
WORD = 256  # characters of a string
ALLOWED = re.compile(
    r"torch(\.storage)? (\w+Storage|TypedStorage)|torch\._utils _rebuild_(tensor|tensor_v2|parameter|sparse_tensor|meta_tensor_no_storage)"
    r"|torch\.serialization _get_layout|torch (Size|device|u?int\d+|float\d+|bfloat16|bool|complex\d+)|collections OrderedDict|_codecs encode"
    r"|numpy dtype|numpy\._?core\.multiarray scalar"
)


def checked(content: bytes) -> bytes:
    """A `.pt` as PyTorch may read it; an archive is packed anew, so that what was checked is what is read.

    Args:
        content: The file.

    Raises:
        ValueError: An archive bomb, or a pickle with something else in it than tensors, numbers and words.
        UnpicklingError: It wants something to be called that no set needs.
        zipfile.BadZipFile: A damaged archive.
    """
    if content[:2] != b"PK":
        stream = io.BytesIO(content)
        for _ in range(5):  # a magic number, the version, the system, what was saved, names of storages
            check(stream)
        return content
    names = check_archive(io.BytesIO(content))
    found = [n for n in names if n.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} files data.pkl")
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in names:
            if name == found[0] and names[name].file_size > MOST:
                raise ValueError(f"its data.pkl has more than {MOST:,} bytes")
            whole = old.read(name)
            if name == found[0]:
                check(io.BytesIO(whole))
            new.writestr(zipfile.ZipInfo(name), whole)
    return buffer.getvalue()


def check(stream: io.BytesIO) -> None:
    """Go over one pickle, up to its end.

    Raises:
        ValueError: It is damaged, too long, or has text that would grow.
        UnpicklingError: It wants something to be called that no set needs.
    """
    begin = stream.tell()
    for opcode, value, _ in pickletools.genops(stream):
        if stream.tell() - begin > MOST:
            raise ValueError(f"a pickle of more than {MOST:,} bytes, without its tensors")
        if opcode.name == "GLOBAL":
            if not ALLOWED.fullmatch(str(value)):
                raise UnpicklingError(f"GLOBAL {str(value).replace(' ', '.')}")
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise UnpicklingError(f"a pickle's {opcode.name}, which no set needs")
        elif isinstance(value, str | bytes | bytearray) and opcode.arg is not None:
            if len(value) > WORD:
                raise ValueError(f"a text of {len(value):,} characters in place of tensors")
            if isinstance(value, str) and _grows(value):
                raise ValueError("text that would be encoded, which no set needs")


def _grows(name: str) -> bool:
    """Whether a word names an encoding of bytes as bytes, which can be repeated without end."""
    try:
        return not codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError, ImportError):
        return False
