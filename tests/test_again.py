"""The command that would record an experiment again, oftener."""

from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr

from rxlab.show.again import repeating_command
from rxlab.show.trust import AnalysedRun


def _runs(*commands: str) -> list[AnalysedRun]:
    return [AnalysedRun({"command": command.split()}, {}, xr.DataTree(), None, Path("r")) for command in commands]


@pytest.mark.parametrize(
    ("recorded", "again"),
    [
        (
            "rxlab compare --testbed --set rps_cpus=2 --reps 3",
            "rxlab compare --testbed --set rps_cpus=2 --reps 40 --out out/compare-40",
        ),
        # The user's own command keeps its options, whatever they are called.
        (
            "rxlab compare --iface eth0 -o out/a --set rps_cpus=2 --allow-system-changes -- curl -o /dev/null --reps 9",
            "rxlab compare --iface eth0 --set rps_cpus=2 --allow-system-changes --reps 40 --out out/a-40 -- curl -o /dev/null --reps 9",
        ),
        # An earlier demo is set aside; a sweep keeps the runs that are there.
        ("rxlab demo --out=out/demo --messages 500", "rxlab demo --messages 500 --reps 40 --out out/demo"),
        (
            "rxlab sweep rps_rfs --testbed --reps=5 --out s --allow-system-changes",
            "rxlab sweep rps_rfs --testbed --allow-system-changes --reps 40 --out s --resume",
        ),
    ],
)
def test_the_command_is_the_recorded_one_with_other_repetitions(recorded: str, again: str) -> None:
    assert repeating_command(_runs(recorded, recorded), 40) == again


def test_a_resumed_sweep_is_one_experiment() -> None:
    runs = _runs(
        "rxlab sweep s.toml --out s", "rxlab sweep s.toml --out s --resume", "rxlab sweep s.toml -o s --reps 7"
    )
    assert repeating_command(runs, 9) == "rxlab sweep s.toml --reps 9 --out s --resume"


@pytest.mark.parametrize(
    "commands",
    [
        ["rxlab capture --testbed -o out/a"],
        ["python mine.py"],
        [""],
        ["rxlab compare --set a=1", "rxlab compare --set a=2"],
    ],
)
def test_runs_of_no_one_experiment_have_no_such_command(commands: list[str]) -> None:
    assert repeating_command(_runs(*commands), 9) is None
