"""From a prediction to detectron2's detections."""

from detectron2.structures import Boxes, Instances

from .structures import Prediction


def top_detections(
    prediction: Prediction, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """Keep the best (query, class) pairs of each image, without NMS: a query may give several detections.

    Args:
        prediction: logits (B, N, K), boxes (B, N, 4) xyxy, pixels of the padded input.
        image_sizes: B pairs of height, width before padding, pixels.
        max_detections: detections per image; there are no more than N * K.

    Returns:
        B Instances of the given sizes, sorted by falling score: pred_boxes (xyxy, pixels, not clipped:
        detector_postprocess does that after it has scaled them), scores in [0, 1], pred_classes.
    """
    num_classes = prediction.logits.shape[2]
    scores = prediction.logits.float().sigmoid().flatten(1)  # (B, N * K)
    scores, indices = scores.topk(min(max_detections, scores.shape[1]), dim=1)  # sorted
    queries, classes = indices // num_classes, indices % num_classes
    boxes = prediction.boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return [
        # A clone, because detectron2 scales boxes in place.
        Instances(size, pred_boxes=Boxes(b.clone()), scores=s, pred_classes=c)
        for size, b, s, c in zip(image_sizes, boxes, scores, classes, strict=True)
    ]
