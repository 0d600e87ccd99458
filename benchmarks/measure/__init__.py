"""How something is measured: rounds in one process, a process per implementation, memory, a GPU."""
