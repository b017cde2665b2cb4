#!/usr/bin/env python
"""Train several detectors on equal terms, and write one table. See deqdet/tools/compare.py."""

from deqdet.tools.compare import main

if __name__ == "__main__":
    main()
