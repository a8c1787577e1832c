"""Whether a figure can be read, asked of the texts in it."""

from __future__ import annotations

import itertools
from typing import Any


def assert_nothing_overlaps(drawn: Any) -> None:
    """Every text inside the picture, none over another, and large enough in a picture 900 pixels wide."""
    drawn.draw_without_rendering()
    texts = [drawn._suptitle]
    for axes in drawn.axes:
        low, high = axes.get_xlim()
        ticks = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
        low, high = axes.get_ylim()
        ticks += [t for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *ticks, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    width, height = drawn.get_size_inches() * drawn.dpi
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} runs out"
    for axes in drawn.axes:
        for note in axes.texts:
            assert axes.bbox.x1 >= note.get_window_extent().x1, f"{note.get_text()!r} runs over the frame"
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} over {other!r}"
    assert min(t.get_fontsize() for t in texts) * 900 / (72 * drawn.get_figwidth()) >= 11
