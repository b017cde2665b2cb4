"""Run the detector on images in batches, and record each group of images as soon as it is finished."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from ..demo.video import Video
from ..detections import Detections
from ..errors import UserError, one_line
from ..predictor import Predictor
from .journal import Done, Journal
from .sources import Source

BATCHES = 4  # per group of images; images of a group with the same padded size share batches


def predict_images(
    predictor: Predictor,
    sources: Sequence[Source],
    journal: Journal,
    options: Mapping[str, Any],
    *,
    batch_size: int,
    skip_broken: bool,
) -> None:
    """Run the detector on all images that are not in the journal yet.

    Args:
        journal: the journal of these images, with groups of BATCHES * batch_size.
        options: steps, rtol, solver, threshold, as in a Predictor's call.
        skip_broken: report an image that cannot be read on stderr, and continue without it.

    Raises:
        UserError: an image cannot be read and is not skipped. The groups before it are in the journal.
    """
    first, group = len(journal.done), BATCHES * batch_size
    with tqdm(total=len(sources), initial=first, desc="images", unit=" images", disable=None) as bar:
        for start in range(first, len(sources), group):
            chunk = sources[start : start + group]
            states = [source.state() for source in chunk]
            prepared, faults = _prepare(predictor, chunk, skip_broken)
            found = iter(predictor.detect(list(prepared.values()), **options, batch_size=batch_size))
            done = [
                _to_done(next(found), state) if i in prepared else Done(state, fault=faults[i])
                for i, state in enumerate(states)
            ]
            journal.add(done)
            bar.update(len(chunk))


def predict_video(
    predictor: Predictor, video: Video, journal: Journal, options: Mapping[str, Any], *, batch_size: int
) -> None:
    """Run the detector on all frames of a video that are not in the journal yet; frames are numbered from 1 on.

    Raises:
        UserError: a frame cannot be processed. The groups before it are in the journal.
    """
    first, group = len(journal.done), BATCHES * batch_size
    frames = islice(enumerate(video.frames(), start=1), first, None)
    with tqdm(total=video.length, initial=first, desc=video.name, unit=" frames", disable=None) as bar:
        for chunk in _chunks(frames, group):
            try:
                prepared = [predictor.prepare(frame) for _, frame in chunk]
                found = predictor.detect(prepared, **options, batch_size=batch_size)
            except UserError as error:
                raise UserError(f"{video.name}: {error}") from error
            journal.add([_to_done(one, [number]) for one, (number, _) in zip(found, chunk, strict=True)])
            bar.update(len(chunk))


def _prepare(
    predictor: Predictor, chunk: Sequence[Source], skip_broken: bool
) -> tuple[dict[int, dict], dict[int, str]]:
    """Read a chunk of images: the model's inputs, or why an image cannot be read, by index in the chunk."""
    prepared, faults = {}, {}
    for i, source in enumerate(chunk):
        try:
            prepared[i] = predictor.prepare(source.path)
        except UserError as error:
            if not skip_broken:
                raise UserError(f"{one_line(error)}; --skip-broken continues without it") from error
            faults[i] = one_line(error)
            tqdm.write(f"error: {faults[i]}", file=sys.stderr)
    return prepared, faults


def _to_done(found: Detections, state: list) -> Done:
    rows = found.to_coco(0, range(len(found.class_names)))
    return Done(
        state,
        size=tuple(int(side) for side in found.instances.image_size),
        detections=tuple((row["category_id"], row["score"], *row["bbox"]) for row in rows),
        finite=found.finite,
    )


def _chunks(items: Iterator[tuple[int, np.ndarray]], size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    while chunk := list(islice(items, size)):
        yield chunk
