"""DEQDet: deep-equilibrium object detection for Detectron2.

    from deqdet import Predictor

    predictor = Predictor.from_file("model_final.safetensors")
    found = predictor("street.jpg")

Importing the package registers its meta architecture, layers, decoders, solvers, backbones and generated data sets with
Detectron2, so that `get_cfg()` with `add_deqdet_config(cfg)` and Detectron2's own classes work too.
"""

from . import quiet_imports  # noqa: F401  before anything else

# isort: split
from . import backbones, layers, model_zoo
from .config import add_deqdet_config
from .detections import Detections
from .detector import DEQDet
from .engine import Trainer
from .errors import UserError
from .predictor import Predictor
from .version import __version__

__all__ = [
    "DEQDet",
    "Detections",
    "Predictor",
    "Trainer",
    "UserError",
    "__version__",
    "add_deqdet_config",
    "backbones",
    "layers",
    "model_zoo",
]
