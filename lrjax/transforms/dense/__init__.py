"""Transforms of plain matrices and leaves."""

from .scale_by_smooth_polar import scale_by_smooth_polar as scale_by_smooth_polar
