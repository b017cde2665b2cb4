"""The decoders and layers of the six detectors, for tests that go through all of them."""

DECODERS = ("StackedDecoder", "RecurrentDecoder", "EquilibriumDecoder")
LAYERS = {  # and the backbone that the paper has with each
    "AdaMixerLayer": "build_basic_resnet_channel_mapper_backbone",
    "SparseRCNNLayer": "build_basic_resnet_fpn_backbone",
}


def detector_keys(decoder: str, layer: str) -> tuple:
    """KEY, value, ... of one of them, with three layers or steps."""
    keys = "MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.REFINEMENT_LAYER", layer
    return *keys, "MODEL.BACKBONE.NAME", LAYERS[layer], "MODEL.DEQDET.NUM_LAYERS", 3
