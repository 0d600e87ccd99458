"""What is measured: one target or system a row."""
