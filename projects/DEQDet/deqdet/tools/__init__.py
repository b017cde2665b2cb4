"""The command-line tools: each module has a `main`, which is a console command and what the repository's tools/ run."""
