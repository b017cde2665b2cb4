"""The optional packages, and how to get one that is missing."""

# Of each extra in setup.py that the package itself imports: its packages, by their names for pip.
PACKAGES = {
    "timm": ("timm",),
    "swin": ("timm",),
    "hub": ("huggingface_hub",),
    "supervision": ("supervision",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "fast-eval": ("faster-coco-eval",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny",),
}


def how_to_install(extra: str) -> str:
    """How to install the packages of an extra, in words that hold for a clone of the repository too."""
    return f"pip install {' '.join(PACKAGES[extra])}, or install deqdet with its extra [{extra}]"
