"""The kernel threads of threaded NAPI: which belong to an interface, and on which CPUs they may run."""

from __future__ import annotations

import os
import re
import socket
import struct

from rxlab.host.access import HostAccess

# include/uapi/linux/netlink.h, genetlink.h, netdev.h
_NLMSGHDR = struct.Struct("=IHHII")
assert _NLMSGHDR.size == 16
_ATTRIBUTE = struct.Struct("=HH")
_NETLINK_GENERIC, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_NETDEV_CMD_NAPI_GET, _NETDEV_A_NAPI_IFINDEX, _NETDEV_A_NAPI_ID, _NETDEV_A_NAPI_PID = 11, 1, 2, 4
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3


def napi_threads(access: HostAccess, iface: str) -> list[int]:
    """Return the threads that poll an interface, in the order of its NAPI instances; none unless ``threaded`` is on.

    Before Linux 6.17 a thread outlives ``threaded``, idle until the device goes: such a thread is not counted.
    """
    if (access.try_read(f"sys/class/net/{iface}/threaded") or "0") == "0":
        return []
    if access.is_real:
        try:
            index = int(access.read(f"sys/class/net/{iface}/ifindex"))
            found = access.call(_ask_kernel, index)
            return [found[napi] for napi in sorted(found)]
        except (OSError, KeyError):
            pass  # Linux before 6.8 does not tell
    named = {}
    for name in access.list("proc"):
        comm = (access.try_read(f"proc/{name}/comm") or "") if name.isdigit() else ""
        # __napi_create: "napi/%s-%d" of device and NAPI id
        match = re.fullmatch(rf"napi/{re.escape(iface)}-(\d+)", comm)
        if match:
            named[int(match[1])] = int(name)
    return [named[napi] for napi in sorted(named)]


def allowed_cpus(access: HostAccess, tid: int) -> str:
    """Return the CPUs a task may run on, as the kernel lists them; OSError when it is gone."""
    for line in access.read(f"proc/{tid}/status").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return line.split(":")[1].strip()
    raise OSError(f"no Cpus_allowed_list in proc/{tid}/status")


def _ask_kernel(ifindex: int) -> dict[int, int]:
    """Return ``{NAPI id: thread}`` of a device of the calling thread's namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC) as kernel:
        kernel.settimeout(5)
        kernel.bind((0, 0))
        name = _attribute(_CTRL_ATTR_FAMILY_NAME, b"netdev\0")
        (family,) = _request(kernel, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, 0, name)
        number = struct.unpack("=H", family[_CTRL_ATTR_FAMILY_ID][:2])[0]
        wanted = _attribute(_NETDEV_A_NAPI_IFINDEX, struct.pack("=I", ifindex))
        rows = _request(kernel, number, _NETDEV_CMD_NAPI_GET, _NLM_F_DUMP, wanted)
    return {
        struct.unpack("=I", row[_NETDEV_A_NAPI_ID])[0]: struct.unpack("=I", row[_NETDEV_A_NAPI_PID])[0]
        for row in rows
        if _NETDEV_A_NAPI_PID in row
    }


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _request(kernel: socket.socket, family: int, command: int, flags: int, attributes: bytes) -> list[dict[int, bytes]]:
    # struct genlmsghdr: cmd, version, reserved
    body = struct.pack("=BBH", command, 1, 0) + attributes
    kernel.send(_NLMSGHDR.pack(16 + len(body), family, _NLM_F_REQUEST | flags, 1, 0) + body)
    rows: list[dict[int, bytes]] = []
    while True:
        answer, at = kernel.recv(1 << 16), 0
        while at + 16 <= len(answer):
            length, kind, _, _, _ = _NLMSGHDR.unpack_from(answer, at)
            payload = answer[at + 16 : at + length]
            at += (length + 3) & ~3
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                code = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                if code:
                    raise OSError(code, os.strerror(code))
                return rows
            rows.append(_attributes(payload[4:]))
        if not flags & _NLM_F_DUMP:
            return rows


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found
