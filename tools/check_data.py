#!/usr/bin/env python
"""Check data sets before training, and report what they contain. See --help, or deqdet/tools/check_data.py."""

from deqdet.tools.check_data import main

if __name__ == "__main__":
    main()
