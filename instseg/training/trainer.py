"""The one Trainer: data loaders, optimizer, evaluators and hooks for every paper."""

import logging
import math
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import getattr_static
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from instseg.checkpoint import Checkpointer
from instseg.config.classes import check_classes, class_count, training_categories
from instseg.config.rules import check_values
from instseg.data.build import register_datasets
from instseg.data.dataset import DataSet, load, load_all
from instseg.data.loaders import (
    Loader,
    build_loss_loader,
    build_test_loader,
    build_train_loader,
    loss_records,
)
from instseg.data.sizes import largest_instance
from instseg.errors import ConfigError, OutputError
from instseg.evaluation import build_evaluator, check_evaluation, take_cropped
from instseg.inference.auto_precision import chosen_dtype
from instseg.inference.precision import precision
from instseg.inference.streaming import build_streams, mean_result
from instseg.modeling import CROPPED, DENSE, EvaluatedRCNN, is_rcnn
from instseg.modeling.augmented import AugmentedRCNN, check_augmentation
from instseg.modeling.building import building
from instseg.modeling.contract import lr_multipliers
from instseg.modeling.pooling import use_region_poolers
from instseg.training.averaging import AveragedWeights
from instseg.training.hooks import (
    BestCheckpoint,
    ValidationLoss,
    check_best_metric,
    check_expected_results,
)
from instseg.training.interruption import Interruption
from instseg.training.loop import TrainLoop, mistakes_unlogged
from instseg.training.memory_format import memory_format_on, set_memory_format

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer for CPUs and GPUs, any number of processes, and safe checkpoints.

    The constructor and :meth:`resume_or_load` find what is wrong with configuration, data and
    weights, before the first iteration.
    """

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False) -> None:
        """
        Args:
            cfg: complete configuration.
            allow_partial: accept weights that fit less than half of the model.
        Raises:
            ConfigError, DatasetError, OutputError: with what to change.
        """
        TrainerBase.__init__(self)
        check_values(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        register_datasets(cfg)
        train_sets = load_all(cfg.DATASETS.TRAIN)
        data_loader = build_train_loader(cfg, train_sets)
        # Held, so that no evaluation reads them again.
        self.test_sets = load_all(cfg.DATASETS.TEST)
        check_classes(cfg, (*train_sets, *self.test_sets))
        categories = training_categories(cfg, train_sets[0])
        model = self.build_model(cfg)
        device = next(model.parameters()).device
        set_memory_format(model, memory_format_on(device, cfg.SOLVER.MEMORY_FORMAT))
        if cfg.TEST.VIDEO:
            build_streams(cfg, model, self.test_sets)  # refuses what would stop an evaluation later
        check_evaluation(cfg, model, self.test_sets)
        check_expected_results(cfg, model, self.test_sets)
        optimizer = self.build_optimizer(cfg, model)
        _check_space(cfg.OUTPUT_DIR, model, copies=4 if cfg.SOLVER.EMA.ENABLED else 3)
        self.average = (
            AveragedWeights(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        )
        distributed = _distribute(model)
        self._trainer = TrainLoop(
            distributed,
            data_loader,
            optimizer,
            amp_dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
            accumulate=cfg.SOLVER.ACCUMULATE_BATCHES,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # Given the distributed model, it has all processes load what the main one reads.
        self.checkpointer = Checkpointer(
            distributed,
            cfg.OUTPUT_DIR,
            sha256=cfg.MODEL.WEIGHTS_SHA256,
            allow_partial=allow_partial,
            classes=class_count(cfg),
            categories=categories,
            largest_instance=largest_instance(train_sets),
            weights=self.average.model_weights if self.average else None,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build as Detectron2 does; a configuration that some part refuses is a ConfigError."""
        with building():
            model: nn.Module = super().build_model(cfg)
        use_region_poolers(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Loader:
        return build_train_loader(cfg, load_all(cfg.DATASETS.TRAIN))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Loader:
        return build_test_loader(cfg, load(dataset_name))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """``SOLVER.OPTIMIZER`` over parameter groups with Detectron2's norm and bias rules.

        A module may train parts of itself at another rate, see
        :class:`instseg.modeling.contract.OwnRatesModule`.
        """
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            lr_factor_func=_lr_factors(model),
        )
        settings = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY}
        if cfg.SOLVER.OPTIMIZER == "SGD":
            sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
            return sgd(
                parameters,
                momentum=cfg.SOLVER.MOMENTUM,
                nesterov=cfg.SOLVER.NESTEROV,
                **settings,
            )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(parameters, fused=True, **settings)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks plus those that the configuration switches on."""
        hooks: list[HookBase | None] = super().build_hooks()
        used = self.average.used if self.average else nullcontext

        def evaluate() -> dict[str, Any]:
            with used():
                self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        hooks = [
            EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate) if isinstance(hook, EvalHook) else hook
            for hook in hooks
        ]
        extra: list[HookBase] = []
        losses: ValidationLoss | None = None
        if self.cfg.TEST.VAL_LOSS_PERIOD > 0:
            if not self.cfg.DATASETS.TEST:
                raise ConfigError("TEST.VAL_LOSS_PERIOD is set, but DATASETS.TEST is empty")
            records = loss_records(self.cfg, self.test_sets)
            losses = ValidationLoss(
                self.cfg.TEST.VAL_LOSS_PERIOD,
                self.checkpointer.model,
                lambda: build_loss_loader(self.cfg, records),
                used,
            )
            extra.append(losses)
        metric = self.cfg.TEST.BEST_METRIC
        lower = bool(metric) and check_best_metric(
            self.cfg, self.checkpointer.model, self.test_sets, losses
        )
        if metric and comm.is_main_process():
            best = Checkpointer(
                self.checkpointer.model,
                os.path.join(self.cfg.OUTPUT_DIR, "best"),
                categories=self.checkpointer.categories,
                largest_instance=self.checkpointer.largest_instance,
                weights=self.checkpointer.weights,
            )
            extra.append(BestCheckpoint(best, metric, lower_is_better=lower))
        # Hooks that save and measure follow the timer, the schedule and exact norm statistics; the
        # writer stays last, so that it writes what the others measured.
        end = len(hooks) - 1 if comm.is_main_process() else len(hooks)
        first = [*hooks[:3], self.average, Interruption(self.checkpointer)]
        return [*first, *hooks[3:end], *extra, *hooks[end:]]

    def train(self) -> Any:
        """Train from ``start_iter``; if that is the end, save ``model_final`` again first."""
        if self.start_iter >= max(self.max_iter, 1):
            self.checkpointer.save("model_final", iteration=self.start_iter - 1)
        with mistakes_unlogged():
            return super().train()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load ``MODEL.WEIGHTS``, or go on from the last checkpoint in ``OUTPUT_DIR``."""
        # The main process decides: others may not see its disk.
        resumes = resume and comm.all_gather(self.checkpointer.has_checkpoint())[0]
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resumes:
            self.start_iter = self.iter + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as Detectron2 does, but refuse an impossible iteration.

        Raises:
            ValueError: an iteration that training cannot go on from.
        """
        iteration = state_dict["iteration"]
        if not isinstance(iteration, int) or not 0 <= iteration < 2**63:
            raise ValueError(f"iteration is {iteration!r:.80}; expected a whole number from 0")
        has_average = AveragedWeights.__qualname__ in state_dict.get("hooks", {})
        if has_average != (self.average is not None):
            raise ValueError(
                f"it {'averages' if has_average else 'does not average'} the weights; set "
                f"SOLVER.EMA.ENABLED {has_average}"
            )
        super().load_state_dict(state_dict)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluate on ``DATASETS.TEST``.

        Masks are cropped if all metrics can read such masks, and dense otherwise; evaluators that
        are given or of another class get those of ``TEST.MASKS``.

        All processes use the running statistics of the main one, which it also saves; during
        training they differ between processes.  Under ``TEST.VIDEO`` the frames of each clip are a
        stream.  Under ``TEST.AUG.ENABLED`` test-time augmentation adds a ``TASK_TTA`` for each
        ``TASK``; its files go to ``OUTPUT_DIR/inference_TTA``.
        """
        check_augmentation(cfg)
        register_datasets(cfg)
        datasets = load_all(cfg.DATASETS.TEST)  # held, so that they are read once
        ours = getattr_static(cls, "build_evaluator") is vars(Trainer)["build_evaluator"]
        if evaluators is None and ours:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.TEST.MASKS = CROPPED if take_cropped(cfg, datasets) else DENSE
        if comm.get_world_size() > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        with precision(chosen_dtype(cfg, bare), cfg.MODEL.DEVICE):
            return cls._test(cfg, model, evaluators, datasets)

    @classmethod
    def _test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None,
        datasets: Sequence[DataSet],
    ) -> dict[str, Any]:
        if not cfg.TEST.VIDEO:
            bare = model.module if isinstance(model, DistributedDataParallel) else model
            evaluated = EvaluatedRCNN(bare) if is_rcnn(bare) else model
            results: dict[str, Any] = super().test(cfg, evaluated, evaluators)
            if cfg.TEST.AUG.ENABLED:
                chosen = evaluators or [
                    build_evaluator(cfg, dataset, "inference_TTA") for dataset in datasets
                ]
                _add_augmented(results, super().test(cfg, AugmentedRCNN(cfg, model), chosen))
            return results
        passes = []
        for stream in build_streams(cfg, model, datasets):
            passes.append(super().test(cfg, stream, evaluators))
        mean: dict[str, Any] = mean_result(passes)
        if len(passes) > 1:
            logger.info(f"Mean of {len(passes)} passes: {mean}")
        return mean

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, load(dataset_name))


def _add_augmented(results: dict[str, Any], augmented: dict[str, Any]) -> None:
    """Add ``augmented`` to ``results`` of the same form, ``TASK`` as ``TASK_TTA``."""
    for key, value in augmented.items():
        if any(isinstance(inner, dict) for inner in value.values()):  # ``key`` is a data set
            _add_augmented(results[key], value)
        else:
            results[f"{key}_TTA"] = value


def _lr_factors(model: nn.Module) -> Callable[[str], float]:
    """Name of a parameter → product of the factors that modules of ``model`` declare for it."""
    factors = [(f"{part}.", factor) for part, factor in lr_multipliers(model)]
    return lambda name: math.prod(f for part, f in factors if f"{name}.".startswith(part))


def _distribute(model: nn.Module) -> nn.Module:
    """``model`` under DistributedDataParallel when there are several processes."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[comm.get_local_rank()] if on_gpu else None,
        broadcast_buffers=False,
    )


def _check_space(output_dir: str, model: nn.Module, *, copies: int) -> None:
    """A first checkpoint must fit on the disk.

    Args:
        copies: tensors saved for each weight: it, two optimizer moments, perhaps its average.
    """
    needed = copies * sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise OutputError(
            f"OUTPUT_DIR {output_dir} has {free / 2**20:.0f} MiB free, a checkpoint needs about "
            f"{needed / 2**20:.0f} MiB; free some space or choose another OUTPUT_DIR"
        )
