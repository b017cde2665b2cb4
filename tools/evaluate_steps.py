#!/usr/bin/env python
"""AP and more of a trained detector against steps, solver and tolerance. See deqdet/tools/evaluate_steps.py."""

from deqdet.tools.evaluate_steps import main

if __name__ == "__main__":
    main()
