"""What the scenarios in Python share: where they record, and the patience that an emulated machine needs."""

from __future__ import annotations

import os
from pathlib import Path

from rxlab.record import perfrecord, workload

# In the guest's memory: perf would record its own writes to the shared folder, without end.
LOCAL = Path("/run/guest")
PORTS = f"ports:{os.environ['GUEST_PEER']},{os.environ['GUEST_NIC']}"
perfrecord.ACK_TIMEOUT = 120.0
workload.READY_TIMEOUT = 120.0
