#!/usr/bin/env python
"""Convert a checkpoint of another implementation. See --help, or deqdet/tools/convert_checkpoint.py."""

from deqdet.tools.convert_checkpoint import main

if __name__ == "__main__":
    main()
