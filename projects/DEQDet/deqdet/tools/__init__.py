"""The command-line tools: each module has the `main` of one command, such as deqdet-train.

The scripts of the same names in the repository's tools/ call the same functions.
"""
