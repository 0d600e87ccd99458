"""What every Triton kernel shares: launching, recording and inspecting, building blocks, configurations."""
