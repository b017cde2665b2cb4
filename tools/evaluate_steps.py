#!/usr/bin/env python
"""Evaluate a detector for several solvers, steps and tolerances. See --help, or deqdet/tools/evaluate_steps.py."""

from deqdet.tools.evaluate_steps import main

if __name__ == "__main__":
    main()
