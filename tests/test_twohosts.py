"""One-way latencies between two hosts: the true one is in every interval, whatever the clocks, losses and offloads; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from capture_builder import classic, ethernet, ipv4, udp
from joined_builder import make_host, make_joined, make_run
from test_main import run_main
from twohosts_world import SECOND, Clock, World

from rxlab.dataset import schema, store
from rxlab.dataset.twohosts import groups_of, intervals_of_frames
from rxlab.errors import ClockError
from rxlab.follow.crossings import AMBIGUOUS, BY_GAPS, CROSSINGS, MERGED, SEGMENT, match_captures
from rxlab.follow.oneway import NAT, bound_offset
from rxlab.follow.twohosts import TwoHosts, align_two_hosts
from rxlab.pipeline import analyze_run
from rxlab.show import trust
from rxlab.show.life import packet_life
from rxlab.show.style import microseconds
from rxlab.show.text import analysis_text

SHORT = {"seconds": 3.0, "rate": 250.0}
APART = {
    "sender": Clock(offset=3 * 3600 * SECOND, drift=80e-6, sine_ns=1_500),
    "receiver": Clock(offset=-5, drift=-20e-6, ramp=20e-9),
}


def judge(world: World, found: TwoHosts) -> tuple[int, int]:
    """Return how many packets have an interval, and of how many it does not hold the truth."""
    judged = outside = 0
    for forward, side in ((True, found.forward), (False, found.reverse)):
        true = world.true[forward]
        assert set(side["arrived"].tolist()) == set(true)
        for row, least, most in zip(*(side[name].tolist() for name in ("arrived", "least", "most")), strict=True):
            if least == NAT and most == NAT:
                continue
            judged += 1
            assert least == NAT or least >= 0
            low, high = true[row]
            outside += (least != NAT and least > low) or (most != NAT and most < high)
    return judged, outside


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tso": False, "gro": False},
        {"version": 6},
        {"timestamps": False, "ip_ids": False},
        {"translated": True},
        {"loss": 0.02},
        {"loss": 0.02, "version": 6, "timestamps": False},
        {"base": (5_000, 900_000), "jitter": (3_000, 20_000)},
        {"sender": Clock(offset=10**12, drift=-100e-6, quantum=1_000), "receiver": Clock(quantum=1_000)},
        {"train": 6, "tso": False},
    ],
    ids=lambda changed: ",".join(changed) or "plain",
)
def test_the_true_latency_is_inside_every_interval(changed: dict) -> None:
    world = World(**SHORT, **{**APART, **changed})
    found = align_two_hosts(world.sender, world.receiver)
    judged, outside = judge(world, found)
    n = sum(map(len, world.true.values()))
    assert outside == 0
    # What was lost and sent again within one tick of the timestamps keeps an interval, a wide one.
    assert judged == n
    base, jitter = world.recipe.base, world.recipe.jitter
    assert sum(base) <= found.width_ns[0] <= found.width_ns[1] <= sum(base) + 4_000 + 0.05 * sum(jitter)
    assert not found.bounds.flags
    assert found.bounds.reference.drift * 1e6 == pytest.approx(
        1e6 * (world.recipe.receiver.drift - world.recipe.sender.drift), abs=1.5
    )
    lost = found.n_unseen
    assert lost == (0, 0) or world.recipe.loss


def test_packets_missed_by_a_capture_or_lost_are_told_from_those_that_came() -> None:
    world = World(seconds=4.0, rate=400.0, loss=0.01, missed=0.005, **APART)
    found = align_two_hosts(world.sender, world.receiver)
    judged, outside = judge(world, found)
    # A second sending whose first was missed by the sender's capture passes for the first.
    assert outside <= 0.001 * judged
    assert 0.98 < judged / sum(map(len, world.true.values())) < 1
    left = [sum(frame.forward == way for frame in world.frames) for way in (True, False)]
    assert all(0.002 * n < unseen < 0.05 * n for n, unseen in zip(left, found.n_unseen, strict=True))


def test_datagrams_that_are_all_alike_are_matched_by_their_gaps_or_not_at_all() -> None:
    seldom = {"seconds": 4.0, "kinds": ("udp",), "alike": True, "ip_ids": False, "jitter": (10_000, 10_000), **APART}
    world = World(rate=300.0, **seldom)
    found = align_two_hosts(world.sender, world.receiver)
    assert (found.forward["status"] == BY_GAPS).mean() > 0.9
    judged, outside = judge(world, found)
    assert judged > 0.9 * sum(map(len, world.true.values()))
    assert outside == 0
    # So dense that neighbours change places.
    dense = World(rate=20_000.0, **{**seldom, "seconds": 0.2, "jitter": (200_000, 200_000)})
    with pytest.raises(ClockError, match="no packets in common"):
        align_two_hosts(dense.sender, dense.receiver)


def test_offloads_are_named() -> None:
    cut = World(**SHORT, kinds=("bulk",), **APART)
    status = align_two_hosts(cut.sender, cut.receiver).forward["status"]
    assert (status == SEGMENT).mean() > 0.5
    joined = World(**SHORT, kinds=("bulk",), tso=False, train=6, **APART)
    status = align_two_hosts(joined.sender, joined.receiver).forward["status"]
    assert (status == MERGED).mean() > 0.5


def test_a_tick_of_the_timestamps_tells_what_was_sent_again() -> None:
    """IPv6 numbers no packets; a request is sent again after 2 ms."""
    world = World(**SHORT, kinds=("rpc",), loss=0.05, version=6, **APART)
    found = align_two_hosts(world.sender, world.receiver)
    assert sum(found.n_unseen) > 20
    assert not (found.forward["status"] == AMBIGUOUS).any()


def test_a_capture_that_began_after_sequence_numbers_wrapped_is_matched() -> None:
    world = World(**SHORT, kinds=("bulk",), **APART)
    late = world.receiver.n // 2
    found = align_two_hosts(world.sender, world.receiver.take(np.arange(late, world.receiver.n)))
    whole = align_two_hosts(world.sender, world.receiver)
    assert (world.sender["seq"][: world.sender.n // 2] > 2**31).any()
    assert (world.receiver["seq"][late:] < 2**31).all()
    n = found.forward.n
    assert n > 500
    # A frame whose parts came before and after the cut is found as well.
    assert np.array_equal(found.forward["first"], whole.forward["first"][-n:])


def test_which_host_sent_is_told_by_the_packets() -> None:
    """The same without being told, and the other way round where the files are."""
    world = World(**SHORT, **APART)
    received = np.zeros(world.receiver.n, bool)
    received[sorted(world.true[True])] = True
    told, found = (align_two_hosts(world.sender, world.receiver, received=one) for one in (received, None))
    assert np.array_equal(told.forward["most"], found.forward["most"])
    turned = align_two_hosts(world.receiver, world.sender)
    assert np.array_equal(turned.reverse["arrived"], found.forward["arrived"])


def test_one_direction_leaves_the_upper_end_open() -> None:
    world = World(**SHORT, one_way=True, loss=0.01, **APART)
    found = align_two_hosts(world.sender, world.receiver)
    assert "one_direction" in found.bounds.flags
    assert judge(world, found)[1] == 0
    least, true = (
        found.forward["least"],
        np.array([world.true[True][row][0] for row in found.forward["arrived"].tolist()]),
    )
    sure = found.forward["status"] != AMBIGUOUS
    # The excess over the fastest packet, less what the clocks may have wandered.
    excess = true[sure] - true.min()
    assert np.median(excess - least[sure]) < 1_500
    assert (found.forward["most"] == NAT).all()


def test_few_packets_make_wide_intervals_and_are_flagged() -> None:
    world = World(seconds=2.0, rate=8.0, kinds=("udp",), **APART)
    found = align_two_hosts(world.sender, world.receiver)
    assert {"few_packets", "drift_unknown"} <= set(found.bounds.flags)
    assert np.isnan(found.bounds.reference.drift)
    assert judge(world, found)[1] == 0
    assert found.width_ns[1] > 105_000


def test_a_curve_of_packets_too_unsteady_for_one_is_not_used() -> None:
    """Delays of milliseconds, ten frames a second: the curve below them swings by more than crystals are apart."""
    clocks = {
        "sender": Clock(offset=6_921_119_526_458, drift=62.88852e-6, ramp=10.148893e-9, slew=(1.0, 2.0, -4.349802e-6), quantum=8),
        "receiver": Clock(drift=-38.8175e-6, quantum=8),
    }  # fmt: skip
    slow = {"base": (493_143, 3_337_847), "jitter": (986_286, 333_784), "timestamps": False, "version": 6}
    world = World(seed=5016, seconds=5.0, rate=100.0, kinds=("bulk",), loss=0.01, **slow, **clocks)
    found = align_two_hosts(world.sender, world.receiver)
    assert judge(world, found)[1] == 0
    assert found.bounds.wander <= 500e-6


def test_a_floor_that_is_seldom_reached_widens_the_intervals_and_is_flagged() -> None:
    world = World(seconds=20.0, rate=40.0, kinds=("udp",), base=(2_000, 2_000), jitter=(300_000, 300_000), **APART)
    found = align_two_hosts(world.sender, world.receiver)
    assert "sparse_floor" in found.bounds.flags
    assert judge(world, found)[1] == 0


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_clock_step_is_found_and_packets_within_it_have_no_interval(end: str) -> None:
    world = World(**SHORT, **{end: Clock(offset=7, drift=30e-6, step=(1.5, 37 * SECOND))})
    found = align_two_hosts(world.sender, world.receiver)
    judged, outside = judge(world, found)
    assert len(found.bounds.edges) == 1
    assert outside == 0
    assert judged >= sum(map(len, world.true.values())) - 40
    assert found.width_ns[1] < 110_000


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_bound_reaches_across_a_step(seed: int) -> None:
    """The few packets after it are slow ones, so that the curve there lies elsewhere between the two directions."""
    clock = Clock(offset=7, step=(2.8, 37 * SECOND))
    world = World(
        seed=seed, seconds=3.0, rate=150.0, kinds=("udp",), base=(50, 50), jitter=(40_000, 40_000), sender=clock
    )
    assert judge(world, align_two_hosts(world.sender, world.receiver))[1] == 0


def test_what_was_known_before_a_step_says_nothing_of_after() -> None:
    """The path becomes a hundred times as long while a clock is stepped: the bounds of before would leave the truth out."""
    draw, step = np.random.default_rng(5), 3 * SECOND
    sent, back = (np.sort(draw.integers(0, 6 * SECOND, 1_500)) for _ in range(2))

    def delay(t: np.ndarray) -> np.ndarray:
        return np.where(t < step, 50_000, 5_000_000) + draw.exponential(20_000, len(t)).astype(np.int64)

    def difference(t: np.ndarray) -> np.ndarray:
        return 7 + np.where(t < step, 0, 37 * SECOND)

    arrived, returned = sent + delay(sent), back + delay(back)
    bounds = bound_offset((sent, arrived + difference(arrived)), (back + difference(back), returned))
    assert len(bounds.edges) == 1
    for t in (arrived, back):
        least, largest = bounds.at(t + difference(t))
        known = (least != NAT) & (largest != NAT) & (np.abs(t - step) > 50_000_000)
        assert known.mean() > 0.9
        assert ((least <= difference(t)) & (difference(t) <= largest))[known].all()
    # Between the step and the first packet after it too.
    grid = bounds.edges[0] + np.arange(0, 20_000_000, 50_000)
    least, largest = bounds.at(grid)
    assert ((least == NAT) | (least <= 7 + 37 * SECOND)).all()
    assert ((largest == NAT) | (largest >= 7 + 37 * SECOND)).all()


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_stamps_are_cut_to_their_resolution(end: str) -> None:
    """Latencies that hardly vary: nothing but the resolution keeps the bounds apart."""
    clocks = {end: Clock(offset=12_345_678_901, quantum=1_000)}
    world = World(**SHORT, kinds=("udp",), base=(200, 200), jitter=(1, 1), **clocks)
    found = align_two_hosts(world.sender, world.receiver)
    assert judge(world, found)[1] == 0
    assert 400 <= found.width_ns[0] <= found.width_ns[1] <= 4_500


def test_a_short_capture_in_microseconds_does_not_know_the_drift_better() -> None:
    """Half a second of packets as steady as nothing but stamps cut to microseconds would show them."""
    clocks = {
        "sender": Clock(offset=9_199_565_236_213, drift=-9.8979e-6, sine_ns=1_357.42, ramp=15.5172e-9),
        "receiver": Clock(drift=-76.5006e-6, quantum=1_000),
    }  # fmt: skip
    steady = {
        "base": (629_334, 589),
        "jitter": (6_293, 5),
        "train": 4,
        "timestamps": False,
        "ip_ids": False,
        "version": 6,
    }
    world = World(seed=9055, seconds=0.5, rate=400.0, kinds=("bulk",), translated=True, **steady, **clocks)
    assert judge(world, align_two_hosts(world.sender, world.receiver))[1] == 0


def test_what_is_merged_on_its_way_still_tells_which_host_sent() -> None:
    """No data packet is the same in both captures, and few packets are there."""
    world = World(
        seconds=2.0,
        rate=20.0,
        kinds=("bulk",),
        tso=False,
        train=4,
        base=(1_100, 900_000),
        jitter=(560, 450_000),
        **APART,
    )
    found = align_two_hosts(world.sender, world.receiver)
    assert (found.forward["status"] == MERGED).all()
    # Also where the bulk comes from the other host.
    assert (align_two_hosts(world.receiver, world.sender).reverse["status"] == MERGED).all()
    assert judge(world, found) == (sum(map(len, world.true.values())), 0)


def test_a_clock_that_is_steered_hard_is_followed_or_flagged() -> None:
    """Slewed by 50 ppm for a second, as chronyd and ntpd do."""
    world = World(seconds=5.0, rate=150.0, sender=Clock(slew=(2.0, 3.0, 50e-6)))
    found = align_two_hosts(world.sender, world.receiver)
    assert judge(world, found)[1] == 0
    assert found.width_ns[1] < 200_000
    # Slewed in the middle of an interval of the curve, whose direction is so steady that nothing else widens it.
    clocks = {
        "sender": Clock(drift=48.207e-6, sine_ns=654, ramp=-14.08e-9, slew=(1.0, 2.0, -35.267e-6)),
        "receiver": Clock(drift=-22.092e-6, quantum=8),
    }
    steady = {"base": (1_894_443, 2_124), "jitter": (947_221, 21)}
    short = World(seed=1078, seconds=2.0, rate=400.0, missed=0.005, tso=False, kinds=("udp",), **steady, **clocks)
    assert judge(short, align_two_hosts(short.sender, short.receiver))[1] == 0


def test_few_windows_do_not_make_a_line_certain() -> None:
    """Half a second, of which two packets alone carry the line below the noisier direction."""
    for seed in range(4):
        world = World(
            seed=seed, seconds=0.5, rate=200.0, kinds=("udp",), base=(600_000, 3_000), jitter=(60_000, 30), **APART
        )
        found = align_two_hosts(world.sender, world.receiver)
        assert judge(world, found)[1] == 0
        assert found.bounds.wander < 50e-6


def test_a_stamp_that_is_wrong_spoils_its_own_packet_only() -> None:
    world = World(**SHORT, kinds=("rpc", "udp"))
    rows = sorted(world.true[True])[50::400]
    time = world.receiver["time"].copy()
    time[rows] -= 3_000_000
    found = align_two_hosts(world.sender, world.receiver.with_columns(time=time), received=None)
    wrong = np.isin(found.forward["arrived"], rows)
    assert {CROSSINGS[code] for code in found.forward["status"][wrong]} == {"inconsistent"}
    assert (found.forward["most"][wrong] == NAT).all()
    assert found.width_ns[1] < 110_000
    for row in rows:
        del world.true[True][row]
    keep = TwoHosts(found.forward.take(~wrong), found.reverse, found.bounds, found.n_unseen, found.width_ns)
    assert judge(world, keep)[1] == 0


def test_a_segment_sent_twice_within_one_tick_keeps_both_sendings() -> None:
    world = World(**SHORT, kinds=("bulk",), loss=0.05, version=6, **APART)
    forward, _ = match_captures(world.sender, world.receiver)
    twice = forward.status == AMBIGUOUS
    assert twice.any()
    assert (forward.first[twice] < forward.last[twice]).any()
    # IPv4 numbers its packets: there the copies are told apart.
    numbered = World(**SHORT, kinds=("bulk",), loss=0.05, tso=False, **APART)
    assert not (match_captures(numbered.sender, numbered.receiver)[0].status == AMBIGUOUS).any()


def test_clocks_that_agree_narrow_the_intervals_and_a_wrong_claim_is_refused() -> None:
    world = World(**SHORT, sender=Clock(offset=200), receiver=Clock(offset=-150))
    found = align_two_hosts(world.sender, world.receiver, clock_error=500)
    assert judge(world, found) == (sum(map(len, world.true.values())), 0)
    assert found.width_ns == (1_000, 1_000)
    one = World(**SHORT, one_way=True, sender=Clock(offset=200))
    assert judge(one, align_two_hosts(one.sender, one.receiver, clock_error=500))[1] == 0
    with pytest.raises(
        ClockError, match=r"further apart than they are said to be: found .* by the packets, expected at most 500 ns"
    ):
        align_two_hosts(*(getattr(World(**SHORT, **APART), end) for end in ("sender", "receiver")), clock_error=500)


def test_captures_that_do_not_belong_together_are_refused() -> None:
    world, other = World(**SHORT), World(**SHORT, seed=2, kinds=("udp",))
    with pytest.raises(ClockError, match="no packets in common"):
        align_two_hosts(world.sender, other.receiver)
    half = world.receiver["time"][world.receiver.n // 2]
    early, late = (
        world.sender.take(world.sender["time"] < half),
        world.receiver.take(world.receiver["time"] > half + SECOND),
    )
    with pytest.raises(ClockError, match="no packets in common"):
        align_two_hosts(early, late)
    with pytest.raises(ClockError, match="taken at the same place"):
        align_two_hosts(world.receiver, world.receiver)
    back = World(**SHORT, receiver=Clock(step=(1.5, -SECOND)))
    with pytest.raises(ClockError, match="stepped back"):
        align_two_hosts(back.sender, back.receiver)


def test_the_bound_holds_over_random_conversations() -> None:
    judged = outside = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        world = World(
            seed=seed, seconds=1.5, rate=float(rng.uniform(60, 400)), loss=float(rng.choice([0, 0.01])), base=tuple(rng.integers(500, 400_000, 2)),
            jitter=tuple(rng.integers(100, 60_000, 2)), timestamps=bool(rng.integers(2)), version=int(rng.choice([4, 6])), tso=bool(rng.integers(2)),
            sender=Clock(int(rng.integers(-(10**13), 10**13)), rng.uniform(-1e-4, 1e-4), rng.uniform(0, 1_500), rng.uniform(-2e-8, 2e-8), quantum=int(rng.choice([1, 8, 1_000]))),
            receiver=Clock(quantum=int(rng.choice([1, 8, 1_000]))),
        )  # fmt: skip
        counted = judge(world, align_two_hosts(world.sender, world.receiver))
        judged, outside = judged + counted[0], outside + counted[1]
    assert judged > 2_000
    assert outside == 0


def write_pcaps(folder: Path, world: World) -> list[Path]:
    """Write a world of datagrams as two pcap files, with the digest as payload."""
    paths = []
    for name in ("sender", "receiver"):
        side = getattr(world, name)
        packets = [
            ethernet(ipv4(udp(int(digest).to_bytes(8, "big") * 8, int(sport), int(dport)), 17, *(("10.0.0.1", "10.0.0.2") if dport == 80 else ("10.0.0.2", "10.0.0.1")), ident=0))
            for digest, sport, dport in zip(side["digest"], side["sport"], side["dport"], strict=True)
        ]  # fmt: skip
        content = bytearray(classic(packets, magic=0xA1B23C4D))
        at = 24
        for time, packet in zip(side["time"].tolist(), packets, strict=True):
            content[at : at + 8] = (time // SECOND).to_bytes(4, "little") + (time % SECOND).to_bytes(4, "little")
            at += 16 + len(packet)
        paths.append(folder / f"{name}.pcap")
        paths[-1].write_bytes(content)
    return paths


def test_two_pcaps_become_a_dataset(tmp_path: Path) -> None:
    """Datagrams without IP ID: their payload is their key."""
    world = World(**SHORT, kinds=("udp",), loss=0.05, **APART)
    sender, receiver = write_pcaps(tmp_path, world)
    told = analyze_run(None, sender_pcap=sender, pcap=receiver)
    n = len(world.true[True])
    lost = sum(frame.forward for frame in world.frames) - n
    assert told["one_way"]["forward"]["packets"]["matched"] == n
    assert told["one_way"]["forward"]["unseen"] == lost
    assert 100_000 <= told["one_way"]["width_min_ns"] <= told["one_way"]["width_median_ns"] <= 106_000
    lines = analysis_text(json.loads(json.dumps(told)))
    assert f"one way forward: {n:,} of {n:,} packets found where they left, median latency between" in lines
    assert f"of {lost:,} that left nothing arrived" in lines
    tree = store.open_dataset(receiver.with_suffix(".nc"))
    crossings = tree["crossings"].to_dataset()
    for way, forward in enumerate((True, False)):
        rows = np.flatnonzero(crossings["way"].values == way)
        true = np.array([world.true[forward][frame - 1][0] for frame in crossings["frame"].values[rows].tolist()])
        assert len(true) == len(world.true[forward])
        assert (crossings["oneway_min"].values[rows] <= true).all()
        assert (crossings["oneway_max"].values[rows] >= true).all()
    hosts = tree["twohosts"].to_dataset()
    ahead = world.recipe.receiver.at(np.array([10**9])) - world.recipe.sender.at(np.array([10**9]))
    nearest = int(
        np.argmin(np.abs(hosts["instant"].values.view(np.int64) - world.recipe.receiver.at(np.array([10**9]))))
    )
    low, high = (int(hosts[f"offset_{end}"][nearest]) + int(hosts["offset_origin"]) for end in ("min", "max"))
    assert low - 2_000 <= int(ahead[0]) <= high + 2_000
    tree.close()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["analyze", "--sender-pcap", "a.pcap"], "the sender's capture is alone"),
        (["analyze", "run", "--clock-error", "5"], "--clock-error is about two hosts' clocks"),
    ],
)
def test_a_command_that_cannot_be_meant(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run_main(monkeypatch, capsys, *command)
    assert status == 2
    assert len(lines) == 1
    assert said in lines[0]


def test_a_packet_of_a_run_tells_when_it_left_its_sender() -> None:
    world = World(**SHORT, kinds=("udp",), **APART)
    found = align_two_hosts(world.sender, world.receiver)
    joined = make_joined(200)
    arrived = world.receiver["frame"][found.forward["arrived"]][:200]
    frames = np.where(np.arange(200) == 7, 0, arrived)
    intervals = intervals_of_frames(frames, found, world.sender, world.receiver)
    joined.packets = joined.packets.with_columns(pcap_frame=frames, **intervals)
    tree = store.build(joined, run=make_run(), host=make_host(), beside=groups_of(found, world.sender, world.receiver))
    schema.validate(tree)
    packets = tree["packets"].to_dataset()
    true = np.array([world.true[True][frame - 1][0] for frame in arrived.tolist()])
    known = np.arange(200) != 7
    assert (packets["oneway_min"].values[known] <= true[known]).all()
    assert (packets["oneway_max"].values[known] >= true[known]).all()
    assert np.isnan(packets["oneway_max"].values[7])
    low, high = (packets[f"oneway_{end}"].values[9] for end in ("min", "max"))
    assert f"(its frame {int(packets['sender_frame'][9])}) between {microseconds(low)} and" in packet_life(
        tree, int(arrived[9])
    )
    assert high > low
    report = trust.trust_panel(
        [trust.AnalysedRun(make_run(), make_host(), tree, None, Path("web"))], recorded=False, overhead=[]
    )
    check = next(check for check in report if check.name == "Sender's capture, web")
    assert check.state == "good"
    n = len(world.true[True])
    assert f"one way forward: {n:,} of {n:,} packets found where they left" in check.summary
