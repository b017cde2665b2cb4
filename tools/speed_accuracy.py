#!/usr/bin/env python
"""AP against time, for trained detectors that are run in several ways. See deqdet/tools/speed_accuracy.py."""

from deqdet.tools.speed_accuracy import main

if __name__ == "__main__":
    main()
