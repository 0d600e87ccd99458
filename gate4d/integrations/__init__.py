"""Where a gate can go into the models people already run: one file per family, and a table of what was recognised."""

from .table import AttentionRow, AttentionTable, inspect

__all__ = ["AttentionRow", "AttentionTable", "inspect"]
