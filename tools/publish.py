#!/usr/bin/env python
"""Make one model file of a checkpoint and its config: see deqdet/tools/publish.py, or --help."""

from deqdet.tools.publish import main

if __name__ == "__main__":
    main()
