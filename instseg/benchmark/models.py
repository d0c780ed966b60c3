"""``instseg benchmark models``: whole predictions against Detectron2's stock predictor."""

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import nn
from yaml import safe_load

from instseg.benchmark.authors import against_authors, authors_milliseconds, check_authors
from instseg.benchmark.peak import missing_instructions, operations, peak_row
from instseg.benchmark.rows import Row, cpu_and_wall, in_fresh_process, peak_resident, seconds
from instseg.benchmark.variants import VARIANTS, opened, prepared
from instseg.config.nodes import CfgNode as SafeCfgNode
from instseg.config.nodes import get_cfg, load_cfg
from instseg.data.build import register_datasets
from instseg.data.dataset import load
from instseg.data.image_arrays import check_image
from instseg.data.images import check_colour, read_image
from instseg.data.intensity import Intensity, ModelImage
from instseg.data.synthetic import shapes
from instseg.errors import ConfigError
from instseg.export import ExportedPredictor
from instseg.inference.precision import BFLOAT16, precision
from instseg.inference.predictor import Predictor
from instseg.modeling import ComparedModel, Network, SplitModel, now, stage_times

logger = logging.getLogger(__name__)

_STOCK = "detectron2 DefaultPredictor"
IMAGES = 8
"""Number of images where no files are given."""


def benchmark_models(
    config_files: Sequence[str],
    inputs: Sequence[str] = (),
    overrides: Sequence[str] = (),
    repeats: int = 6,
    variants: Sequence[str] = ("eager",),
    *,
    allow_partial: bool = False,
    test_set: bool = False,
    peak: bool = False,
    authors: str | None = None,
) -> list[Row]:
    """Compare ``Predictor`` on a list of images with Detectron2's stock predictor, one by one.

    Both run the same network on the same images in this process, by turns.  A separate process for
    each measures peak memory.  Without ``MODEL.WEIGHTS`` the network is random and keeps detections
    of any score, so that its heads have work.  For a model for videos two stages are added, its
    network alone on a key frame and on a frame between two; they are no parts of the total.

    Args:
        config_files: one row for each and every variant, and one for each comparison that the
            model declares (:class:`instseg.modeling.ComparedModel`).
        inputs: image files; without any, eight synthetic images of 640 x 640 pixels.
        test_set: in place of ``inputs``, the first eight images of ``DATASETS.TEST``.
        overrides: ``[KEY, VALUE, ...]``.
        repeats: passes over the images; the median is reported.
        variants: keys of :data:`VARIANTS`; the peer is the same for all.  The peak memory of
            "compiled" includes that of the compiler.
        peak: add a row for each number type of the variants with the fastest convolution in it, and
            to the others the share of that which their networks reach.  On a CPU only.
        authors: ``NAME=FOLDER``, a project and a checkout of its authors' code, which adds a row to
            each with that code as the peer.  On a CPU and with random weights only.
        allow_partial: see :class:`Predictor`.
    Raises:
        ConfigError: fewer than one repeat, an unknown variant, one that a model does not have,
            ``test_set`` beside ``inputs`` or without a data set, or ``peak`` or ``authors`` with a
            configuration that they cannot be had for.
        DatasetError, ImageError: a data set or an image that cannot be read.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}; expected at least 1")
    if test_set and inputs:
        raise ConfigError("--test-set takes the images of DATASETS.TEST; leave out --input")
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"--variant is {variant}; expected one of {', '.join(VARIANTS)}")
    cfgs = [load_cfg(name, overrides) for name in config_files]
    for cfg in cfgs:
        if authors:
            check_authors(authors, cfg)
        if peak and cfg.MODEL.DEVICE != "cpu":
            raise ConfigError(
                f"--peak measures the CPU and MODEL.DEVICE is {cfg.MODEL.DEVICE}; set "
                "MODEL.DEVICE cpu, or leave out --peak"
            )
    dtypes = dict.fromkeys(VARIANTS[variant].dtype for variant in variants) if peak else ()
    peaks = {dtype: peak_row(dtype) for dtype in dtypes}
    rows = list(peaks.values())
    for name, cfg in zip(config_files, cfgs, strict=True):
        intensity = Intensity.of(cfg)
        files = _test_files(cfg) if test_set else inputs
        images = [read_image(path, intensity=intensity) for path in files] or _synthetic_images()
        check_colour(cfg, f"{name}: {_STOCK}")
        theirs = authors and authors_milliseconds(authors, _with_work(cfg), images, repeats)
        with TemporaryDirectory() as folder:
            for variant in variants:
                peak_of_type = peaks.get(VARIANTS[variant].dtype)
                row = _benchmark_model(
                    name, cfg, images, repeats, variant, Path(folder), allow_partial, peak_of_type
                )
                rows += [row, against_authors(row, theirs)] if theirs else [row]
        rows += _declared_comparisons(name, cfg, images[0], repeats)
    return rows


def _with_share(row: Row, predictor: Predictor, dtype: str, image: np.ndarray, peak: float) -> Row:
    """``row`` with what its network reaches of the peak.

    Args:
        predictor: of the row.
        dtype: number type of the row's variant.
        peak: in that type, 10^9 operations per second.
    """
    if not isinstance(predictor.model, SplitModel) or "network" not in row.stages_ms:
        return row
    if isinstance(predictor, ExportedPredictor) and dtype == BFLOAT16:
        if predictor.engine_dtype != BFLOAT16:
            return row
    batch = predictor.model.preprocess([predictor.model_input(ModelImage(image))])
    with precision(predictor.dtype, predictor.cfg.MODEL.DEVICE):
        gflops = operations(Network(predictor.model), batch) / row.stages_ms["network"] / 1e6
    return replace(row, gflops=gflops, share_of_peak=gflops / peak)


def _test_files(cfg: CfgNode) -> list[str]:
    """The first images of ``cfg.DATASETS.TEST``."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; --test-set needs the name of a data set there")
    register_datasets(cfg)
    records = load(cfg.DATASETS.TEST[0]).records[:IMAGES]
    return [record["file_name"] for record in records]


def _synthetic_images() -> list[np.ndarray]:
    images = (shapes.image("shapes_hard_val", index, 640) for index in range(IMAGES))
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in images]


def _benchmark_model(
    name: str,
    cfg: CfgNode,
    images: Sequence[np.ndarray],
    repeats: int,
    variant: str,
    folder: Path,
    allow_partial: bool,
    peak: Row | None,
) -> Row:
    cfg = _with_work(cfg)
    form = VARIANTS[variant]
    options = prepared(form, cfg, images, folder, _same_weights, allow_partial)
    ours = _same_weights(lambda: opened(cfg, options))
    stock = _same_weights(lambda: DefaultPredictor(cfg))
    ours_run = _runner(ours, images)
    stock_run = _runner(stock, images)
    ours_run()
    stock_run()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "stock": []}
    turns = [("ours", ours_run), ("stock", stock_run)]
    for _ in range(repeats):
        for kind, run in turns:
            times[kind].append(cpu_and_wall(run))
        turns.reverse()  # whoever comes second finds warmer caches
    split = isinstance(ours.model, SplitModel)
    with stage_times() if split else _stage_times(ours.model) as stages:
        total = seconds(ours_run)
    stages["rest"] = total - sum(stages.values())
    if variant != "compiled":  # a video model is compiled for single images only
        stages |= _frame_times(ours, images, repeats)
    (ours_cpu, ours_ms), (stock_cpu, stock_ms) = (
        (1000 * statistics.median(x) / len(images) for x in zip(*times[kind], strict=True))
        for kind in ("ours", "stock")
    )
    ours_peak, stock_peak = (_peak_memory(cfg, images, kind) for kind in (options, None))
    row = Row(
        name=Path(name).stem + ("" if variant == "eager" else f"_{variant}"),
        peer=_STOCK,
        ours_ms=ours_ms,
        peer_ms=stock_ms,
        ratio_time=stock_ms / ours_ms,
        ratio_memory=stock_peak / ours_peak if ours_peak and stock_peak else None,
        images_per_second=1000 / ours_ms,
        peak_memory_mib=ours_peak,
        stages_ms={stage: 1000 * seconds / len(images) for stage, seconds in stages.items()},
        cpu_ms=ours_cpu,
        peer_cpu_ms=stock_cpu,
        ratio_cpu=stock_cpu / ours_cpu,
        note=missing_instructions(form.dtype) if cfg.MODEL.DEVICE == "cpu" else None,
    )
    if peak is None or peak.gflops is None:
        return row
    return _with_share(row, ours, form.dtype, images[0], peak.gflops)


@torch.no_grad()
def _declared_comparisons(name: str, cfg: CfgNode, pixels: np.ndarray, repeats: int) -> list[Row]:
    """Rows of the comparisons that a model declares, on one image."""
    model = _same_weights(lambda: build_model(cfg)).eval()
    if not isinstance(model, ComparedModel):
        return []
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
    rows = []
    for comparison in model.comparisons(image.to(cfg.MODEL.DEVICE)):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        turns = [("ours", comparison.ours), ("theirs", comparison.theirs)]
        for _, run in turns:
            run()
        for _ in range(repeats):
            for kind, run in turns:
                times[kind].append(seconds(run))
            turns.reverse()  # whoever comes second finds warmer caches
        ours_ms, theirs_ms = (1000 * statistics.median(times[kind]) for kind in times)
        peer_ms = theirs_ms / comparison.share
        rows.append(
            Row(
                name=f"{Path(name).stem}: {comparison.name}",
                peer=comparison.peer,
                ours_ms=ours_ms,
                peer_ms=peer_ms,
                ratio_time=peer_ms / ours_ms,
                ratio_memory=None,
            )
        )
    return rows


def _same_weights(build: Callable[[], Any]) -> Any:
    """``build()``, with the same random numbers in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def _with_work(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: timing a random network that keeps any detection")
        for node in cfg.MODEL.values():
            if isinstance(node, CfgNode) and "SCORE_THRESH_TEST" in node:
                node.SCORE_THRESH_TEST = 0.0
    return cfg


def _runner(predictor: Any, images: Sequence[np.ndarray]) -> Callable[[], None]:
    """A pass over ``images``, in a list where the predictor takes one."""

    def run() -> None:
        if isinstance(predictor, Predictor):
            predictor([ModelImage(image) for image in images])
        else:
            # The list keeps the results, as that of the other predictor does.
            [predictor(image) for image in images]

    return run


@contextmanager
def _stage_times(model: nn.Module) -> Iterator[dict[str, float]]:
    """Collects the seconds spent in each direct part of ``model``."""
    stages: dict[str, float] = {}
    started: dict[str, float] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            started[name] = now()

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stages[name] = stages.get(name, 0.0) + now() - started[name]

        return hook

    handles = []
    for name, part in model.named_children():
        handles.append(part.register_forward_pre_hook(begin(name)))
        handles.append(part.register_forward_hook(end(name)))
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _frame_times(
    predictor: Predictor, images: Sequence[np.ndarray], repeats: int
) -> dict[str, float]:
    """Seconds for all images as key frames and as frames between; none for a model of images."""
    model = predictor.video()
    if model is None:
        return {}
    pixels = check_image(images[0], format=predictor.cfg.INPUT.FORMAT)
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    batch = model.preprocess([{"image": torch.from_numpy(pixels)}])
    with precision(predictor.dtype, predictor.cfg.MODEL.DEVICE):
        _, state = model.keyframe(batch)
    runs = {
        "keyframe": lambda: model.keyframe(batch),
        "between": lambda: model.between(batch, state),
    }
    with precision(predictor.dtype, predictor.cfg.MODEL.DEVICE):
        runs["between"]()
        times = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: len(images) * statistics.median(x[name] for x in times) for name in runs}


def _peak_memory(
    cfg: CfgNode, images: Sequence[np.ndarray], options: dict[str, Any] | None
) -> float | None:
    """Peak memory in MiB of a fresh process that predicts on ``images``; None if unknown.

    Args:
        options: of our predictor, None for the stock one.
    """
    return in_fresh_process(_peak, cfg.dump(), images, options)


def _peak(
    config: str, images: Sequence[np.ndarray], options: dict[str, Any] | None
) -> float | None:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(SafeCfgNode(safe_load(config)))
    predictor = DefaultPredictor(cfg) if options is None else opened(cfg, options)
    _runner(predictor, images)()
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident()
