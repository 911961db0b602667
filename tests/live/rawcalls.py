"""Receive calls that Python's socket module does not have: recvmmsg(2) and io_uring, by ctypes."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
MSG_WAITFORONE = 0x10000  # include/linux/socket.h: recvmmsg() returns when it has one
BUFFER = 1 << 16

# include/uapi/asm-generic/unistd.h: the same numbers on every architecture
IO_URING_SETUP, IO_URING_ENTER = 425, 426
# include/uapi/linux/io_uring.h
OFF_SQ_RING, OFF_CQ_RING, OFF_SQES = 0, 0x8000000, 0x10000000
OP_RECV, ENTER_GETEVENTS = 27, 1
PARAMS = struct.Struct("<10I 8IQ 8IQ")  # struct io_uring_params: 10 words, io_sqring_offsets, io_cqring_offsets
SQE = struct.Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, msg_flags, user_data
CQE = struct.Struct("<QiI")  # user_data, res, flags
assert PARAMS.size == 120
assert SQE.size == 64


class IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct user_msghdr, padded as the C compiler does."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_int), ("iov", ctypes.c_void_p), ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t), ("flags", ctypes.c_uint),
    )  # fmt: skip


class MMsgHdr(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("hdr", MsgHdr), ("len", ctypes.c_uint))


def failed() -> OSError:
    """Return the error of the last call."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


class ManyMessages:
    """recvmmsg(2) on one socket: up to `n` datagrams (or stretches of a stream) per call."""

    def __init__(self, sock: socket.socket, n: int = 16) -> None:
        self._fd, self._n = sock.fileno(), n
        self._buffers = [ctypes.create_string_buffer(BUFFER) for _ in range(n)]
        self._names = [ctypes.create_string_buffer(28) for _ in range(n)]
        self._iovecs = (IoVec * n)()
        self._headers = (MMsgHdr * n)()
        for index, header in enumerate(self._headers):
            self._iovecs[index] = IoVec(ctypes.addressof(self._buffers[index]), BUFFER)
            header.hdr.iov, header.hdr.iovlen = ctypes.addressof(self._iovecs[index]), 1

    def receive(self) -> list[tuple[bytes, int]]:
        """Return the content and the peer's port of each message."""
        for index, header in enumerate(self._headers):
            header.hdr.name, header.hdr.namelen = ctypes.addressof(self._names[index]), 28
        got = LIBC.recvmmsg(self._fd, self._headers, self._n, MSG_WAITFORONE, None)
        if got < 0:
            raise failed()
        return [
            (self._buffers[i].raw[: self._headers[i].len], int.from_bytes(self._names[i].raw[2:4], "big"))
            for i in range(got)
        ]


class Ring:
    """An io_uring that receives on one socket: one request at a time, submitted and waited for in one io_uring_enter()."""

    def __init__(self, sock: socket.socket) -> None:
        params = ctypes.create_string_buffer(PARAMS.size)
        self._fd = LIBC.syscall(IO_URING_SETUP, 8, params)
        if self._fd < 0:
            raise failed()
        words = PARAMS.unpack(params.raw)
        sq, cq = words[10:19], words[19:28]
        sq_entries, cq_entries = words[:2]
        shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._sq = mmap.mmap(self._fd, sq[6] + sq_entries * 4, shared, offset=OFF_SQ_RING)
        self._cq = mmap.mmap(self._fd, cq[5] + cq_entries * CQE.size, shared, offset=OFF_CQ_RING)
        self._sqes = mmap.mmap(self._fd, sq_entries * SQE.size, shared, offset=OFF_SQES)
        self._sq_tail, self._sq_mask, self._sq_array = sq[1], self._word(self._sq, sq[2]), sq[6]
        self._cq_head, self._cq_mask, self._cqes = cq[0], self._word(self._cq, cq[2]), cq[5]
        self._buffer = ctypes.create_string_buffer(BUFFER)
        self._socket = sock.fileno()

    @staticmethod
    def _word(ring: mmap.mmap, at: int) -> int:
        return int(struct.unpack_from("<I", ring, at)[0])

    def receive(self) -> bytes:
        """Receive once. The system call orders this thread's writes before the kernel's reads."""
        tail = self._word(self._sq, self._sq_tail)
        slot = tail & self._sq_mask
        address = ctypes.addressof(self._buffer)
        SQE.pack_into(self._sqes, slot * SQE.size, OP_RECV, 0, 0, self._socket, 0, address, BUFFER, 0, tail)
        struct.pack_into("<I", self._sq, self._sq_array + 4 * slot, slot)
        struct.pack_into("<I", self._sq, self._sq_tail, (tail + 1) & 0xFFFFFFFF)
        if LIBC.syscall(IO_URING_ENTER, self._fd, 1, 1, ENTER_GETEVENTS, None, 0) < 0:
            raise failed()
        head = self._word(self._cq, self._cq_head)
        _, result, _ = CQE.unpack_from(self._cq, self._cqes + (head & self._cq_mask) * CQE.size)
        struct.pack_into("<I", self._cq, self._cq_head, (head + 1) & 0xFFFFFFFF)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return self._buffer.raw[:result]
