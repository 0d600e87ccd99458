"""Models that exercise the attention: none of them is trained."""
