#!/usr/bin/env python
"""Count the parameters and multiply-adds of a detector. See --help, or deqdet/tools/analyze_model.py."""

from deqdet.tools.analyze_model import main

if __name__ == "__main__":
    main()
