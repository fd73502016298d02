"""Drawn timelines, against drawings by hand."""

from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots
from dsv3_lightning.planning.pipeline.drawing import LEGEND, figure, lines, text
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, Event, Timeline, simulate


def one_each(name: str, ranks: int, chunks: int, micro_batches: int) -> Timeline:
    return simulate(schedule_slots(name, ranks, micro_batches), ChunkTimes.equal(chunks), chunks)


def test_lines_have_a_letter_per_interval():
    ran = one_each("1f1b", 2, 2, 3)  # spans 12
    assert lines(ran, 12) == ["FF..BBFBB.BB", ".FBBFBBFBB.."]
    assert lines(ran, 24)[1] == "..FFBBBBFFBBBBFFBBBB...."
    assert lines(ran, 24, span=24.0)[1] == ".FBBFBBFBB.............."


def test_small_letters_are_a_ranks_later_chunk():
    assert lines(one_each("zbv", 2, 4, 3), 19) == ["FFFfiwfiwIWfiwIWIW.", ".FfFfiwFIWfiwIiIWwW"]


def test_pairs_have_one_sign():
    ran = Timeline([[Event((Action("F", 0, 1), Action("B", 0, 0)), 5.0, 8.0), Event((Action("W", 0, 1),), 9.0, 10.0)]])
    assert lines(ran, 5) == ["&&&.W"]  # from the first start on
    assert text(ran, 12).splitlines() == ["rank 0 " + "&" * 12 + "." * 4 + "W" * 4, LEGEND]


def test_a_figure_has_an_axis_per_timeline_and_a_bar_per_action():
    panels = {"simulated": one_each("1f1b", 2, 2, 3), "measured": one_each("zbv", 2, 4, 3)}
    made = figure(panels)
    assert [axes.get_title(loc="left") for axes in made.axes] == list(panels)
    assert [len(axes.patches) for axes in made.axes] == [12, 36]
    assert made.axes[0].get_xlim() == made.axes[1].get_xlim()
    assert [each.get_text() for each in made.legends[0].get_texts()] == [
        "forward", "backward", "backward, input part", "backward, weight part",
    ]  # fmt: skip
