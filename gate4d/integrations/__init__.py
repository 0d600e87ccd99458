"""A reversible patch for the models people already run, and a table of what was recognised in them."""

from ..handle import Handle, patch, register_method, unpatch
from .table import AttentionRow, AttentionTable, inspect

__all__ = ["AttentionRow", "AttentionTable", "Handle", "inspect", "patch", "register_method", "unpatch"]
