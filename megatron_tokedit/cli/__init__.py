"""The commands: argument parsing and exit codes, one file a command."""
