#!/usr/bin/env python
"""Measure AP and time per image of trained detectors. See --help, or deqdet/tools/speed_accuracy.py."""

from deqdet.tools.speed_accuracy import main

if __name__ == "__main__":
    main()
