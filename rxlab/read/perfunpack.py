"""Compressed records (``perf record -z``): one zstd stream cut into records at any byte -> the records it held."""

from __future__ import annotations

import mmap
import tempfile

import numpy as np

from rxlab.read import perfrecords as rec
from rxlab.read.zstream import ZstdDamage, unpack_zstd

# perf compresses ring-buffer pages at level 1: factors of 3 to 20 are usual, of a hundred unheard of. A stream that
# grows more than this is a bomb and is cut here.
MAX_FACTOR = 200
ALWAYS_ALLOWED = 16 << 20

# More than this goes to an unlinked temporary file instead of memory, so that a long recording fits a small machine.
IN_MEMORY = 64 << 20


class Unpacker:
    """Collects the compressed records of one segment and unpacks them.

    Parameters
    ----------
    big : bool
        Byte order of the file.
    """

    def __init__(self, big: bool) -> None:
        self._order: str = "big" if big else "little"
        self._buffer = np.empty(0, np.uint8)
        self._spans: list[tuple[int, int]] = []

    @property
    def n_records(self) -> int:
        """Number of compressed records."""
        return len(self._spans)

    def add(self, buffer: np.ndarray, at: int, kind: int, size: int) -> None:
        """Add the compressed record at `at`."""
        self._buffer = buffer
        if kind == rec.RECORD_COMPRESSED2:
            length = int.from_bytes(buffer[at + 8 : at + 16].tobytes(), "big" if self._order == "big" else "little")
            self._spans.append((at + 16, min(at + 16 + length, buffer.size)))
        else:
            self._spans.append((at + 8, at + size))

    def unpack(self, feature: bytes | None) -> tuple[np.ndarray, str]:
        """Return the unpacked bytes and what went wrong ('' when nothing did); damage ends them early."""
        limit = ALWAYS_ALLOWED + MAX_FACTOR * sum(end - start for start, end in self._spans)
        problem = ""
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as store:
            try:
                for unpacked in unpack_zstd(self._buffer[start:end].tobytes() for start, end in self._spans):
                    if store.tell() + len(unpacked) > limit:
                        problem = f"compressed records grow beyond {limit} bytes: cut there"
                        break
                    store.write(unpacked)
            except ImportError:
                problem = "records are compressed with zstd; pip install zstandard"
            except ZstdDamage as error:
                problem = f"damaged compressed record: {error}"
            return _as_array(store), problem


def _as_array(store: tempfile.SpooledTemporaryFile) -> np.ndarray:
    size = store.tell()
    if size <= IN_MEMORY:
        store.seek(0)
        return np.frombuffer(store.read(), np.uint8)
    store.flush()
    return np.frombuffer(mmap.mmap(store.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
