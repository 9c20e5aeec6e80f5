"""The shell of the command line; commands that need engines register through entry points."""
