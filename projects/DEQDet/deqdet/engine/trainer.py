"""detectron2's DefaultTrainer with DEQDet's data, optimizer and hooks."""

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from ..checkpoints import Checkpointer, CheckpointError, CompleteCheckpointer
from ..data import build_coco_evaluator, build_mapper, build_test_loader, prepare_datasets
from ..errors import UserError
from .configuration import explained_datasets
from .evaluation import StepsEvaluator
from .hooks import AverageBatchNorm, BestCheckpointer, ModelFileWriter, PeakMemory, WeightsCheckpointer
from .insight import build_insight
from .models import buildable
from .optimizer import build_optimizer


class Trainer(DefaultTrainer):
    """Trains, evaluates and checkpoints as detectron2 users know it, on GPUs or on the CPU.

    New are the optimizer (see `build_optimizer`), the average of BatchNorm's statistics over the ranks,
    OUTPUT_DIR/model_best.pth with the weights of the best box AP if TEST.EVAL_PERIOD is set, and
    OUTPUT_DIR/model_final.safetensors, the trained model in one file for `Predictor.from_file`.
    """

    def __init__(self, cfg: CfgNode):
        """Register the data sets of DATASETS.REGISTER, and build model, optimizer, loader and hooks.

        Raises:
            UserError: SOLVER.AMP.ENABLED without CUDA, or a data set or a value in the config is wrong.
        """
        on_cuda = cfg.MODEL.DEVICE.startswith("cuda")
        if cfg.SOLVER.AMP.ENABLED and not (on_cuda and torch.cuda.is_available()):
            raise UserError(
                f"SOLVER.AMP.ENABLED needs CUDA, but MODEL.DEVICE is {cfg.MODEL.DEVICE}: set it to False"
            )
        with explained_datasets():
            prepare_datasets(cfg)
        with _our_parts(on_cuda, cfg.MODEL.TRUST_PICKLE):
            super().__init__(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in OUTPUT_DIR if `resume`, else load MODEL.WEIGHTS.

        Raises:
            UserError: the file cannot be read or downloaded.
        """
        with _readable_weights():
            super().resume_or_load(resume)

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks with ours in between.

        The order matters: BatchNorm's statistics are averaged before a checkpoint or an evaluation uses them, the best
        checkpoint is chosen after an evaluation, and the model file is written at the very end.
        """
        cfg = self.cfg
        insight = build_insight(cfg, self.model)
        ret = super().build_hooks()
        readers = (hooks.PeriodicCheckpointer, hooks.EvalHook)  # ranks other than 0 have no checkpointer
        first = next(i for i, hook in enumerate(ret) if isinstance(hook, readers))
        average = AverageBatchNorm(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        ret[first:first] = [average, PeakMemory(), *insight]
        if cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST and comm.is_main_process():
            # With several sets, detectron2 puts a set's name before its metrics.
            metric = "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"
            checkpointer = WeightsCheckpointer(self.model, cfg.OUTPUT_DIR)
            after = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook)) + 1
            ret.insert(after, BestCheckpointer(cfg.TEST.EVAL_PERIOD, checkpointer, metric))
        if comm.is_main_process():
            ret.append(ModelFileWriter(cfg))
        return ret

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model of a config, on MODEL.DEVICE.

        Raises:
            UserError: a name in the config is unknown, or a value out of range.
        """
        with buildable():
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See `deqdet.engine.optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """detectron2's loader, with our mapper and the augmentation that INPUT.AUGMENTATION names."""
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """detectron2's loader of one image at a time, with our mapper."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's box AP with at most 100 detections for each image, which are also written to OUTPUT_DIR/inference.

        With several test sets, each has a folder of its name in there.
        With a tolerance (MODEL.DEQDET.SOLVER.RTOL), the number of steps that the images took is reported too.
        """
        folder, several = os.path.join(cfg.OUTPUT_DIR, "inference"), len(cfg.DATASETS.TEST) > 1
        coco = build_coco_evaluator(dataset_name, folder, apart=several)
        return DatasetEvaluators([coco, StepsEvaluator()]) if cfg.MODEL.DEQDET.SOLVER.RTOL > 0 else coco


def load_weights(model: nn.Module, cfg: CfgNode, *, resume: bool) -> None:
    """Load all weights of a model for an evaluation: MODEL.WEIGHTS, or with `resume` the last checkpoint in OUTPUT_DIR.

    Raises:
        UserError: the file cannot be read or downloaded, or is not a checkpoint of this model.
    """
    with _readable_weights():
        checkpointer = CompleteCheckpointer(model, cfg.OUTPUT_DIR, trust_pickle=cfg.MODEL.TRUST_PICKLE)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)


@contextmanager
def _readable_weights() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise UserError(f"cannot load the weights: {error}") from error
    except OSError as error:  # URLError is one
        raise UserError(
            f"cannot read the weights ({error}): with no network, download them elsewhere and give the file "
            "as MODEL.WEIGHTS"
        ) from error


@contextmanager
def _our_parts(on_cuda: bool, trust_pickle: bool) -> Iterator[None]:
    """Make DefaultTrainer use our checkpointer, and let DDP take a model that is not on CUDA.

    DefaultTrainer.__init__ calls DetectionCheckpointer and create_ddp_model of its own module. The latter passes the
    local rank as device_ids, which DDP refuses for a model on the CPU. There is no argument for either, so the names in
    that module stand for other objects meanwhile; a copy of __init__ would be longer.
    """
    originals = defaults.create_ddp_model, defaults.DetectionCheckpointer
    defaults.DetectionCheckpointer = functools.partial(Checkpointer, trust_pickle=trust_pickle)
    if not on_cuda:
        defaults.create_ddp_model = functools.partial(originals[0], device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model, defaults.DetectionCheckpointer = originals
