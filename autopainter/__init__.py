"""Auto-Painter: sketch to coloured cartoon with a conditional GAN, trained by a job that a crash cannot stop."""

import os
from typing import TYPE_CHECKING

__all__ = ["Painter", "__version__"]
__version__ = "0.1.0"

# Read once, when OpenCV is loaded: its own bound on the pixels of a picture, as data.pictures.MAX_PIXELS.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))

if TYPE_CHECKING:
    from autopainter.paint import Painter
else:

    def __getattr__(name: str) -> object:
        """``Painter``, when it is first asked for: it needs torch, and most commands do not."""
        if name != "Painter":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from autopainter.paint import Painter

        return Painter
