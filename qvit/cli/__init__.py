"""The command line, one file a command; `qvit.cli.main` puts them together.

A command's file parses arguments, calls the library and prints a table. It imports PyTorch and timm inside its function, so
that ``qvit --help`` is quick and ``qvit inspect`` runs without them.
"""
