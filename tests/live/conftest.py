"""What live tests share: a testbed in its own journal, and the proof that nothing of it is left.

Whether a live test can run at all, and that it fails instead of being skipped under RXLAB_REQUIRE_LIVE=1, is decided in
tests/conftest.py for everything in this folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rxlab.host.journal import Transaction, apply
from rxlab.record.testbed import NETNS_FOLDER, Testbed


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Transaction]:
    """Transaction of the test's own."""
    with apply(journal_dir=tmp_path / "journal") as transaction:
        yield transaction


@pytest.fixture
def testbed(journal: Transaction) -> Iterator[Testbed]:
    """Open testbed, gone afterwards."""
    with Testbed(registry=journal) as bed:
        yield bed
    left = [end.netns for end in (bed.src, bed.dst) if end.netns and (NETNS_FOLDER / end.netns).exists()]
    assert not left, f"namespaces left behind: {left}"
