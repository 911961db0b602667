"""The clickable page holds the planted packets and loads nothing."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from joined_builder import make_host, make_joined, make_run

from rxlab.dataset import explain, store
from rxlab.errors import RxlabError
from rxlab.show import explorer
from rxlab.stages import STAGE_INDEX


@pytest.fixture(scope="module")
def joined():
    return make_joined(5000, lost_rows=[7])


@pytest.fixture(scope="module")
def tree(joined):
    return store.build(joined, run=make_run(), host=make_host())


def test_every_packet_is_the_planted_one(tree, joined):
    packets = explorer.clickable_packets(tree)
    assert explorer.SPACED <= len(packets) <= explorer.SPACED + explorer.SLOWEST
    totals = joined.truth.sum(axis=1)
    totals[7] = 0
    slowest = set((np.argsort(-totals, kind="stable")[: explorer.SLOWEST] + 1).tolist())
    assert slowest <= {packet["frame"] for packet in packets}
    assert 8 not in {packet["frame"] for packet in packets}  # lost
    for packet in packets[::100]:
        row = packet["frame"] - 1
        assert packet["total"] == totals[row]
        assert [step[0] for step in packet["steps"]] == joined.order
        at = np.cumsum([joined.truth[row, STAGE_INDEX[name]] for name in joined.order])
        assert [step[1] for step in packet["steps"]] == (at - at[0]).tolist()
        assert [step[2] for step in packet["steps"]] == [joined.cpu[row, STAGE_INDEX[name]] for name in joined.order]
    assert [packet["t"] for packet in packets] == sorted(packet["t"] for packet in packets)


def test_the_sliders_show_contributions(tree):
    (one,) = explorer.Explorer({"run": [tree]}).content["configurations"]
    for level in (0.5, 0.99):
        parts = explain.contributions(tree, level)
        assert one["hops"] == parts["hop"].values.tolist()
        np.testing.assert_allclose(one["parts"][explorer.LEVELS.index(level)], parts.values, atol=0.51)


def test_the_page_loads_nothing_and_no_text_ends_its_script(tree):
    made = explorer.Explorer({"</script><b>x</b>": [tree]})
    page = made.page()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch\(|XMLHttpRequest|<link", page)
    assert page.count("</script>") == 2
    inside = re.search(r'<script id="content" type="application/json">(.*?)</script>', page, flags=re.S)
    assert json.loads(inside[1])["configurations"][0]["label"] == "</script><b>x</b>"
    frame = made._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page


def test_nothing_to_explore_is_said():
    with pytest.raises(RxlabError, match="nothing to explore"):
        explorer.Explorer({"none": []})
