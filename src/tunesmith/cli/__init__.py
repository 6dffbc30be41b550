"""The command line: one file a command, thin over the layers below. Read first: ``main.py``."""
