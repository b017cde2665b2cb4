#!/usr/bin/env python
"""Download ImageNet weights of a small backbone. See --help, or deqdet/tools/fetch_weights.py."""

from deqdet.tools.fetch_weights import main

if __name__ == "__main__":
    main()
