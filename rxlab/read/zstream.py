"""A zstd stream in pieces -> what it unpacks to, also of a stream that was cut or never ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Compressed bytes unpacked at a time. A block of 128 KiB can take 4 bytes, so a bomb's reader sees it coming within 32 MiB.
FEED = 1 << 10
# 128 MiB is the window `zstd -d` accepts without --long; more is refused before it is allocated.
MAX_WINDOW = 1 << 27


class ZstdDamage(Exception):
    """zstandard's own error: the module is imported only where something is compressed with it."""


def unpack_zstd(pieces: Iterable[bytes], *, must_end: bool = False) -> Iterator[bytes]:
    """Yield what the pieces of one stream unpack to, frame after frame.

    Not with zstandard's ``stream_reader``: where the stream has no end (perf writes none, a cut file has lost it), that one
    drops what the last piece unpacks to beyond the size of one read.

    Parameters
    ----------
    pieces : iterable of bytes
    must_end : bool
        Whether the last frame has to end, as it does in every file that was written to its end. A stream that was cut between
        two blocks shows it by nothing else.

    Raises
    ------
    ZstdDamage
        After everything before the damage.
    ImportError
        zstandard is not installed.
    """
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    frame = None
    try:
        for piece in pieces:
            for at in range(0, len(piece), FEED):
                rest = piece[at : at + FEED]
                while rest:
                    if frame is None:
                        frame = unpacker.decompressobj()
                    yield frame.decompress(rest)
                    rest, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ZstdDamage(str(error)) from None
    if must_end and frame is not None:
        raise ZstdDamage("its last frame does not end")
