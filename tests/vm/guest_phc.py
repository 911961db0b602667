"""Runs in the guest: the igb's clock read, its stamping switched on and put back, and one run with hardware stamps recorded.

The igb that QEMU emulates (82576) stamps PTP event messages only, and of those only what lies right above Ethernet, so tcpdump
cannot take its stamps (libpcap wants every packet stamped). This script sends such messages through the igb and writes the
capture itself; all else is rxlab's own.
The folder to fill is the only argument.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rxlab.errors import RxlabError
from rxlab.host.clockread import ClockSampler
from rxlab.host.ethtool import Ethtool
from rxlab.host.journal import apply
from rxlab.host.phc import PtpClock
from rxlab.host.settings import parse_settings
from rxlab.host.topology import local_identity, snapshot_host
from rxlab.record import perfrecord
from rxlab.record.nicstamps import nic_clock
from rxlab.record.perfrecord import PerfRecorder
from rxlab.record.ports import open_testbed
from rxlab.record.testbed import in_netns
from rxlab.rundir import write_json
from rxlab.stages import EVENT_PRESETS

# perf opens its events on an emulated machine in 30 to 60 s.
perfrecord.ACK_TIMEOUT = 240.0
LOCAL = Path("/run/guest")  # in the guest's memory
MESSAGES = 200
# include/uapi/asm-generic/socket.h; include/uapi/linux/net_tstamp.h: SOF_TIMESTAMPING_RX_HARDWARE, _RAW_HARDWARE
SO_TIMESTAMPING = 37
RX_HARDWARE, RAW_HARDWARE = 1 << 2, 1 << 6
# A PTP version 2 Sync message: messageType 0, versionPTP 2, messageLength 44, and a recognisable clock identity.
SYNC = struct.pack(">BBHBBHqI8sHHBb10x", 0x00, 2, 44, 0, 0, 0, 0, 0, b"rxlab-ph", 1, 0, 0, 0)
ETH_P_1588 = 0x88F7
SENDER = """
import random, socket, sys, time
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind((sys.argv[1], 0))
random.seed(1)
for number in range(int(sys.argv[2])):
    frame = bytearray.fromhex(sys.argv[3])
    frame[44:46] = number.to_bytes(2, "big")
    out.send(frame)
    time.sleep(random.expovariate(25))
"""


def clock_seen_otherwise(index: int) -> Any:
    """Return a function that reads the PHC as a POSIX clock: another system call, another path through the driver."""
    descriptor = os.open(f"/dev/ptp{index}", os.O_RDONLY)
    # include/linux/posix-timers.h: FD_TO_CLOCKID(fd) = (~fd << 3) | CLOCKFD
    clockid = (~descriptor << 3) | 3
    return lambda: time.clock_gettime_ns(clockid)


def read_both_ways(index: int) -> dict[str, Any]:
    """Return cross-stamps of the PHC, and what clock_gettime() of the same clock says meanwhile, between MONOTONIC readings."""
    read = clock_seen_otherwise(index)
    seen = []
    with PtpClock(index) as clock, ClockSampler(phc=clock) as sampler:
        capabilities = clock.capabilities()
        for _ in range(60):
            time.sleep(0.05)
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            nic = read()
            seen.append((before, nic, time.clock_gettime_ns(time.CLOCK_MONOTONIC)))
    return {"capabilities": capabilities, "seen": seen, **sampler.to_json()}


class HardwareCapture(threading.Thread):
    """An AF_PACKET socket whose received packets carry the NIC's stamps, written as a nanosecond pcap."""

    def __init__(self, iface: str, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.stop = path, threading.Event()
        self.packets: list[tuple[int, bytes]] = []
        self.received = 0
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_1588))
        self.socket.bind((iface, ETH_P_1588))
        self.socket.settimeout(0.2)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, RX_HARDWARE | RAW_HARDWARE)

    def run(self) -> None:
        """Take packets until told to stop."""
        while not self.stop.is_set():
            try:
                content, control, _, _ = self.socket.recvmsg(2048, 512)
            except TimeoutError:
                continue
            self.received += 1
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPING:
                    # struct scm_timestamping: software, unused, hardware
                    stamps = struct.unpack("=6q", value[:48])
                    if stamps[4] or stamps[5]:
                        self.packets.append((stamps[4] * 10**9 + stamps[5], content))

    def save(self) -> None:
        """Write what was stamped by the NIC."""
        with self.path.open("wb") as stream:
            stream.write(struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1))
            for at, content in self.packets:
                stream.write(struct.pack("=IIII", at // 10**9, at % 10**9, len(content), len(content)) + content)


def mac_of(iface: str, netns: str | None = None) -> bytes:
    """Return an interface's hardware address."""
    [mac] = local_identity(iface, netns)[0]
    return bytes.fromhex(mac.replace(":", ""))


def record(folder: Path, sender: str, captured: str) -> dict[str, Any]:
    """Record PTP event messages through the igb with hardware stamps, as a run directory."""
    run = LOCAL / "run"
    run.mkdir()
    tool = Ethtool()
    with (
        apply(journal_dir=folder / "journal", allow_system_changes=True) as journal,
        open_testbed(f"ports:{sender},{captured}", registry=journal) as bed,
    ):
        said = {"able": tool.timestamping(captured), "stamping_before": tool.stamping(captured)}
        index = said["able"]["phc"]  # type: ignore[index]
        try:
            nic_clock(bed.dst)
        except RxlabError as error:
            said["refusal"] = error.line()
        write_json(run / "host.json", snapshot_host(captured, None))
        macs, addresses = local_identity(captured, None)
        settings = parse_settings({"stamping": "ptpv2-event/on"}, captured)
        with journal.change(settings, inexact="record"), PtpClock(index) as clock:
            said["stamping_during"] = tool.stamping(captured)
            capture = HardwareCapture(captured, run / "rx.pcap")
            with ClockSampler(phc=clock) as sampler:
                perf = PerfRecorder(run / "perf.data", list(EVENT_PRESETS["std"]), 512)
                perf.start()
                capture.start()
                started = time.time_ns()
                frame = mac_of(captured) + mac_of(sender, bed.src.netns) + ETH_P_1588.to_bytes(2, "big") + SYNC
                argv = [sys.executable, "-c", SENDER, sender, str(MESSAGES), frame.hex()]
                subprocess.run(in_netns(bed.src.netns, argv), check=True, timeout=120)
                time.sleep(1.0)
                stopped = time.time_ns()
                told = perf.stop()
            capture.stop.set()
            capture.join()
            capture.save()
            write_json(run / "clock.json", sampler.to_json())
        said["stamping_after"] = tool.stamping(captured)
        said |= {"received": capture.received, "hardware_stamped": len(capture.packets)}
        write_json(
            run / "run.json",
            {
                "status": "complete", "problems": [], "command": ["guest_phc"], "testbed": bed.describe(), "iface": captured,
                "netns": None, "local_macs": macs, "local_addresses": addresses, "arm": "std", "stamps": "nic",
                "workload": None, "configuration": {}, "start_ns": started, "stop_ns": stopped, "perf": told, "tcpdump": None,
                "idle": {}, "sweep": None, "asked": {}, "got": {},
            },
        )  # fmt: skip
    shutil.copytree(run, folder / "run")
    return said


def main() -> None:
    """Do both checks and leave ``phc.json`` and ``run`` in the folder given."""
    folder = Path(sys.argv[1])
    sender, captured = os.environ["GUEST_PEER"], os.environ["GUEST_NIC"]
    index = Ethtool().timestamping(captured)["phc"]
    subprocess.run(["ip", "link", "set", "dev", captured, "up"], check=True)
    found: dict[str, Any] = {"clock": read_both_ways(int(str(index)))}
    (folder / "phc.json").write_text(json.dumps(found))
    subprocess.run(["ip", "link", "set", "dev", captured, "down"], check=True)
    found["stamps"] = record(folder, sender, captured)
    (folder / "phc.json").write_text(json.dumps(found))
    print(json.dumps(found["stamps"]))


if __name__ == "__main__":
    main()
