#!/usr/bin/env python
"""Export a trained detector to ONNX or torch.export files. See --help, or deqdet/tools/export_model.py."""

from deqdet.tools.export_model import main

if __name__ == "__main__":
    main()
