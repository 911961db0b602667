"""Settings of a real NIC driver, igb with four queues: put back after each change, and after kills at random moments.

Judges: what the ``ethtool`` command and the kernel's files show, and all that ``rxlab host export`` gives. Where an interrupt is
within its mask is the kernel's choice and not compared: a quiet one moves only when it next comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest import run_in_guest


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    """What the guest left."""
    command = ["{python}", str(Path(__file__).with_name("guest_settings.py")), "{folder}"]
    with run_in_guest(command, seconds=1200) as done:
        assert done.status == 0, done.output
        yield json.loads((done.folder / "settings.json").read_text())


def kept(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "effective" not in name}


def row_of(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return the change of exactly these keys."""
    return next(row for row in found["changes"] if set(row["wanted"]) == set(keys))


def test_every_change_is_put_back(found: dict[str, Any]) -> None:
    assert len(found["changes"]) >= 16
    for row in found["changes"]:
        assert kept(row["difference"]) == {}, row["wanted"]
        assert kept(row["before"]) == kept(row["after"]), row["wanted"]
        assert not [line for line in row["report"] if not line.startswith("restored")], row["report"]


def test_queues_that_the_driver_made_anew_get_their_settings_back(found: dict[str, Any]) -> None:
    row = row_of(found, "channels")
    rx = next(name for name in row["before"] if name.startswith("irq ") and name.endswith("-0"))
    assert row["before"][rx] == "1,3\n"
    assert row["during"][rx] != "1,3\n", "if the driver kept it there is nothing to show"
    assert "Combined:\t2" in row["during"]["-l"]
    assert "Combined:\t4" in row["after"]["-l"]


def test_what_was_asked_is_what_ethtool_shows(found: dict[str, Any]) -> None:
    shown = row_of(found, "channels", "rss-table")["during"]
    assert "with 2 RX ring(s)" in shown["-x"]
    table = row_of(found, "rss-table")["during"]["-x"]
    assert table.splitlines()[1].split()[1:] == ["3", "2"] * 4
    rings = row_of(found, "rx-ring", "tx-ring")["during"]["-g"]
    assert rings.rpartition("Current hardware settings:")[2].split()[1] == "512"
    features = row_of(found, "gro", "rxhash", "tso")["during"]["-k"]
    assert "generic-receive-offload: off" in features
    assert "receive-hashing: off" in features
    assert "rx-usecs: 100" in row_of(found, "rx-usecs")["during"]["-c"]
    assert set(row_of(found, "irq_cpus")["during"].items()) >= {(name, "2\n") for name in irqs_of_queues(found)}


def irqs_of_queues(found: dict[str, Any]) -> list[str]:
    names = [name for name in row_of(found, "irq_cpus")["before"] if name.startswith("irq ")]
    return [name for name in names if "-rx-" in name or "-TxRx-" in name]


def test_a_feature_that_the_driver_does_not_switch_is_refused(found: dict[str, Any]) -> None:
    assert "does not let it be switched" in row_of(found, "ntuple")["error"]


def test_kills_leave_nothing(found: dict[str, Any]) -> None:
    assert found["kills"]
    for kill in found["kills"]:
        assert (kill["ready"], kill["alive"]) == (True, True)
        assert kill["left"] == []
        assert kept(kill["difference"]) == {}
