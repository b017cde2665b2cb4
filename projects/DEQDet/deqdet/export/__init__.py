"""Export a trained detector as ONNX graphs or torch.export programs, which run without this package.

`export_detector` writes the files, `check_export` compares them with PyTorch, and `OnnxDetector` runs the ONNX files.
The last one is in runner.py, which needs only numpy and onnxruntime, and can be copied out of the package.
"""

from .check import Difference, check_export
from .graphs import Encoder, OneGraph, Step
from .runner import Found, OnnxDetector
from .write import Exported, export_detector

__all__ = [
    "Difference",
    "Encoder",
    "Exported",
    "Found",
    "OneGraph",
    "OnnxDetector",
    "Step",
    "check_export",
    "export_detector",
]
