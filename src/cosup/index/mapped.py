"""Files that are mapped into memory: nothing is read before it is asked for, and what is read can be verified."""

import json
import math
import mmap
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosup.index.manifest import FileEntry, damaged


class MappedFile:
    """A file of an index, mapped; it stays readable when a later change of the index removes it.

    Args:
        folder: the index folder.
        entry: the file in the manifest.
    """

    def __init__(self, folder: Path, entry: FileEntry):
        self.path, self.entry = folder / entry.name, entry
        with self.path.open("rb") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._verified = False

    def verify(self) -> None:
        """Reads every byte, the first time that it is called.

        Raises:
            UserError: they are not those that were written.
        """
        if not self._verified and zlib.crc32(self.bytes) != self.entry.crc32:
            raise damaged(self.path)
        self._verified = True

    def array(self) -> npt.NDArray[Any]:
        """The array of a `.npy` file, read-only."""
        try:
            if bytes(self.bytes[:8]) != b"\x93NUMPY\x01\x00":
                raise ValueError("no .npy file of version 1")
            start = 10 + int.from_bytes(self.bytes[8:10], "little")
            dtype, shape = _header(bytes(self.bytes[10:start]).decode("latin1"))
            return np.frombuffer(self.bytes, dtype, math.prod(shape), start).reshape(shape)
        except (ValueError, TypeError, KeyError):
            raise damaged(self.path) from None


def _header(text: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of a `.npy` header, which is a Python literal.

    Read as JSON, not by `ast` as NumPy does: CPython 3.11 counts the depth of `ast` for all threads together, and
    raises SystemError when two parse at once.
    """
    json_text = text.replace("'", '"').replace("(", "[").replace(")", "]").replace("False", "false")
    header = json.loads(re.sub(r",\s*([\]}])", r"\1", json_text))
    descr = header["descr"]
    if header["fortran_order"]:
        raise ValueError("columns first")
    dtype = np.dtype([tuple(field) for field in descr] if isinstance(descr, list) else descr)
    if dtype.hasobject:
        raise ValueError("objects")
    return dtype, tuple(int(size) for size in header["shape"])
