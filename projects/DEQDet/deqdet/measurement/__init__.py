"""Everything that measures a trained detector.

- `cost`: parameters and multiply-adds; needs neither weights nor data.
- `residuals`: how close the iterates come to a fixed point.
- `timing`: time and memory of a call, and the latency of a detector.
- `checkpoint_cost`: size, cost, speed and memory of a checkpoint, measured in a process of its own.
- `benchmark`, `memory`, `gradients`: time by part, memory in training, gradients in lower precision.
- `duplicates`: objects that several queries find.
- `steps`, `steps_report`: AP, residual and latency against the number of steps, the solver and the tolerance.
- `residual_signal`, `residual_signal_report`: whether the residual predicts how reliable a result is, with
  `corruptions`, `verdicts` and `rank_statistics`.
- `comparison`, `comparison_report`: several configs trained with the same budget, and the table of their results.
- `mistakes`, `mistakes_sheet`, `training_report`: missed objects and false detections of each image, a picture of the
  worst images, and the report on a training run.
- `accuracy`, `plots`, `tables`, `json_numbers`: COCO's AP, plots of a training run, Markdown tables, missing numbers.
"""
