#!/usr/bin/env python
"""Combine a checkpoint and its config into one model file. See --help, or deqdet/tools/publish.py."""

from deqdet.tools.publish import main

if __name__ == "__main__":
    main()
