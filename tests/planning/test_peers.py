"""The model of time against two published runs of other projects, with these runs' own settings."""

import pytest

from benchmarks import peers


@pytest.fixture(scope="module")
def found() -> list[peers.Peer]:
    return peers.peers()


def test_the_settings_say_where_they_are_from_and_the_speeds_follow_from_what_is_published(found: list[peers.Peer]):
    titan, bridge = found
    assert bridge.published[0] == pytest.approx(1024 * 4096 / 16 / 11.63635, abs=1)
    assert bridge.planned.tokens == 1024 * 4096 / 16
    assert titan.planned.tokens == pytest.approx(11758 * 1.3936, abs=20)  # ten steps in 13.936 s of the log


def test_the_planned_speeds_are_within_15_percent_of_the_published_ones(found: list[peers.Peer]):
    assert {each.name for each in found} == {"torchtitan 16B", "Megatron Bridge Moonlight"}
    for each in found:
        assert abs(each.miss) < peers.ALLOWED, f"{each.name}: {each.miss:+.1%}"


def test_a_miss_is_printed(found: list[peers.Peer], monkeypatch, capsys: pytest.CaptureFixture[str]):
    slow = found[0]._replace(published=(2 * found[0].published[0],) * 2)
    monkeypatch.setattr(peers, "peers", lambda: [slow, found[1]])
    peers.main()
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert "MISSED by more than 15%" in first and "MISSED" not in second
