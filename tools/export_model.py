#!/usr/bin/env python
"""Export a trained detector as ONNX or torch.export files: see --help, or deqdet/tools/export_model.py."""

from deqdet.tools.export_model import main

if __name__ == "__main__":
    main()
