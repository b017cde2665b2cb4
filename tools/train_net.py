#!/usr/bin/env python
"""Train or evaluate a detector. See --help, or deqdet/tools/train_net.py."""

from deqdet.tools.train_net import main

if __name__ == "__main__":
    main()
