"""What ``gate4d demo`` does: measurement in fresh processes, and the report."""
