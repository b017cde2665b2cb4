"""The optional packages, and how to install them."""

# For each extra in setup.py whose packages deqdet itself imports, the pip names of these packages.
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
    """Say how to install the packages of an extra, in words that also apply to a clone of the repository."""
    return f"pip install {' '.join(PACKAGES[extra])}, or install deqdet with its extra [{extra}]"
