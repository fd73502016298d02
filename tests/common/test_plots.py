"""Maps say what their axes are, and their colors what is fair, too little and too much."""

import itertools

import pytest
import torch

from dsv3_lightning.common.plots import heat_map


def test_ratios_start_at_zero_and_are_white_where_fair():
    figure = heat_map(torch.tensor([[0.0, 1.0, 5.0], [1.0, 2.0, 1.0]]), "load", 1.0, "expert")
    axes, (image,) = figure.axes[0], figure.axes[0].images
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("expert", "expert", "load")
    assert image.norm(1.0) == 0.5 and image.norm(0.0) == 0.0 and image.norm(5.0) == 1.0  # no color below 0
    (nearly_even,) = heat_map(torch.tensor([[0.99, 1.01]]), "load", 1.0).axes[0].images
    assert nearly_even.norm(1.01) == pytest.approx(0.505)  # noise isn't blown up to full color


def test_differences_are_even_around_zero_and_rows_may_have_names():
    figure = heat_map(torch.tensor([[-0.1, 0.3], [0.0, 0.0]]), "bias", 0.0, ["json", "(top level)"])
    axes, (image,) = figure.axes[0], figure.axes[0].images
    assert [label.get_text() for label in axes.get_yticklabels()] == ["json", "(top level)"]
    assert [image.norm(value) for value in (-0.3, 0.0, 0.3)] == pytest.approx([0.0, 0.5, 1.0], abs=1e-6)
    figure.savefig("/dev/null", format="png")
    heat_map(torch.zeros(2, 3), "bias before the first step", 0.0).savefig("/dev/null", format="png")


def test_the_reports_58_layers_of_256_experts_stay_readable():
    figure = heat_map(torch.rand(58, 256) * 3, "load", 1.0)
    figure.canvas.draw()
    axes = figure.axes[0]
    area = axes.get_window_extent()
    assert area.width / 256 >= 2 and area.height / 58 >= 8  # pixels of an expert and of a layer
    for axis in (axes.xaxis, axes.yaxis):  # numbers that don't overlap, from both ends' near
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert len(boxes) >= 5 and not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_labels_can_be_read_in_a_thumbnail_of_250_pixels():
    figure = heat_map(torch.rand(3, 32), "load", 1.0)
    figure.canvas.draw()
    shrunk = 250 / figure.bbox.width
    (label, *_) = figure.axes[0].get_xticklabels()
    assert label.get_window_extent().height * shrunk > 5
