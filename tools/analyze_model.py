#!/usr/bin/env python
"""Parameters and multiply-adds of a detector. See deqdet/tools/analyze_model.py."""

from deqdet.tools.analyze_model import main

if __name__ == "__main__":
    main()
