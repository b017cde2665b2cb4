#!/usr/bin/env python
"""Write the detections of images or of a video as COCO JSON, YOLO or CSV. See --help, or deqdet/tools/predict.py."""

from deqdet.tools.predict import main

if __name__ == "__main__":
    main()
