"""host/phc.py: the layouts of the PTP ioctls against the C compiler's numbers, and the choice of the method."""

from __future__ import annotations

import ctypes
import errno
import struct
import subprocess
import time
from pathlib import Path

import pytest

from rxlab.errors import ClockError
from rxlab.host import phc
from rxlab.host.phc import PtpClock


def test_ioctl_numbers() -> None:
    # as a C compiler gives them for include/uapi/linux/ptp_clock.h
    assert phc.PTP_CLOCK_GETCAPS == 0x80503D01
    assert phc.PTP_SYS_OFFSET == 0x43403D05
    assert phc.PTP_SYS_OFFSET_PRECISE == 0xC0403D08
    assert phc.PTP_SYS_OFFSET_EXTENDED == 0xC4C03D09


def test_no_such_clock() -> None:
    with pytest.raises(ClockError, match=r"/dev/ptp9999: NIC clock cannot be opened: found No such file"):
        PtpClock(9999)


class FakeDriver:
    """Answers the ioctls of one made-up PHC; `has` names those it knows."""

    def __init__(self, has: set[str], raw_clock: bool = True) -> None:
        self.has, self.raw_clock = has, raw_clock

    def __call__(self, file: int, request: int, buffer: ctypes.Structure) -> int:
        def stamp(index: int, ns: int) -> None:
            struct.pack_into("=qII", buffer, 16 + 16 * index, ns // 10**9, ns % 10**9, 0)

        if request == phc.PTP_SYS_OFFSET_EXTENDED and "extended" in self.has:
            n_samples, clock = struct.unpack_from("=II", buffer)
            if clock != time.CLOCK_REALTIME and not self.raw_clock:
                raise OSError(errno.EINVAL, "reserved word")
            for row in range(n_samples):
                width = 500 if row != 7 else 100
                stamp(3 * row, 10**18 + 10**6 * row)
                stamp(3 * row + 1, 37 * 10**9 + 10**6 * row + width // 2)
                stamp(3 * row + 2, 10**18 + 10**6 * row + width)
        elif request == phc.PTP_SYS_OFFSET and "plain" in self.has:
            n_samples = struct.unpack_from("=I", buffer)[0]
            for index in range(2 * n_samples + 1):
                stamp(index, 10**18 + 1000 * index - (900 if index == 6 else 0))
        elif request == phc.PTP_SYS_OFFSET_PRECISE and "precise" in self.has:
            for index, ns in enumerate((37 * 10**9 + 1, 10**18 + 2, 10**9 + 3)):
                struct.pack_into("=qII", buffer, 16 * index, ns // 10**9, ns % 10**9, 0)
        else:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return 0


def ptp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: FakeDriver) -> PtpClock:
    monkeypatch.setattr(phc.os, "open", lambda *args: 0)
    monkeypatch.setattr(phc.fcntl, "ioctl", driver)
    return PtpClock(3)


def test_the_best_method_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = ptp(monkeypatch, tmp_path, FakeDriver({"precise", "extended", "plain"}))
    assert clock.read("before") == {
        "when": "before",
        "index": 3,
        "phc": 37 * 10**9 + 1,
        "method": "precise",
        "clock": "raw",
        "before": 10**9 + 3,
        "after": 10**9 + 3,
    }


@pytest.mark.parametrize(("raw_clock", "name"), [(True, "raw"), (False, "real")])
def test_extended_keeps_the_narrowest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raw_clock: bool, name: str
) -> None:
    reading = ptp(monkeypatch, tmp_path, FakeDriver({"extended"}, raw_clock)).read("during")
    assert (reading["method"], reading["clock"]) == ("extended", name)
    assert reading["before"] == 10**18 + 7 * 10**6
    assert reading["after"] - reading["before"] == 100
    assert reading["phc"] == 37 * 10**9 + 7 * 10**6 + 50


def test_plain_keeps_the_narrowest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reading = ptp(monkeypatch, tmp_path, FakeDriver({"plain"})).read("after")
    assert reading["method"] == "plain"
    assert (reading["before"], reading["phc"], reading["after"]) == (10**18 + 4000, 10**18 + 5000, 10**18 + 5100)


def test_a_clock_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ClockError, match="expected PTP_SYS_OFFSET_PRECISE"):
        ptp(monkeypatch, tmp_path, FakeDriver(set())).read("before")


def test_the_method_is_chosen_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that fails later is an error, not a reason to change to a worse clock in the middle of a recording."""
    driver = FakeDriver({"extended", "plain"})
    clock = ptp(monkeypatch, tmp_path, driver)
    clock.read("before")
    assert (clock.method, clock.clock) == ("extended", "raw")
    driver.has = {"plain"}
    with pytest.raises(ClockError, match=r"/dev/ptp3: .*found not supported"):
        clock.read("during")


def test_a_failure_is_not_a_missing_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(file: int, request: int, buffer: ctypes.Structure) -> int:
        raise OSError(errno.ENODEV, "No such device")

    clock = ptp(monkeypatch, tmp_path, FakeDriver(set()))
    monkeypatch.setattr(phc.fcntl, "ioctl", gone)
    with pytest.raises(ClockError, match="found No such device"):
        clock.read("before")


def test_layouts_equal_the_c_compiler_s(tmp_path: Path) -> None:
    """Sizes and offsets as gcc lays out the uapi header, where this machine has both."""
    fields = {
        phc.PtpClockTime: ("ptp_clock_time", ["sec", "nsec", "reserved"]),
        phc.PtpClockCaps: ("ptp_clock_caps", ["max_adj", "pps", "n_pins", "cross_timestamping"]),
        phc.PtpSysOffset: ("ptp_sys_offset", ["n_samples", "rsv", "ts"]),
        phc.PtpSysOffsetExtended: ("ptp_sys_offset_extended", ["n_samples", "ts"]),
        phc.PtpSysOffsetPrecise: ("ptp_sys_offset_precise", ["device", "sys_realtime", "sys_monoraw"]),
    }
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/ptp_clock.h>", "int main(void) {"]
    expected = []
    for struct_type, (name, members) in fields.items():
        lines.append(f'printf("%zu\\n", sizeof(struct {name}));')
        expected.append(ctypes.sizeof(struct_type))
        for member in members:
            lines.append(f'printf("%zu\\n", offsetof(struct {name}, {member}));')
            expected.append(getattr(struct_type, member).offset)
    source = tmp_path / "layout.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    try:
        subprocess.run(["cc", "-o", str(tmp_path / "layout"), str(source)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler with the kernel's headers: {error}")
    printed = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in printed.split()] == expected
