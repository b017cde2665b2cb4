"""The command-line tools: each module has a `main` that takes the words of a command line."""
