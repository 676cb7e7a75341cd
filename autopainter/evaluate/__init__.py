"""How well a run paints: ``score`` is what training itself shows, ``metrics`` and ``run`` are the whole evaluation."""

from autopainter.evaluate.score import Score, paint_both

__all__ = ["Score", "paint_both"]
