#!/usr/bin/env python
"""Pictures of a trained detector: detections, losses, residuals. See deqdet/tools/report.py."""

from deqdet.tools.report import main

if __name__ == "__main__":
    main()
