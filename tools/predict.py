#!/usr/bin/env python
"""Detections of images or of a video as COCO's JSON, YOLO's txt or CSV. See deqdet/tools/predict.py."""

from deqdet.tools.predict import main

if __name__ == "__main__":
    main()
