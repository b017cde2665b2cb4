#!/usr/bin/env python
"""Fetch ImageNet weights of a small backbone: see --help, or deqdet/tools/fetch_weights.py."""

from deqdet.tools.fetch_weights import main

if __name__ == "__main__":
    main()
