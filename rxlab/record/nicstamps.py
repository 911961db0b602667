"""Hardware stamps for one capture: the NIC told to stamp every packet, its clock opened, and both put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rxlab.errors import CaptureError
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction
from rxlab.host.phc import PtpClock
from rxlab.host.settings import parse_settings
from rxlab.record.pcaprecord import SOFTWARE_STAMPS
from rxlab.record.testbed import Endpoint

# libpcap asks for the same when it is told to use adapter stamps, and never takes it back.
STAMPING = "all/on"


@contextmanager
def nic_stamps(end: Endpoint, transaction: Transaction) -> Iterator[PtpClock]:
    """Have the NIC stamp every packet inside the ``with`` block, and give its clock.

    Raises
    ------
    CaptureError
        The NIC has no clock, or stamps only some packets.
    HostSettingError
        Stamping is the host's setting and may not be changed.
    """
    index = nic_clock(end)
    settings = parse_settings({"stamping": STAMPING}, end.iface, end.netns)
    with transaction.change(settings), PtpClock(index) as clock:
        yield clock


def nic_clock(end: Endpoint) -> int:
    """Return the number of the interface's clock (``/dev/ptpN``) if the NIC stamps every received packet by it."""
    with HostAccess(end.netns) as access:
        try:
            able = access.call(access.ethtool.timestamping, end.iface)
        except OSError as error:
            raise CaptureError(
                "hardware stamps cannot be asked for", where=end.iface, found=error.strerror, do=SOFTWARE_STAMPS
            ) from None
    index, filters = able["phc"], able["rx_filters"]
    assert isinstance(filters, list)
    if not isinstance(index, int):
        raise CaptureError("the NIC has no clock", where=end.iface, found="no PTP hardware clock", do=SOFTWARE_STAMPS)
    if "all" not in filters:
        raise CaptureError(
            "the NIC does not stamp every packet",
            where=end.iface,
            found=", ".join(filters) or "no receive filter",
            expected="all",
            do=SOFTWARE_STAMPS,
        )
    return index
