#!/usr/bin/env python
"""Detect in images, a video or a camera's pictures: see deqdet/tools/demo.py, or --help."""

from deqdet.tools.demo import main

if __name__ == "__main__":
    main()
