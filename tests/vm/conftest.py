"""Guest tests run by ``make test-vm`` only: each boots a kernel, a minute or two. Elsewhere they are not collected."""

from __future__ import annotations

import os

import pytest
from guest import obstacle

collect_ignore_glob = [] if os.environ.get("RXLAB_VM") == "1" else ["test_*.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a guest test that cannot run, or fail it where live tests are required."""
    if why := obstacle():
        if os.environ.get("RXLAB_REQUIRE_LIVE") == "1":
            pytest.fail(f"guest test required but cannot run: {why}", pytrace=False)
        pytest.skip(f"guest test: {why}")
