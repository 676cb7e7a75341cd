"""The whole configuration of a run: typed, validated, documented.

Values come, the later winning, from the defaults here, a YAML file, environment variables
(``AUTOPAINTER__TRAIN__STEPS=100``) and the command line (``--set train.steps=100``).
"""

from autopainter.config.loading import ENVIRONMENT_PREFIX, Field, fields, load, restore
from autopainter.config.sections import (
    Adversarial,
    Config,
    FeatureLayer,
    Hints,
    Norm,
    Recompute,
    Sketch,
    Upsampling,
    flatten,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Adversarial",
    "Config",
    "FeatureLayer",
    "Field",
    "Hints",
    "Norm",
    "Recompute",
    "Sketch",
    "Upsampling",
    "fields",
    "flatten",
    "load",
    "restore",
]
