#!/usr/bin/env python
"""Train several detectors with the same budget, and write one table. See --help, or deqdet/tools/compare.py."""

from deqdet.tools.compare import main

if __name__ == "__main__":
    main()
