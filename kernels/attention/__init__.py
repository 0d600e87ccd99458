"""Rank-1 gated, interval-masked softmax attention."""
