"""A zstd stream in pieces -> what it unpacks to, also of a stream that was cut or never ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Compressed bytes unpacked at a time. A block of 128 KiB can take 4 bytes, so a bomb's reader sees it coming within 32 MiB.
FEED = 1 << 10
# 128 MiB is the window `zstd -d` accepts without --long; more is refused before it is allocated.
MAX_WINDOW = 1 << 27


class ZstdDamage(Exception):
    """zstandard's own error: the module is imported only where something is compressed with it."""


def unpack_zstd(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what the pieces of one stream unpack to, frame after frame.

    Not with zstandard's ``stream_reader``: where the stream has no end (perf writes none, a cut file has lost it), that one
    drops what the last piece unpacks to beyond the size of one read.

    Raises
    ------
    ZstdDamage
        After everything before the damage.
    ImportError
        zstandard is not installed.
    """
    import zstandard

    stream = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(read_across_frames=True)
    try:
        for piece in pieces:
            for at in range(0, len(piece), FEED):
                yield stream.decompress(piece[at : at + FEED])
    except zstandard.ZstdError as error:
        raise ZstdDamage(str(error)) from None
