"""The ``rxlab host`` commands, a part of ``__main__``: argument parsing only. What they do is in host/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

host_app = typer.Typer(help="What this host is and how it is set.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Iface = Annotated[str | None, typer.Option("--iface", help="Interface to look at.")]
Netns = Annotated[str | None, typer.Option("--netns", help="Network namespace of the interface.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@host_app.command("show")
def host_show(iface: Iface = None, netns: Netns = None, as_json: Json = False) -> None:
    """Print CPUs, interfaces, queues, their IRQs, and every setting rxlab knows."""
    from rxlab.host.topology import snapshot_host
    from rxlab.show.facts import host_text

    snapshot = snapshot_host(iface, netns)
    if as_json:
        print_json(snapshot)
    else:
        print(host_text(snapshot))


@host_app.command("export")
def host_export(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; printed when not given.")] = None,
    iface: Iface = None,
    netns: Netns = None,
    force: Force = False,
) -> None:
    """Write all that 'host diff' compares: settings, interrupts, sysctls, ethtool, of one interface or all."""
    from rxlab.host.topology import snapshot_host
    from rxlab.rundir import SCHEMA_VERSION, check_free, write_json

    if out is not None:
        check_free(out, force)
    snapshot = snapshot_host(iface, netns, everything=True)
    if out is None:
        print_json({"schema_version": SCHEMA_VERSION, **snapshot})
    else:
        write_json(out, snapshot)
        print(f"host: {out}")


@host_app.command("diff")
def host_diff(
    before: Annotated[Path, typer.Argument(help="What 'host export' wrote, or a run directory.")],
    after: Annotated[Path | None, typer.Argument(help="The same; this host now when not given.")] = None,
    iface: Iface = None,
    netns: Netns = None,
    as_json: Json = False,
) -> None:
    """Print what differs between two looks at a host; exit status 3 when something does."""
    from rxlab.host.hostdiff import diff_lines, diff_snapshots, read_snapshot
    from rxlab.host.topology import snapshot_host

    then = read_snapshot(before)
    now = read_snapshot(after) if after is not None else snapshot_host(iface, netns, everything=True)
    differences = diff_snapshots(then, now)
    if as_json:
        print_json(differences)
    else:
        print("\n".join(diff_lines(differences)) or "no difference")
    if differences:
        raise typer.Exit(3)


def print_json(content: Any) -> None:
    """Print for scripts."""
    print(json.dumps(content, indent=1, default=str))
