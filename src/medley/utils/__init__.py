"""Files, command-line options, processes: nothing of the domain."""
