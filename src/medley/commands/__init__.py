"""What the `medley` command does: one module a command."""
