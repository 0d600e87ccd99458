"""Clips: read from disk, or rendered with known motion, depth and cameras."""

from .clip import Batch, Clip, read_clip
from .procedural import render_clip

__all__ = ["Batch", "Clip", "read_clip", "render_clip"]
