"""rxlab: follow every received packet from the NIC to the recvmsg() that returned it.

The map (each folder imports only from those before it on its side)::

    host -> record -> RUN DIRECTORY -> read -> follow -> dataset -> show

The pipeline in six lines::

    import rxlab
    run = rxlab.open_run("data/tcp-rps-off")     # a directory that `rxlab capture` wrote
    tree = run.analyze()                          # xarray.DataTree: /packets /hops /coverage /clocks /counters
    tree["hops"]["latency"].sel(hop="wakeup_latency").median()
    print(run.verify())                           # the join against the workload's own log
    rxlab.write_report([run], "report.html")      # one self-contained page

Names are loaded on first use, so ``import rxlab`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module it lives in.
_PUBLIC = {
    "open_run": "rxlab.dataset.run",
    "Run": "rxlab.dataset.run",
    "compare": "rxlab.pipeline",
    "write_report": "rxlab.show.report",
    "read_perfdata": "rxlab.read.perfdata",
    "read_pcap": "rxlab.read.pcap",
    "dissect": "rxlab.read.dissect",
    "capture": "rxlab.record.capture",
    "apply": "rxlab.host.journal",
    "restore": "rxlab.host.recovery",
    "doctor": "rxlab.doctor",
    "open_dataset": "rxlab.dataset.store",
    "validate": "rxlab.dataset.schema",
    "RxlabError": "rxlab.errors",
    "STAGES": "rxlab.stages",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 -- names are resolved lazily below

if TYPE_CHECKING:
    from rxlab.errors import RxlabError as RxlabError
    from rxlab.stages import STAGES as STAGES


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rxlab' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    module = import_module(_PUBLIC[name])
    return module if name == "doctor" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
