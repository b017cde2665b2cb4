"""detectron2's DefaultTrainer with DEQDet's data, optimizer and hooks."""

import errno
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage, has_event_storage

from ..checkpoints import Checkpointer, CheckpointError, CompleteCheckpointer
from ..checkpoints.latest import has_checkpoint
from ..checkpoints.publish import AVERAGE
from ..data import (
    TrainLoader,
    build_coco_evaluator,
    build_test_loader,
    build_train_loader,
    import_faster_coco_eval,
    prepare_datasets,
)
from ..detector import DEQDet
from ..errors import UserError, describe_os_error
from .averaging import AverageWeights
from .configuration import explained_datasets
from .determinism import is_indeterminate
from .early_stop import EarlyStop, EndableTrainer, build_early_stop, metric_name
from .evaluation import StatesEvaluator, StepsEvaluator
from .health import FiniteGuard, check_finite_model
from .hooks import (
    AverageBatchNorm,
    BestCheckpointer,
    KeepNewest,
    MarkProgress,
    ModelFileWriter,
    PeakMemory,
    WeightsCheckpointer,
)
from .insight import build_insight
from .models import buildable
from .optimizer import build_optimizer
from .options import check_options
from .pretrained import load_backbone_weights
from .ranks import is_lost_peer
from .resume import (
    MetricsWriter,
    SeedIteration,
    describe_changes,
    dump_config,
    fitting_checkpoint,
    is_whole,
    restore_batch_norm,
    restore_storage,
    storage_state,
)
from .run_folder import begin_training, has_other_test_sets
from .signals import StopOnSignal
from .step import PRECISIONS, StepTrainer
from .trial import try_own_parts
from .validation import build_validation_loss
from .writers import EvaluationsWriter, ResumableTensorboardWriter, build_run_writers

logger = logging.getLogger(__name__)

# Errors of the disk rather than the data: full, over quota, read-only or broken, or no permission.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


class Trainer(DefaultTrainer, EndableTrainer):
    """Trains, evaluates and checkpoints like detectron2's DefaultTrainer, on GPUs or on the CPU.

    It adds:

    - mixed precision on every device and gradient accumulation (see `StepTrainer`);
    - the optimizer (see `build_optimizer`);
    - an average of the weights if SOLVER.EMA.ENABLED is set (see `AverageWeights`);
    - averaging of BatchNorm's statistics over the ranks (see `AverageBatchNorm`);
    - OUTPUT_DIR/model_best.pth, the weights with the best box AP, if TEST.EVAL_PERIOD is set;
    - OUTPUT_DIR/model_final.safetensors, the trained model in one file, for `Predictor.from_file`.

    With averaged weights, both the raw and the averaged weights are evaluated; the best AP, model_best.pth and the
    model file are those of the average.

    A resumed training ends with the same weights, statistics and metrics as an uninterrupted one (see `resume`).
    """

    def __init__(self, cfg: CfgNode):
        """Check the config, register the data sets of DATASETS.REGISTER, and build model, optimizer, loader and hooks.

        A negative SEED is replaced by a random one, which is the same on all ranks and is stored in checkpoints.

        Raises:
            UserError: a data set or a value in the config is wrong.
        """
        self.check_config(cfg)
        with explained_datasets():
            prepare_datasets(cfg)
        self._seed_is_given = cfg.SEED >= 0
        self._metrics: MetricsWriter | None = None  # on the main process
        self._events: EvaluationsWriter | None = None  # on the main process
        self._resumed: dict[str, Any] | None = None  # the entry "progress" of the resumed checkpoint
        self._resuming = False
        self._has_loaded = False  # whether resume_or_load() has been called
        self._ready = False  # whether before_train() has finished
        # Set by hooks that save a checkpoint after all other work of an iteration.
        self.iteration_complete = False
        self.rank_statistics: dict[str, list[list[torch.Tensor]]] = {}  # by the names of `models`
        self.averaging: AverageWeights | None = None
        with _our_parts(cfg), _disk_errors(cfg.OUTPUT_DIR):
            super().__init__(cfg if self._seed_is_given else _with_seed(cfg, comm.shared_random_seed()))

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last intact checkpoint in OUTPUT_DIR if `resume`, else load MODEL.WEIGHTS.

        With neither, a timm backbone starts from the weights that MODEL.TIMM names.

        Raises:
            UserError: the file cannot be read or downloaded, does not fit the config, or has infinite values or NaN.
        """
        self._resuming, self._has_loaded = resume, True
        if not (resume and has_checkpoint(Path(self.cfg.OUTPUT_DIR))):
            load_backbone_weights(self.model, self.cfg)
        with _readable_weights(), fitting_checkpoint(self.cfg.OUTPUT_DIR):
            super().resume_or_load(resume)
        source = self.checkpointer.get_checkpoint_file() or self.cfg.MODEL.WEIGHTS
        if source:
            check_finite_model(self.model, source)
        if self._resumed is not None:
            changes = describe_changes(self._resumed["config"], self.cfg)
            if changes:
                logger.warning("--resume from %s with other keys: %s", source, changes)
            if not self._seed_is_given:
                self._take_seed(self._resumed["seed"])
            for name, model in self.models().items():
                if statistics := self._resumed.get(name):
                    restore_batch_norm(model, statistics)
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.start_at(self.start_iter)

    def models(self) -> dict[str, nn.Module]:
        """Return the model, and the averaged one if there is one, by the checkpoint entries of their statistics."""
        return {"batch_norm": self.model} | ({"ema_batch_norm": self.averaging.model} if self.averaging else {})

    def drop_data_loader(self) -> None:
        """End the dataloader workers; at exit, DataLoader would report their end by a signal as a failure."""
        self._trainer.reset_data_loader(lambda: None)

    def _take_seed(self, seed: int) -> None:
        self.cfg = _with_seed(self.cfg, seed)
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))
        for hook in self._hooks:
            if isinstance(hook, SeedIteration | FiniteGuard):
                hook.seed = seed

    def train(self) -> dict | None:
        """Train, and evaluate at the end.

        Returns:
            The results of the last evaluation if TEST.EXPECTED_RESULTS has any, as DefaultTrainer returns them.

        Raises:
            UserError: a file cannot be written, or a number became infinite or NaN (a NonFiniteError).
            Stopped: a signal arrived.
        """
        train_log = logging.getLogger("detectron2.engine.train_loop")
        train_log.addFilter(_has_unknown_cause)
        try:
            with _disk_errors(self.cfg.OUTPUT_DIR), warnings.catch_warnings():
                # A false alarm: in float16, the scaler may skip the first optimizer step because of an overflow.
                warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
                return super().train()
        finally:
            train_log.removeFilter(_has_unknown_cause)

    def before_train(self) -> None:
        """Call the hooks, restore the metrics, and finish the iteration in which the resumed checkpoint was saved.

        Files of an earlier training in OUTPUT_DIR are replaced only now, after all checks.
        """
        self._ready = False
        if self.cfg.MODEL.WEIGHTS and not self._has_loaded:
            logger.warning(
                "MODEL.WEIGHTS %s is not loaded, since resume_or_load() was not called: "
                "the training starts from random weights",
                self.cfg.MODEL.WEIGHTS,
            )
        if comm.is_main_process():
            begin_training(Path(self.cfg.OUTPUT_DIR), resumed=self._resuming)
        super().before_train()
        if self._resuming:
            self._go_back_to_checkpoint()
        elif self._events:
            self._events.start(-1, resumed=False)
        self._ready = True

    def _go_back_to_checkpoint(self) -> None:
        if self._metrics:
            self._metrics.go_back(self._resumed["metrics"] if self._resumed else None, self.start_iter)
            self._events.start(self._metrics.last_write, resumed=True)
        if self._resumed:
            restore_storage(self.storage, self._resumed["storage"])
        if self.start_iter == 0:
            return
        self.iter = self.storage.iter = self.start_iter - 1
        final = Path(self.cfg.OUTPUT_DIR, "model_final.pth")
        if comm.is_main_process() and self.start_iter >= self.max_iter and not is_whole(final):
            self.checkpointer.save("model_final", iteration=self.iter)
        if self._resumed and not self._resumed["complete"]:
            # detectron2 saves a checkpoint before it evaluates and writes metrics, so catch up on these.
            for hook in self._hooks:
                if isinstance(hook, hooks.EvalHook | hooks.BestCheckpointer | hooks.PeriodicWriter | EarlyStop):
                    hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def run_step(self) -> None:
        """Run one iteration.

        Raises:
            NonFiniteError: a loss, a prediction or a gradient is infinite or NaN.
            UserError: the GPU is out of memory.
        """
        try:
            super().run_step()
        except FloatingPointError as error:
            guard = next(hook for hook in self._hooks if isinstance(hook, FiniteGuard))
            raise guard.explain(error) from error
        except torch.cuda.OutOfMemoryError as error:
            what = ". ".join(str(error).split(". ")[:2])  # the rest is about PyTorch's allocator
            raise UserError(
                f"{what} at iteration={self.iter}: set SOLVER.ACCUMULATION_STEPS 2 or more, "
                "MODEL.DEQDET.EQUILIBRIUM.CHECKPOINT_SEGMENTS True or SOLVER.AMP.ENABLED True, or make the images of "
                "INPUT smaller (docs/training.md, Troubleshooting)"
            ) from error

    def after_train(self) -> None:
        """Call the hooks; after an error, only those that neither evaluate nor save."""
        failed = not self._ready or self.iter < self.max_iter  # an error or a signal
        if not failed:  # the loop counts one iteration too many if none was left to do
            self.iter = max(self.start_iter, self.max_iter)
        self.storage.iter = self.iter
        for hook in self._hooks:
            if not (failed and isinstance(hook, hooks.EvalHook | hooks.BestCheckpointer | ModelFileWriter)):
                hook.after_train()

    def state_dict(self) -> dict[str, Any]:
        """Return DefaultTrainer's state dict, with the state of `deqdet.engine.resume` as "progress"."""
        progress = {
            "seed": self.cfg.SEED,
            "config": dump_config(self.cfg, self._resumed["config"] if self._resumed else None),
            "complete": self.iteration_complete,
            "storage": storage_state(get_event_storage()) if has_event_storage() else {},
            "metrics": self._metrics.state_dict() if self._metrics else None,
            **self.rank_statistics,
        }
        return {**super().state_dict(), "progress": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; in checkpoints of older versions, it has no "progress"."""
        super().load_state_dict(state_dict)
        self._resumed = state_dict.get("progress")

    def build_hooks(self) -> list[HookBase | None]:
        """Insert our hooks among detectron2's. They run in the order of the list."""
        cfg, is_main = self.cfg, comm.is_main_process()
        if cfg.TEST.EVALUATOR == "faster-coco-eval":
            import_faster_coco_eval()  # so that an error is raised now and not at the first evaluation
        periods = [cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD]
        insight = build_insight(cfg, self.model)
        known = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        theirs = super().build_hooks()
        placed = {kind: hook for hook in theirs for kind in known if isinstance(hook, kind)}
        averaging = self._build_averaging()
        average = self.averaging.model if self.averaging else None
        saving, writing, publishing = [], [], []
        evaluating = [placed[hooks.EvalHook], *build_validation_loss(cfg, self.model, average)]
        if self.averaging:
            evaluating.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._test_average))
        if is_main:  # the other ranks neither save nor write
            keep = KeepNewest(cfg.SOLVER.KEEP_CHECKPOINTS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.OUTPUT_DIR)
            saving = [placed[hooks.PeriodicCheckpointer], keep]
            if cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST:
                metric = metric_name(cfg, "bbox/AP")
                best = WeightsCheckpointer(self.model if average is None else average, cfg.OUTPUT_DIR, metric)
                evaluating.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, best, metric))
            self._events = EvaluationsWriter(placed[hooks.PeriodicWriter]._writers, cfg.TEST.EVAL_PERIOD)
            writing = [*self._build_pictures(), self._events]
            publishing = [ModelFileWriter(cfg, average)]
        return [
            MarkProgress(),
            SeedIteration(cfg.SEED),
            *(hook for hook in theirs if hook not in placed.values()),  # timer, schedule, PreciseBN
            AverageBatchNorm(*periods),  # before a checkpoint or an evaluation uses the statistics
            *averaging,
            PeakMemory(),
            *insight,
            FiniteGuard(cfg.OUTPUT_DIR, cfg.SEED, periods[0], autocast=self._trainer.autocast),  # before a checkpoint
            *saving,
            *evaluating,
            *writing,  # after all hooks that record metrics
            *publishing,
            *build_early_stop(cfg),
            StopOnSignal(),
        ]

    def _build_pictures(self) -> list[HookBase]:
        """Build the hook of VIS_PERIOD."""
        if self.cfg.VIS_PERIOD == 0:
            return []
        from .pictures import build_pictures  # imports matplotlib, which other trainings do without

        return build_pictures(self.cfg, self.model)

    def _build_averaging(self) -> list[HookBase]:
        """Build the hook of SOLVER.EMA, and make its weights the entry "ema" of the checkpoints."""
        cfg = self.cfg
        if not cfg.SOLVER.EMA.ENABLED:
            return []
        periods = [cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD]
        self.averaging = AverageWeights(self.model, cfg.SOLVER.EMA.DECAY, periods)
        self.checkpointer.add_checkpointable(AVERAGE, self.averaging.model)
        return [self.averaging]

    def _test_average(self) -> dict[str, dict]:
        """Evaluate the averaged weights; results are named "ema/bbox/AP" and so on, and files lie in OUTPUT_DIR/ema."""
        logger.info("Evaluation of the averaged weights:")
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, AVERAGE)
        results = self.test(cfg, self.averaging.model)
        return {AVERAGE: results} if results else {}

    def build_writers(self) -> list[EventWriter]:
        """Build detectron2's writers, with file writers that can return to a checkpoint, and those of WRITERS."""
        writers = super().build_writers()
        self._metrics = MetricsWriter(Path(self.cfg.OUTPUT_DIR, "metrics.json"))
        for i, writer in enumerate(writers):
            if isinstance(writer, JSONWriter):
                writer.close()
                writers[i] = self._metrics
            elif isinstance(writer, TensorboardXWriter):
                writers[i] = ResumableTensorboardWriter(self.cfg.OUTPUT_DIR)
        return [*writers, *build_run_writers(self.cfg)]

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Check that every value in a config is in its range (see `check_options`), before anything is built.

        A subclass whose own build methods accept other values, such as a learning-rate schedule with a name of its own,
        overrides this.

        Raises:
            UserError: a value is out of range or incompatible; names its key, its value and the range.
        """
        check_options(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model of a config, on MODEL.DEVICE.

        Raises:
            UserError: a name in the config is unknown, a value out of range, or a user's layer or decoder does not fit.
        """
        with buildable():
            model = super().build_model(cfg)
        try_own_parts(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build the optimizer (see `deqdet.engine.optimizer`)."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """Build a loader with detectron2's sampler, our mapper, and the augmentation that INPUT.AUGMENTATION names."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """Build detectron2's loader of one image at a time, with our mapper."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build an evaluator of COCO's box AP, which also writes the detections to OUTPUT_DIR/inference.

        The AP counts up to TEST.DETECTIONS_PER_IMAGE detections per image. If that is more than 100, "AP@100" is the AP
        of the best 100, as COCO defines it. With several test sets, each has its own subfolder, and so has a set that
        the training in OUTPUT_DIR does not evaluate. With a tolerance (MODEL.DEQDET.SOLVER.RTOL), the number of solver
        steps is reported too, and so is the number of images whose states became infinite or NaN, if there are any.
        """
        folder, names = os.path.join(cfg.OUTPUT_DIR, "inference"), cfg.DATASETS.TEST
        apart = len(names) > 1 or has_other_test_sets(Path(cfg.OUTPUT_DIR), names)
        limits = {"max_detections": cfg.TEST.DETECTIONS_PER_IMAGE, "library": cfg.TEST.EVALUATOR}
        coco = build_coco_evaluator(dataset_name, folder, apart=apart, **limits)
        steps = [StepsEvaluator()] if cfg.MODEL.DEQDET.SOLVER.RTOL > 0 else []
        return DatasetEvaluators([coco, *steps, StatesEvaluator()])


def load_weights(model: nn.Module, cfg: CfgNode, *, resume: bool) -> None:
    """Load all weights of a model for an evaluation: MODEL.WEIGHTS, or with `resume` the last checkpoint in OUTPUT_DIR.

    Raises:
        UserError: the file cannot be read or downloaded, is not a checkpoint of this model, or has infinite values or
            NaN.
    """
    checkpointer = CompleteCheckpointer(model, cfg.OUTPUT_DIR, trust_pickle=cfg.MODEL.TRUST_PICKLE)
    with _readable_weights():
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    source = checkpointer.get_checkpoint_file() or cfg.MODEL.WEIGHTS
    if not source:
        raise UserError(f"nothing to evaluate: {cfg.OUTPUT_DIR} has no checkpoint; give one as MODEL.WEIGHTS")
    check_finite_model(model, source)


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


@contextmanager
def _disk_errors(folder: str) -> Iterator[None]:
    """Turn errors in the block, which writes files, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        path = error.filename or folder
        raise UserError(
            f"{path} cannot be written ({describe_os_error(error)}): the existing checkpoints are complete, and "
            "--resume continues from the last one"
        ) from error


def _has_unknown_cause(record: logging.LogRecord) -> bool:
    """Return False for the traceback of an error that is reported in one line anyway, True for other log records."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError | FloatingPointError | OSError):
        return False
    return error is None or not (is_lost_peer(error) or is_indeterminate(error))


@contextmanager
def _readable_weights() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise UserError(f"cannot load the weights: {error}") from error
    except OSError as error:  # URLError is one
        raise UserError(
            f"cannot read the weights ({error}): without network access, download them elsewhere and give the file "
            "as MODEL.WEIGHTS"
        ) from error


@contextmanager
def _our_parts(cfg: CfgNode) -> Iterator[None]:
    """Make DefaultTrainer use our checkpointer and step, and wrap the model in DDP by `_create_ddp_model`.

    DefaultTrainer.__init__ looks up DetectionCheckpointer, SimpleTrainer, AMPTrainer and create_ddp_model in its own
    module. The last passes the local rank as device_ids, which DDP rejects for a model on the CPU. None of them can be
    passed as an argument, so they are temporarily replaced in that module; a copy of __init__ would be longer.
    """
    solver, device_type = cfg.SOLVER, cfg.MODEL.DEVICE.partition(":")[0]
    precision = PRECISIONS[solver.AMP.PRECISION] if solver.AMP.ENABLED else None
    step = functools.partial(
        StepTrainer, device_type=device_type, precision=precision, parts=solver.ACCUMULATION_STEPS
    )
    ours = {
        "DetectionCheckpointer": functools.partial(Checkpointer, trust_pickle=cfg.MODEL.TRUST_PICKLE),
        "SimpleTrainer": step,
        "AMPTrainer": step,
    }
    device_ids = None
    if device_type == "cuda" and comm.get_world_size() > 1:
        # Under Slurm, each process may see only its own GPU, as number 0.
        device_ids = [torch.cuda.current_device()]
    ours["create_ddp_model"] = functools.partial(_create_ddp_model, defaults.create_ddp_model, device_ids=device_ids)
    originals = {name: getattr(defaults, name) for name in ours}
    vars(defaults).update(ours)
    try:
        yield
    finally:
        vars(defaults).update(originals)


def _create_ddp_model(create: Callable[..., nn.Module], model: nn.Module, **options: Any) -> nn.Module:
    """Call detectron2's create_ddp_model, also for a model that does not read all levels of its backbone.

    Parameters that only the other levels use get no gradient. DDP reports an error in the next iteration, unless it
    searches for such parameters.

    Args:
        create: detectron2's function.
    """
    if isinstance(model, DEQDet):
        # "p6" of detectron2's FPN is a pooled "p5", without parameters of its own.
        left_out = set(model.backbone.output_shape()) - {*model.in_features, "p6"}
        options["find_unused_parameters"] = len(left_out) > 0
    return create(model, **options)
