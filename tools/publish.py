#!/usr/bin/env python
"""Make one model file of a checkpoint and its config: see --help, or deqdet/tools/publish.py."""

from deqdet.tools.publish import main

if __name__ == "__main__":
    main()
