#!/usr/bin/env python
"""Whether the residual of a trained detector says how far to trust its result. See deqdet/tools/residual_signal.py."""

from deqdet.tools.residual_signal import main

if __name__ == "__main__":
    main()
