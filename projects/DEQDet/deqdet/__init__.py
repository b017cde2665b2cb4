"""DEQDet: deep-equilibrium object detection for Detectron2. Importing it registers everything by name."""

from . import backbones, layers
from .config import add_deqdet_config
from .detector import DEQDet

__all__ = ["DEQDet", "add_deqdet_config", "backbones", "layers"]
