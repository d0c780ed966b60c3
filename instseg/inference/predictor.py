"""Prediction on one image, a list or a stream, equal to Detectron2's ``DefaultPredictor``."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from PIL import Image
from torch import Tensor

from instseg.categories import Categories
from instseg.checkpoint import Checkpointer
from instseg.config.classes import class_count, model_categories
from instseg.config.nodes import check_device, get_cfg, load_cfg
from instseg.config.rules import check_values
from instseg.data.image_arrays import check_image
from instseg.data.images import Array, read_image
from instseg.data.intensity import Intensity
from instseg.data.pillow_images import convert_image
from instseg.data.sizes import saved_largest_instance
from instseg.errors import ConfigError, ImageError
from instseg.forks import check_threads
from instseg.inference.auto_precision import chosen_dtype
from instseg.inference.optimize import optimize as optimize_model
from instseg.inference.precision import BFLOAT16, precision, store_as_bfloat16
from instseg.inference.tile_sources import opened
from instseg.inference.tiles import layout_of, predict_tiles
from instseg.modeling import (
    CROPPED,
    MASK_FORMS,
    Network,
    VideoModel,
    as_split,
    as_video,
    cropped,
    is_rcnn,
    predict_rcnn,
    stage,
)
from instseg.modeling.augmented import AugmentedRCNN
from instseg.modeling.building import building
from instseg.modeling.contract import padded_shape
from instseg.modeling.pooling import use_region_poolers
from instseg.shipped import SCHEME

logger = logging.getLogger(__name__)

Infer = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class _Prepared:
    """An image for the model.

    Attributes:
        image: (C, H, W), None where resizing leaves no pixel.
        height, width: of the image itself.
        max_instances: upper limit of the instances in the result.
        masks: "dense" or "cropped".
    """

    image: Tensor | None
    height: int
    width: int
    max_instances: int
    masks: str

    def as_input(self) -> dict[str, Any]:
        """See :class:`instseg.modeling.contract.Input`."""
        return dict(vars(self))

    @property
    def mask_bytes(self) -> int:
        """Memory that dense masks of ``max_instances`` instances take."""
        if self.masks == CROPPED:
            return 0
        return self.height * self.width * self.max_instances


class Predictor:
    """Runs a model on images.

    Pre-processing and results are those of Detectron2's ``DefaultPredictor``.  In addition it takes
    paths and Pillow images, checks what it is given, and runs images of the same padded shape
    in one forward pass.  Images of different shapes never share one: more padding would change
    their results.

    Attributes:
        cfg: frozen copy of the configuration in use.
        model: the network, in evaluation mode.
        intensity: what is done to the channels of images, by ``INPUT.NORMALIZE`` and
            ``INPUT.CHANNELS``.
        batch_size: upper limit of the images in a forward pass.
        categories: ids and names of the classes,
            see :func:`instseg.config.classes.model_categories`.
        largest_instance: longest side of an instance in training in pixels of its image; None if
            the weights do not say it.

    Example::

        predictor = Predictor("mask_rcnn/mask_rcnn_shapes.yaml", "model_final.pth")
        masks = predictor("photo.jpg")["instances"].pred_masks
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        overrides: Sequence[Any] = (),
        batch_size: int | None = None,
        allow_partial: bool = False,
        optimize: bool = False,
        compile: bool = False,
        classes: Categories | None = None,
        masks: str | None = None,
        dtype: str | None = None,
    ) -> None:
        """Build the model and load its weights.

        Args:
            config: a configuration, or what :func:`instseg.load_cfg` takes: the path of a YAML
                file, or ``zoo://NAME``.
            weights: a checkpoint; replaces ``MODEL.WEIGHTS`` and the checksum that belongs to it.
            overrides: ``[KEY, VALUE, ...]``, applied last.
            batch_size: None chooses 8 on a GPU and 1 on a CPU, where a batch takes longer per
                image than single images do.
            allow_partial: accept weights that lack tensors that inference uses, which stay random,
                or that have others.
            optimize: fold batch normalisation and store weights channels last, see
                :func:`instseg.inference.optimize.optimize`.
            compile: run the network through ``torch.compile`` as one graph.  That takes a minute
                or so at the first image and needs a C++ compiler (on a GPU Triton).
            classes: ids and names of the classes, instead of those in the weights.
            masks: "dense" for ``pred_masks`` (N, H, W) bool, "cropped" for
                :class:`instseg.masks.CroppedMasks`, which take the memory that the instances cover;
                None is ``TEST.MASKS``.
            dtype: number type of the network, "float32", "bfloat16", or "auto" for the one that
                :mod:`instseg.inference.auto_precision` chooses; None is ``MODEL.DTYPE_TEST``.
        Raises:
            ConfigError: a configuration that cannot be used; ``compile`` for a model that declares
                no network of fixed shape.
            CheckpointError: weights that cannot be used.
        """
        chosen = {"TEST.MASKS": masks, "MODEL.DTYPE_TEST": dtype}
        given = [x for key, value in chosen.items() if value is not None for x in (key, value)]
        cfg = _resolve(config, weights, [*overrides, *given])
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
        self.cfg = cfg.clone()
        self.cfg.freeze()
        self.intensity = Intensity.of(cfg)
        self.batch_size = batch_size or (8 if cfg.MODEL.DEVICE.startswith("cuda") else 1)
        with building():
            self.model = build_model(cfg).eval()
        use_region_poolers(self.model)
        self._network: Callable[[Tensor], Sequence[Tensor]] | None = None
        checkpoint = self._load(allow_partial)
        self.largest_instance = saved_largest_instance(checkpoint)
        self.categories = model_categories(cfg, checkpoint, classes)
        if optimize:
            optimize_model(self.model)
        self.cfg.defrost()
        self.cfg.MODEL.DTYPE_TEST = chosen_dtype(self.cfg, self.model)
        self.cfg.freeze()
        if self.dtype == BFLOAT16:
            store_as_bfloat16(self.model)
        if compile:
            network = Network(as_split(self.model, "compiled")).eval()
            self._network = torch.compile(network, fullgraph=True)
        augments = self.cfg.TEST.AUG.ENABLED
        self._augmented = AugmentedRCNN(self.cfg, self.model) if augments else None

    @classmethod
    def from_zoo(cls, name: str, **options: Any) -> "Predictor":
        """A model that instseg ships; ``instseg models`` lists them.

        Args:
            name: such as ``mask_rcnn_nuclei``.
            options: see the constructor.
        Raises:
            CheckpointError: there is no such model, or its weights are damaged.
        """
        return cls(f"{SCHEME}{name}", **options)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None where they are unknown."""
        return list(self.categories.names) if self.categories.named else None

    @property
    def dtype(self) -> str:
        """Number type of the network, "float32" or "bfloat16"."""
        return str(self.cfg.MODEL.DTYPE_TEST)

    def _load(self, allow_partial: bool) -> dict[str, Any]:
        """Load the weights of the model; return the rest of the checkpoint."""
        if not self.cfg.MODEL.WEIGHTS:
            logger.warning(
                "MODEL.WEIGHTS is empty: the model is untrained and its results are noise"
            )
            return {}
        checkpointer = Checkpointer(
            self.model,
            sha256=self.cfg.MODEL.get("WEIGHTS_SHA256", ""),
            allow_partial=allow_partial,
            inference=True,
            classes=class_count(self.cfg),
        )
        checkpoint: dict[str, Any] = checkpointer.load(self.cfg.MODEL.WEIGHTS)
        return checkpoint

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[dict[str, Any]]: ...
    @overload
    def __call__(self, images: Array | str | os.PathLike[str] | Image.Image) -> dict[str, Any]: ...
    def __call__(self, images: Any) -> Any:
        """Predict on one image, or on a list of them.

        Args:
            images: an (H, W, 3) uint8 array in BGR order, a path or a Pillow image; or a list or
                tuple of these.  :func:`instseg.data.image_arrays.check_image` says what else is
                accepted.
        Returns:
            for one image a dict whose ``"instances"`` has ``pred_boxes`` (pixels of the image,
            xyxy), ``scores``, ``pred_classes`` and ``pred_masks``, (N, H, W) bool or cropped (see
            ``masks`` of the class); for a list, a
            list of such dicts.
        Raises:
            ImageError: an image that cannot be read or used.
            TypeError: an object that is no image.
            CheckpointError: the network gives values that are not finite.
            ProcessError: the threads of the network were lost in a fork.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images))
        return self._run([self._prepare(images, "image")])[0]

    def model_input(self, image: Any, name: str = "image") -> dict[str, Any]:
        """What the model gets for one image, see :class:`instseg.modeling.contract.Input`.

        Args:
            image: see :meth:`__call__`.
            name: its name in error messages.
        Raises:
            ImageError, TypeError: an image that cannot be used, or of which resizing leaves no
                pixel.
        """
        prepared = self._prepare(image, name)
        if prepared.image is None:
            raise ImageError(f"{name}: it is so thin that resizing leaves no pixel of it")
        return prepared.as_input()

    def predict_with(self, infer: Infer | None, image: Any, name: str) -> dict[str, Any]:
        """Predict on one image by ``infer`` in place of the model.

        Args:
            infer: list of Detectron2's inputs → list of its results; not called for an image so
                thin that resizing leaves no pixel of it.  None is the model.
            image: see :meth:`__call__`.
            name: its name in error messages.
        Returns:
            as :meth:`__call__` for one image.
        Raises:
            ImageError, TypeError: an image that cannot be used, before ``infer`` is called.
        """
        return self._run([self._prepare(image, name)], infer)[0]

    def predict_tiled(
        self,
        image: Any,
        tile: int = 1024,
        overlap: int | None = None,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Predict on an image of any size, tile by tile, see :mod:`instseg.inference.tiles`.

        Args:
            image: as for one image in :meth:`__call__`, or regions
                (:class:`instseg.data.regions.Regions`).  A TIFF or zarr file is read by parts.
            tile: side of the tiles in pixels of the image.
            overlap: pixels that neighbouring tiles share at least, an instance and what the network
                has to see around it; None is :func:`instseg.inference.tiles.default_overlap`.
            progress: show a bar on terminals.
        Returns:
            as :meth:`__call__` for one image; ``pred_masks`` are
            :class:`instseg.masks.CroppedMasks`.
        Raises:
            ConfigError: no tiles of this side overlap so much.
            ImageError, TypeError: as :meth:`__call__`.
        """
        with opened(image, self.cfg) as source:
            layout = layout_of(self, source, tile, overlap)
            return {"instances": predict_tiles(self, source, layout, progress=progress)}

    def video(self) -> VideoModel | None:
        """The networks for key frames and for frames between; None if frames share no work."""
        return as_video(self.model)

    def stream(
        self, images: Iterable[Any], *, masks: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Predict on any number of images, lazily and in order.

        Takes at most ``batch_size`` images before it gives the first of their results; fewer if
        their dense masks could take more than ``TEST.MASK_MEMORY``.

        Args:
            images: see :meth:`__call__`.
            masks: "dense" or "cropped"; None is ``TEST.MASKS``.
        Yields:
            one dict per image.
        Raises:
            ConfigError: masks of another form.
            ImageError, TypeError: an image that cannot be used, after the results of those before
                it.
        """
        if masks not in (None, *MASK_FORMS):
            raise ConfigError(f"masks is {masks!r}; expected {' or '.join(MASK_FORMS)}")
        window: list[_Prepared] = []
        for number, image in enumerate(images):
            try:
                prepared = self._prepare(image, f"images[{number}]", masks)
            except Exception:
                yield from self._run(window)
                raise
            free_bytes = self._mask_bytes - sum(item.mask_bytes for item in window)
            if window and prepared.mask_bytes > free_bytes:
                yield from self._run(window)
                window = []
            window.append(prepared)
            if prepared.mask_bytes >= free_bytes or len(window) >= self.batch_size:
                yield from self._run(window)
                window = []
        yield from self._run(window)

    def _prepare(self, item: Any, name: str, masks: str | None = None) -> _Prepared:
        format = self.cfg.INPUT.FORMAT
        if isinstance(item, str | os.PathLike):
            image = read_image(item, format=format, intensity=self.intensity)
        elif isinstance(item, Image.Image):
            image = convert_image(item, source=name, format=format, intensity=self.intensity)
        else:
            image = check_image(item, source=name, format=format, intensity=self.intensity)
        height, width = image.shape[:2]
        masks = masks or str(self.cfg.TEST.MASKS)
        max_instances: int = self.cfg.TEST.DETECTIONS_PER_IMAGE
        if masks != CROPPED:
            max_instances = self._max_instances(height, width)
        # Detectron2's augmentation object would draw its one size with NumPy's global generator.
        if shortest := self.cfg.INPUT.MIN_SIZE_TEST:
            shape = ResizeShortestEdge.get_output_shape(
                height, width, shortest, self.cfg.INPUT.MAX_SIZE_TEST
            )
            if min(shape) == 0:
                return _Prepared(None, height, width, max_instances, masks)
            image = ResizeTransform(height, width, *shape, Image.Resampling.BILINEAR).apply_image(
                image
            )
        tensor = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
        return _Prepared(tensor, height, width, max_instances, masks)

    @property
    def _mask_bytes(self) -> int:
        return int(self.cfg.TEST.MASK_MEMORY * 1e9)

    def _max_instances(self, height: int, width: int) -> int:
        """Number of instances whose dense masks fit into ``TEST.MASK_MEMORY``, at least one."""
        wanted: int = self.cfg.TEST.DETECTIONS_PER_IMAGE
        limit = max(self._mask_bytes // (height * width), 1)
        if 0 <= wanted <= limit:
            return wanted
        log_first_n(
            logging.WARNING,
            f"an image of {width}x{height} pixels gets only the {limit} instances with the highest "
            f"scores: masks of TEST.DETECTIONS_PER_IMAGE {wanted} could take more than "
            f"TEST.MASK_MEMORY {self.cfg.TEST.MASK_MEMORY:g} GB; set TEST.MASKS cropped, raise "
            "TEST.MASK_MEMORY or shrink the image (said once)",
        )
        return limit

    # Not around the generator: between two results the caller's own gradient mode must hold.
    @torch.no_grad()
    def _run(self, window: Sequence[_Prepared], infer: Infer | None = None) -> list[dict[str, Any]]:
        check_threads()
        infer = infer or self._infer
        results = [self._nothing(item) for item in window]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, item in enumerate(window):
            if item.image is not None:
                groups[padded_shape(self.model, *item.image.shape[-2:])].append(index)
        for indices in groups.values():
            inputs = [window[i].as_input() for i in indices]
            with precision(self.dtype, self.cfg.MODEL.DEVICE):
                inferred = infer(inputs)
            for index, result in zip(indices, inferred, strict=True):
                results[index] = cropped(result) if window[index].masks == CROPPED else result
        return results

    def _infer(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``self.model(inputs)``, run with test-time augmentation or another network if asked."""
        if self._augmented is not None:
            # 8 bits, as evaluation reads files: Detectron2 resizes other types differently.
            exact = [{**item, "image": item["image"].to(torch.uint8)} for item in inputs]
            augmented: list[dict[str, Any]] = self._augmented(exact)
            return augmented
        if is_rcnn(self.model):
            return predict_rcnn(self.model, inputs)
        if self._network is None:
            results: list[dict[str, Any]] = self.model(inputs)
            return results
        model = as_split(self.model, "compiled")
        images = model.preprocess(inputs)
        with stage("network"):
            outputs = self._network(images)
        return model.postprocess(outputs, inputs)

    def _nothing(self, item: _Prepared) -> dict[str, Any]:
        """A result without instances, for an image of which resizing leaves no pixel."""
        device = self.cfg.MODEL.DEVICE
        instances = Instances((item.height, item.width))
        instances.pred_boxes = Boxes(torch.zeros(0, 4, device=device))
        instances.scores = torch.zeros(0, device=device)
        instances.pred_classes = torch.zeros(0, dtype=torch.int64, device=device)
        masks = torch.zeros(0, item.height, item.width, dtype=torch.bool, device=device)
        instances.pred_masks = masks
        result = {"instances": instances}
        return cropped(result) if item.masks == CROPPED else result


def _resolve(
    config: CfgNode | str | os.PathLike[str],
    weights: str | os.PathLike[str] | None,
    overrides: Sequence[Any],
) -> CfgNode:
    cfg = config.clone() if isinstance(config, CfgNode) else load_cfg(config, overrides)
    cfg.defrost()
    if weights is not None:
        cfg.MODEL.WEIGHTS = os.fspath(weights)
        if "WEIGHTS_SHA256" in cfg.MODEL:
            cfg.MODEL.WEIGHTS_SHA256 = ""
    # A configuration of stock Detectron2 has no such keys.
    for key in ("MASKS", "MASK_MEMORY"):
        cfg.TEST.setdefault(key, get_cfg().TEST[key])
    cfg.MODEL.setdefault("DTYPE_TEST", get_cfg().MODEL.DTYPE_TEST)
    # Also for a file, where the lines above may have undone an overridden checksum.
    cfg.merge_from_list(list(overrides))
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is set: the model needs the proposals of each image from a "
            "file, and there are none for new images; evaluate it with `train_net.py --eval-only`"
        )
    check_values(cfg)
    check_device(cfg)
    return cfg


def require_weights(cfg: CfgNode, weights: str | None, purpose: str) -> None:
    """Raise a ConfigError if there are only random weights to ``purpose``."""
    if not (weights or cfg.MODEL.WEIGHTS):
        raise ConfigError(
            f"no weights to {purpose}; pass --weights FILE or MODEL.WEIGHTS FILE, or "
            "--model NAME in place of --config-file"
        )
