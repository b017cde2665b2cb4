"""DEQDet: deep-equilibrium object detection for Detectron2.

    from deqdet import Predictor

    predictor = Predictor.from_file("model_final.safetensors")
    found = predictor("street.jpg")

Importing the package registers its meta architecture, layers, decoders, solvers, backbones and generated data sets with
Detectron2, so that `get_cfg()` with `add_deqdet_config(cfg)` and Detectron2's own classes work too.
"""

import warnings

with warnings.catch_warnings():
    # Detectron2 and fvcore cause these when they are imported, and every command would print them.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")

    import detectron2.model_zoo  # noqa: F401  here, since --init imports it later

    from . import backbones, layers, model_zoo
    from .config import add_deqdet_config
    from .detector import DEQDet
    from .engine import Trainer
    from .errors import UserError
    from .predictor import Detections, Predictor
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
