"""Files that are mapped into memory: nothing is read before it is asked for, and what is read can be verified."""

import io
import mmap
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
        header = io.BytesIO(bytes(self.bytes[:4096]))
        try:
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            return np.frombuffer(self.bytes, dtype, int(np.prod(shape)), header.tell()).reshape(shape)
        except (ValueError, SyntaxError, TypeError):
            raise damaged(self.path) from None
