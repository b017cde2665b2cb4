"""Convert predictions to detections, detectron2's Instances."""

from collections.abc import Sequence

from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances

from .structures import Prediction


def top_detections(
    prediction: Prediction, image_sizes: Sequence[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """Select the pairs of a query and a class with the highest scores in each image, without NMS.

    A query may give several detections of different classes.

    Args:
        prediction: logits (B, N, K), boxes (B, N, 4) xyxy, pixels of the padded input.
        image_sizes: height and width of each image before padding, pixels.
        max_detections: the largest number of detections of an image; there are never more than N * K.

    Returns:
        For each image Instances of the given size, sorted by falling score, with pred_boxes (xyxy, pixels, not yet
        clipped), scores in [0, 1], pred_classes, and queries: which of the N queries each detection comes from.
    """
    num_classes = prediction.logits.shape[2]
    scores = prediction.logits.float().sigmoid().flatten(1)  # (B, N * K)
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)  # sorted
    queries, classes = indices // num_classes, indices % num_classes
    boxes = prediction.boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return [
        # Clone, because detectron2 scales boxes in place.
        Instances(size, pred_boxes=Boxes(b.clone()), scores=s, pred_classes=c, queries=q)
        for size, b, s, c, q in zip(image_sizes, boxes, scores, classes, queries, strict=True)
    ]


def make_detections(
    prediction: Prediction,
    image_sizes: Sequence[tuple[int, int]],
    original_sizes: Sequence[tuple[int, int]],
    max_detections: int,
) -> list[Instances]:
    """Select the best detections of each image, scaled to its original size and clipped to it.

    Args:
        image_sizes, original_sizes: height and width of each input image before padding, and of the original image.
    """
    found = top_detections(prediction, image_sizes, max_detections)
    return [detector_postprocess(x, height, width) for x, (height, width) in zip(found, original_sizes, strict=True)]
