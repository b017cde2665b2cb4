#!/usr/bin/env python
"""Detect objects in images, a video or a camera stream. See --help, or deqdet/tools/demo.py."""

from deqdet.tools.demo import main

if __name__ == "__main__":
    main()
