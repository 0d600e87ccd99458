"""Clips: read from disk, or rendered with known motion, depth and cameras."""

from .clip import Clip, read_clip
from .procedural import render_clip

__all__ = ["Clip", "read_clip", "render_clip"]
