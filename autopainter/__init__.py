"""Auto-Painter: sketch to coloured cartoon with a conditional GAN, trained by a job that a crash cannot stop."""

import os

__version__ = "0.1.0"

# Read once, when OpenCV is loaded: its own bound on the pixels of a picture, as data.pictures.MAX_PIXELS.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))
