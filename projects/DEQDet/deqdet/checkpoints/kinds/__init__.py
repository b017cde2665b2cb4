"""The kinds of checkpoints that can be converted, by name; a file's kind is guessed in this order."""

from .adamixer import ADAMIXER, DEQDET
from .base import Kind
from .sparse_rcnn import SPARSE_RCNN
from .swin import SWIN
from .torchvision import TORCHVISION

# AdaMixer's sign, a third layer, is narrower than DEQDet's.
KINDS = {kind.name: kind for kind in (ADAMIXER, DEQDET, SPARSE_RCNN, SWIN, TORCHVISION)}

__all__ = ["KINDS", "Kind"]
