"""Everything that the rest of the program may ask of a model.

:class:`Model` is what every meta-architecture owes.  The other protocols are offers: the program
asks for one only if the model, or a module anywhere inside it, has the named attribute or method.
Shared code knows no paper: each paper declares by these protocols what shared code has to know.

A model that wants the stages of its prediction timed by ``instseg benchmark models`` runs each
inside :func:`instseg.modeling.stage`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from torch import Tensor, nn

from instseg.errors import ConfigError

_OF_DETECTRON2: dict[str, str | None] = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "ProposalNetwork": None,
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "SemanticSegmentor": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
}
"""``num_classes_key`` of Detectron2's architectures, which declare none."""


class Input(TypedDict, total=False):
    """An image as a model gets it; a batch is a list of them.

    Attributes:
        image: (C, h, w) values 0..255 in the order of ``INPUT.FORMAT``, resized but not padded.
        height, width: pixels of the result; those of ``image`` where they are missing.
        max_instances: the result has at most so many instances, those with the highest scores.
        masks: "cropped" for :class:`instseg.masks.CroppedMasks`, made without dense masks on the
            way; "dense", (N, height, width) bool, where it is missing.
        instances: Detectron2's ``Instances`` with ``gt_boxes``, ``gt_classes``, ``gt_masks``; in
            training, and under ``INPUT.TRUTH_TEST`` in evaluation.
        sem_seg: (h, w) labels from ``INPUT.SEMANTIC_ROOT``: 0 background, class + 1, 255 neither.
        proposals: boxes of another model, under ``MODEL.LOAD_PROPOSALS``.
    """

    image: Tensor
    height: int
    width: int
    max_instances: int
    masks: str
    instances: Any
    sem_seg: Tensor
    proposals: Any


class Model(Protocol):
    """What every registered meta-architecture owes.

    Attributes:
        num_classes_key: the configuration key with its number of classes, such as
            ``MODEL.ROI_HEADS.NUM_CLASSES``.  None for a model that tells no classes apart: it
            makes proposals, whose ``pred_classes`` are 0.  A subclass inherits it.  Layers that
            depend on the number of classes need no declaration: they are those that have another
            shape in a model for one class more.
    """

    num_classes_key: ClassVar[str | None]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, results otherwise.

        Args:
            batched_inputs: see :class:`Input`.
        Returns:
            in training a dict of scalar losses ``loss_<what>``, finite, whose sum reaches every
            trainable parameter, also where no image has an instance.  Otherwise one dict per image
            with ``instances``: ``pred_boxes`` (pixels of the result, xyxy, inside it), ``scores``
            (N,) in descending order, ``pred_classes`` (N,) and ``pred_masks`` (N, height, width)
            bool, or cropped if the input asks for it; all numbers float32, also under the autocast
            of ``MODEL.DTYPE_TEST``.  A model that knows no cropped masks may give
            dense ones all the same: whoever asks crops them.  An image gives the same result in a
            batch as alone.
        Raises:
            CheckpointError: not in training, the network gives values that are not finite; see
                :func:`instseg.modeling.check_finite`.
        """


@runtime_checkable
class SplitModel(Protocol):
    """A model whose prediction is a network of fixed shape, from tensor to tensors, and the rest.

    The network can be compiled and exported as one graph; what follows depends on the data.
    ``model(inputs)`` must equal ``model.postprocess(model.raw(model.preprocess(inputs)), inputs)``.

    Attributes:
        raw_names: names of the outputs of :meth:`raw`.
    """

    raw_names: tuple[str, ...]

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Detectron2's inputs → what the network takes, the same shape for all images."""

    def raw(self, images: Tensor) -> tuple[Tensor, ...]:
        """The network: tensors with the batch first, no control flow that depends on values."""

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Outputs of the network → Detectron2's results."""

    def extra_networks(self) -> dict[str, Tensor]:
        """Children that :meth:`postprocess` calls, by name, with an input of two rows for each.

        They take and give one tensor, any number of rows; each is exported to a separate file.
        """


@runtime_checkable
class VideoModel(Protocol):
    """A model that spends less on some frames of a video than on others.

    A key frame is computed in full and leaves a state behind; frames until the next one are
    computed with its help.  The state is tensors with the batch first, as images and outputs are,
    and means nothing to the caller; frames of different size never share one.  Calling the model
    itself computes every frame in full::

        outputs, state = model.keyframe(model.preprocess(inputs))
        outputs = model.between(model.preprocess(next_inputs), state)
        results = model.postprocess(outputs, next_inputs)

    Attributes:
        keyframe_interval: frames from one key frame to the next, at least 1.
    """

    keyframe_interval: int

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> Tensor:
        """Detectron2's inputs → what the network takes, the same shape for all images."""

    def keyframe(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A frame in full → outputs of the network, and the state for the frames after it."""

    def between(self, images: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A frame after the key frame that left ``state`` → outputs; the state stays as it is."""

    def postprocess(
        self, outputs: Sequence[Tensor], batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Outputs of the network → Detectron2's results."""


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same.

    Attributes:
        name: what is computed.
        peer: the other way to do it.
        ours, theirs: run one of them.
        share: the part of the work that ``theirs`` does, where all of it would take too long; its
            time is divided by this.
    """

    name: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    share: float = 1.0


@runtime_checkable
class ComparedModel(Protocol):
    """A model that declares comparisons for ``instseg benchmark models``."""

    def comparisons(self, image: Tensor) -> Sequence[Comparison]:
        """What to compare on an image (3, H, W) of values 0..255."""


@runtime_checkable
class SemanticModel(Protocol):
    """A model that can give a semantic map beside instances, ``sem_seg`` (C + 1, height, width).

    Attributes:
        give_semantic: whether this one does.
        semantic_key: the configuration key that asks for it.
    """

    give_semantic: bool
    semantic_key: ClassVar[str]


@runtime_checkable
class MaskScoringModule(Protocol):
    """A module that gives detections ``mask_scores`` (N,) beside ``scores``.

    Attributes:
        gives_mask_scores: whether this one does.
    """

    gives_mask_scores: bool


@runtime_checkable
class OwnRatesModule(Protocol):
    """A module that trains parts of itself at other learning rates."""

    def lr_multipliers(self) -> dict[str, float]:
        """Name of a parameter, or of a module that holds it, relative to this one → factor."""


@runtime_checkable
class TrainingOnlyModule(Protocol):
    """A module with parts that inference does not use."""

    def unused_in_inference(self) -> tuple[str, ...]:
        """Names of parameters, or of modules that hold them, relative to this one.

        A file of weights need not have these, and may have them in another shape.
        """


class Network(nn.Module):
    """``model.raw`` as a module."""

    def __init__(self, model: SplitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.raw(images)


def offers(model: nn.Module, offer: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of every part of ``model``, itself included, that makes an offer.

    Args:
        offer: one of the protocols above.
    """
    for name, module in model.named_modules():
        if isinstance(module, offer):
            yield name, module


def as_split(model: nn.Module, purpose: str) -> SplitModel:
    """``model`` itself if it declares its network.

    Args:
        model: any meta-architecture.
        purpose: "compiled" or "exported", for the error.
    Raises:
        ConfigError: it declares none.
    """
    if isinstance(model, SplitModel):
        return model
    known = ", ".join(architectures(lambda kind: hasattr(kind, "raw")))
    reason = "it declares no network of fixed shape (see instseg.modeling.SplitModel)"
    if hasattr(model, "roi_heads"):
        reason = (
            "what its heads see depends on the regions that it finds in an image, so that only its "
            "backbone is a network of fixed shape"
        )
    raise ConfigError(f"{type(model).__name__} cannot be {purpose}: {reason}; {known} can")


def as_video(model: nn.Module) -> VideoModel | None:
    """``model`` itself if its frames share work, else None."""
    return model if isinstance(model, VideoModel) else None


def gives_mask_scores(model: nn.Module) -> bool:
    """Whether detections of ``model`` have ``mask_scores`` (N,) beside ``scores``."""
    return any(module.gives_mask_scores for _, module in offers(model, MaskScoringModule))


def lr_multipliers(model: nn.Module) -> list[tuple[str, float]]:
    """(name of a parameter or module, factor on its learning rate), as modules declare them."""
    return [
        (f"{prefix}.{name}".lstrip("."), factor)
        for prefix, module in offers(model, OwnRatesModule)
        for name, factor in module.lr_multipliers().items()
    ]


def unused_in_inference(model: nn.Module) -> list[str]:
    """Names of the tensors of ``model`` that inference does not use, as modules declare them."""
    declared = tuple(
        f"{prefix}.{name}.".lstrip(".")
        for prefix, module in offers(model, TrainingOnlyModule)
        for name in module.unused_in_inference()
    )
    return [name for name in model.state_dict() if f"{name}.".startswith(declared)]


def padded_shape(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Height and width to which ``model`` pads an image that is alone in its batch.

    A model with a ``backbone`` of Detectron2 is assumed to pad as that asks, any other to pad in a
    way that changes no result.
    """
    backbone = getattr(model, "backbone", None)
    stride = getattr(backbone, "size_divisibility", None)
    if not isinstance(stride, int):
        return height, width
    constraints = getattr(backbone, "padding_constraints", {})
    if constraints.get("square_size", 0) > 0:
        height = width = constraints["square_size"]
    stride = max(constraints.get("size_divisibility", stride), 1)
    return -(-height // stride) * stride, -(-width // stride) * stride


def declared_num_classes_key(architecture: str) -> str | None:
    """``num_classes_key`` of a registered architecture; None for one that makes proposals.

    Raises:
        ConfigError: it declares none.
    """
    kind: Any = META_ARCH_REGISTRY.get(architecture) if architecture in META_ARCH_REGISTRY else None
    if hasattr(kind, "num_classes_key"):
        key: str | None = kind.num_classes_key
        return key
    for ancestor in getattr(kind, "__mro__", ()):
        if ancestor.__module__.startswith("detectron2.") and ancestor.__name__ in _OF_DETECTRON2:
            return _OF_DETECTRON2[ancestor.__name__]
    raise ConfigError(
        f"MODEL.META_ARCHITECTURE {architecture} does not say which key holds its number of "
        "classes; give its class the attribute num_classes_key, such as "
        "'MODEL.ROI_HEADS.NUM_CLASSES', or None if it tells no classes apart (see "
        "instseg.modeling.contract.Model)"
    )


def architectures(declare: Callable[[Any], object]) -> dict[str, Any]:
    """Name → class of the registered architectures and ROI heads for which ``declare`` holds."""
    known = [*META_ARCH_REGISTRY, *ROI_HEADS_REGISTRY]
    return {name: kind for name, kind in known if declare(kind)}
