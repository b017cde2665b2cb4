"""Everything that measures a trained detector.

- `cost`: its parameters and multiply-adds; needs neither weights nor data.
- `residuals`: how close its iterates come to a fixed point.
- `timing`: seconds and bytes that it takes for an image.
- `steps`, `steps_report`: AP, residual and latency against the number of steps, the solver and the tolerance.
- `residual_signal`, `residual_signal_report`: whether the residual says how far to trust a result. `corruptions`,
  `verdicts` and `rank_statistics` are its parts.
- `comparison`, `comparison_report`: several configs trained on equal terms, and the table of them.
- `mistakes`, `mistakes_sheet`, `training_report`: what was missed or false in each image, a picture of the worst ones,
  and the page about a training.
- `accuracy`, `plots`, `tables`: COCO's AP, pictures of a training, tables in markdown.
"""
