"""Which packets and which stages of a run are in doubt: against simulated worlds and tables made by hand."""

from __future__ import annotations

import numpy as np

from rxlab.dataset import schema, stats, store
from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined, join
from rxlab.follow.slabs import join_in_slabs
from rxlab.follow.stagetrust import STAGE_VERDICTS, doubtful_stages, stage_verdicts
from rxlab.follow.verify import verify_join
from rxlab.read.columns import Columns
from rxlab.show.trust import AnalysedRun
from rxlab.stages import STAGE_INDEX, STAGE_NAMES, STATUSES
from tests.joined_builder import make_host, make_run
from tests.simulate import simulate
from tests.slab_builder import differences, slabs_of

RX, COPY = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["copy"]


def joined_world(**recipe: object) -> Joined:
    world = simulate(**recipe)
    return join(
        world.events, world.packets, world.clock, world.machine, lost=world.lost, lost_records=world.lost_records
    )


def test_a_trusted_row_leaves_in_doubt_only_what_it_misses() -> None:
    """Rows by hand: complete; lost, but its reader known; lost without one; no reader; dropped; an acknowledgement."""
    told = ["complete", "lost", "lost", "no_reader", "dropped", "no_payload"]
    time = np.full((6, len(STAGE_NAMES)), NAT)
    time[:, RX] = 1
    time[0, COPY] = 2
    required = np.zeros(time.shape, bool)
    required[:, [RX, COPY]] = True
    columns = Columns(
        {
            "status": np.array([STATUSES.index(name) for name in told], np.int8),
            "is_data": np.array([True] * 5 + [False]),
            "trusted": np.array([True, True, False, False, False, False]),
        }
    )
    doubtful = doubtful_stages(required, time, columns)
    assert (doubtful[RX], doubtful[COPY]) == (1, 2)  # of the third row nothing is believed
    assert doubtful.sum() == 3


def test_a_stage_is_degraded_beyond_one_in_a_hundred_and_never_trusted_in_a_refused_run() -> None:
    coverage = {"expected": np.array([0, 100, 100, 100]), "doubtful": np.array([0, 0, 1, 2])}

    def words(verdict: str) -> list[str]:
        return [STAGE_VERDICTS[code] for code in stage_verdicts(coverage, verdict)]

    assert words("trusted") == ["not_required", "trusted", "trusted", "degraded"]
    assert words("refused") == ["not_required", "refused", "refused", "refused"]


def test_a_lossy_world_says_which_packets_and_which_stages() -> None:
    world = simulate(lost_share=0.2, n=600, mean_gap_ns=60_000)
    joined = joined_world(lost_share=0.2, n=600, mean_gap_ns=60_000)
    tree = store.build(joined, run=make_run(), host=make_host())
    packets, coverage = tree["packets"].to_dataset(), tree["coverage"].to_dataset()
    trusted = packets["trusted"].values
    # Of the world's truth: no trusted row names another call, and some that miss stages are trusted.
    returned = joined.time[:, STAGE_INDEX["recvmsg"]]
    assert (returned[trusted] == world.truth["returned"][trusted]).all()
    assert stats.usable(packets).sum() < trusted.sum() < len(trusted)
    assert not (stats.usable(packets) & ~trusted).any()
    assert int(coverage["trusted"].sum()) == trusted.sum()
    verdicts = schema.meanings(coverage["verdict"])
    word = dict(zip(STAGE_NAMES, (verdicts[int(code)] for code in coverage["verdict"].values), strict=True))
    assert word["copy"] == "degraded"
    assert word["softirq"] == "not_required"
    assert any("in doubt are" in reason and "copy" in reason for reason in joined.reasons)
    table = stats.quantile_table(tree)
    used, left = table.attrs["packets_used"], stats.left_out(packets)
    assert used + sum(left.values()) == int(packets["is_data"].sum())
    assert f"{left['lost']} lost" in table.attrs["left_out"]


def test_a_clean_world_trusts_every_stage_it_requires() -> None:
    coverage = store.build(joined_world(), run=make_run(), host=make_host())["coverage"].to_dataset()
    required = coverage["expected"].values > 0
    assert (coverage["verdict"].values[required] == STAGE_VERDICTS.index("trusted")).all()
    assert (coverage["doubtful"].values == 0).all()


def test_a_refused_run_trusts_no_packet_and_gives_statistics_none() -> None:
    """More than half of the captured packets are not in the events: what is paired all the same may be another packet's."""
    world = simulate(lost_share=0.0, n=600, mean_gap_ns=60_000)
    receive = world.events["net:netif_receive_skb"]
    events = {**world.events, "net:netif_receive_skb": receive.take(np.arange(2 * receive.n // 5))}
    joined = join(events, world.packets, world.clock, world.machine)
    assert joined.verdict == "refused"
    complete = joined.packets["status"] == STATUSES.index("complete")
    assert complete.sum() > 100
    assert not joined.packets["trusted"].any()
    tree = store.build(joined, run=make_run(), host=make_host())
    packets = tree["packets"].to_dataset()
    assert stats.usable(packets).sum() == 0
    assert stats.left_out(packets)["complete"] == (complete & joined.packets["is_data"]).sum()
    assert not AnalysedRun(make_run(), make_host(), tree, None).can_explain
    found = verify_join(joined, None)
    assert (found["trusted"], found["left_out"]) == (0, stats.left_out(packets))
    assert found["misjoined"] is None
    slabs = slabs_of(events, world.packets, world.machine, 5)
    assert differences(joined, join_in_slabs(slabs, world.clock, world.machine)) == {}
