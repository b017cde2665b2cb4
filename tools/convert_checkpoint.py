#!/usr/bin/env python
"""Make a checkpoint of another implementation one of ours: see --help, or deqdet/tools/convert_checkpoint.py."""

from deqdet.tools.convert_checkpoint import main

if __name__ == "__main__":
    main()
