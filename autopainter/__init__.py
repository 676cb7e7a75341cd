"""Auto-Painter: sketch to coloured cartoon with a conditional GAN, trained by a job that a crash cannot stop."""

__version__ = "0.1.0"
