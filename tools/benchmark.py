#!/usr/bin/env python
"""The time of a step, a decoder, a detection or a training iteration. See deqdet/tools/benchmark.py."""

from deqdet.tools.benchmark import main

if __name__ == "__main__":
    main()
