"""Where the scenarios record, and the patience that an emulated machine needs; run as a program, the ``rxlab`` command with it."""

from __future__ import annotations

import os
from pathlib import Path

from rxlab.record import pcaprecord, perfrecord, processes, workload

# In the guest's memory: perf would record its own writes to the shared folder, without end.
LOCAL = Path("/run/guest")
PORTS = f"ports:{os.environ['GUEST_PEER']},{os.environ['GUEST_NIC']}"
pcaprecord.START_TIMEOUT = pcaprecord.STOP_TIMEOUT = 120.0
perfrecord.ACK_TIMEOUT = 600.0
perfrecord.STOP_TIMEOUT = 600.0
processes.READY_TIMEOUT = workload.READY_TIMEOUT = 600.0

if __name__ == "__main__":
    from rxlab.__main__ import main

    main()
