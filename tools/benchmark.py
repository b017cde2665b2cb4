#!/usr/bin/env python
"""Time a step, the decoder, a detection or a training iteration. See --help, or deqdet/tools/benchmark.py."""

from deqdet.tools.benchmark import main

if __name__ == "__main__":
    main()
