"""Words read from packet bytes at any position, for the compiled kernels. They check nothing: their callers compare first."""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import config, types
from numba.extending import intrinsic

from rxlab.read.compiler import njit


def _big_endian_load(size):
    """Return a compiled function (buf, i) -> uint64 that reads `size` big-endian bytes at byte `i`, at any alignment.

    One machine load. Numba's own way, byte by byte, decodes a third slower, and is kept for runs with bounds checking.
    """
    if getattr(config, "BOUNDSCHECK", 0):

        @njit(nogil=True)
        def load_checked(buf, i):
            word = np.uint64(0)
            for k in range(size):
                word = (word << np.uint64(8)) | np.uint64(buf[i + k])
            return word

        return load_checked

    @intrinsic
    def load(typingctx, buf, i):
        def codegen(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            place = builder.gep(array.data, [args[1]])
            word = ir.IntType(8 * size)
            value = builder.bswap(builder.load(builder.bitcast(place, word.as_pointer()), align=1))
            return value if size == 8 else builder.zext(value, ir.IntType(64))

        return types.uint64(buf, types.int64), codegen

    return load


be16, be32, be64 = _big_endian_load(2), _big_endian_load(4), _big_endian_load(8)


@njit(cache=True, nogil=True, forceinline=True)
def be48(buf, i):
    """Return the big-endian 48-bit word (a MAC address) at byte `i`."""
    return (be32(buf, i) << np.uint64(16)) | be16(buf, i + 4)


@njit(cache=True, nogil=True, forceinline=True)
def load32(buf, i, swap):
    """Return the 32-bit word at byte `i`, little-endian, or big-endian with `swap`."""
    b0, b1, b2, b3 = np.int64(buf[i]), np.int64(buf[i + 1]), np.int64(buf[i + 2]), np.int64(buf[i + 3])
    if swap:
        return (b0 << 24) | (b1 << 16) | (b2 << 8) | b3
    return (b3 << 24) | (b2 << 16) | (b1 << 8) | b0
