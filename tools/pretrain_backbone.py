#!/usr/bin/env python
"""Pretrain the backbone of a small config on generated shapes. See --help, or deqdet/tools/pretrain_backbone.py."""

from deqdet.tools.pretrain_backbone import main

if __name__ == "__main__":
    main()
