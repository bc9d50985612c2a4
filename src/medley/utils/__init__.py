"""Files, command-line options, processes: nothing here depends on a type of the domain."""
