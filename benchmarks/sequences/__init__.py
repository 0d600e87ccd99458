"""Whole backbones over a growing number of frames."""
