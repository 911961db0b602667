"""Click on a packet and see its life; move sliders over configurations and quantiles: a page of its own, no kernel behind it.

The data of the sliders and of some thousand packets travel inside the page, which therefore works in JupyterLab, in an exported
notebook and from a file, and loads nothing. How many packets a run has does not matter: the slowest and evenly spaced ones are shown.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr

from rxlab.dataset import explain, schema, stats
from rxlab.errors import RxlabError
from rxlab.show.packetplots import packet_steps
from rxlab.show.plots import PHASES
from rxlab.show.style import SERIES
from rxlab.stages import STAGES

TEMPLATE = "explorer.html"
SLOWEST, SPACED = 300, 1200  # packets of a configuration that can be clicked on
LEVELS = (0.01, 0.05, *np.arange(0.1, 0.91, 0.1).round(2).tolist(), 0.95, 0.98, 0.99, 0.995, 0.999)
HEIGHT = 720


class Explorer:
    """The page; shows itself in a notebook.

    Parameters
    ----------
    configurations : mapping of str to sequence of xarray.DataTree
        Label -> traced runs; the first run's packets can be clicked on, the sliders show the mean of all.
    """

    def __init__(self, configurations: Mapping[str, Sequence[xr.DataTree]]) -> None:
        self.content = {
            "stages": [{"name": stage.name, "function": stage.function, "source": stage.source} for stage in STAGES],
            "phases": [{"name": name, "hops": list(hops), "colour": colour} for name, (hops, colour) in PHASES.items()],
            "cpus": list(SERIES),
            "levels": list(LEVELS),
            "configurations": [_configuration(label, list(trees)) for label, trees in configurations.items() if trees],
        }
        if not self.content["configurations"]:
            raise RxlabError("nothing to explore", expected="at least one traced run")

    def page(self) -> str:
        """Return the page."""
        environment = jinja2.Environment(loader=jinja2.PackageLoader("rxlab.show"), autoescape=True)
        # "</script>" inside a text would end the script.
        content = json.dumps(self.content, separators=(",", ":")).replace("<", "\\u003c")
        return environment.get_template(TEMPLATE).render(content=content)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file."""
        target = Path(path)
        target.write_text(self.page(), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        page = html.escape(self.page(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:{HEIGHT}px;border:0" title="packets"></iframe>'


def _configuration(label: str, trees: list[xr.DataTree]) -> dict[str, Any]:
    """Return what the page shows of one configuration."""
    parts = np.mean([explain.hop_contributions(tree, LEVELS).values for tree in trees], axis=0)
    return {
        "label": label,
        "hops": list(schema.STEP_NAMES),
        "parts": [[round(float(ns)) for ns in row] for row in parts],
        "packets": clickable_packets(trees[0]),
    }


def clickable_packets(tree: xr.DataTree) -> list[dict[str, Any]]:
    """Return the packets that can be clicked on, in time order.

    Returns
    -------
    list of dict
        ``frame``; ``t`` seconds since the first one; ``total`` ns; ``steps``: [stage, ns since the first stage, CPU].
    """
    packets = tree["packets"].to_dataset()
    totals = tree["hops"].to_dataset()["latency"].sel(hop="total_latency").values
    rows = np.flatnonzero(stats.usable(packets) & ~np.isnan(totals))
    slowest = rows[np.argsort(-totals[rows], kind="stable")[:SLOWEST]]
    spaced = rows[np.linspace(0, len(rows) - 1, min(SPACED, len(rows))).astype(np.int64)] if len(rows) else rows
    chosen = np.union1d(slowest, spaced)
    part = packets.isel(packet=chosen).load()
    small = xr.DataTree.from_dict({"packets": part})
    time = part["time"].values.view(np.int64)
    start = time[np.arange(len(chosen)), part["t0_stage"].values]
    found = []
    for at in range(len(chosen)):
        steps = packet_steps(small, at)
        way = [[step["stage"], round(step["start_ns"] + step["latency_ns"]), step["cpu"]] for step in steps]
        since = round((int(start[at]) - int(start[0])) / 1e9, 6)
        found.append({"frame": int(part["pcap_frame"][at]), "t": since, "total": way[-1][1], "steps": way})
    return found
