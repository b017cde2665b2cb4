#!/usr/bin/env python
"""Write a one-page report about a training run. See --help, or deqdet/tools/report.py."""

from deqdet.tools.report import main

if __name__ == "__main__":
    main()
