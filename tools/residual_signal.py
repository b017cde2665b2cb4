#!/usr/bin/env python
"""Measure whether the residual predicts how reliable detections are. See --help, or deqdet/tools/residual_signal.py."""

from deqdet.tools.residual_signal import main

if __name__ == "__main__":
    main()
