"""Weights of DeepMask and SharpMask (facebookresearch/deepmask, Torch7 files ``model.t7``).

Layers are matched by their order inside each part of the network. Their positions differ: the
authors turned the trained network into one for whole images, which changed padding, reshaping and
wrappers.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg.checkpoint.torch7 import Array, Torch7Object, read_torch7
from instseg.convert.common import Conversion, Report
from instseg.convert.configuration import Fact, Layout, Options
from instseg.errors import CheckpointError

_CONFIGS = {
    "nn.DeepMask": "deepmask/deepmask_resnet50_coco.yaml",
    "nn.SharpMask": "sharpmask/sharpmask_resnet50_coco.yaml",
}
_EXAMPLE = "trunk.modules.1.modules.2.weight"
_PARAMETERS = ("weight", "bias", "a", "b")
_EPS = 1e-5
"""Epsilon of Detectron2's frozen batch normalisation."""
_BLOCKS = (3, 4, 6)
_MASK_HEAD = ("mask_head",)
_SCORE_HEAD = ("score_head.hidden", "score_head.output")
_TRAINED = {"iSz": "PATCH_SIZE", "gSz": "TRAIN_MASK_SIZE"}
"""Option of the authors' training → our key."""
_UNTOLD = (
    *("MODEL.DEEPMASK.PATCH_SIZE", "MODEL.DEEPMASK.TRAIN_MASK_SIZE"),
    *("MODEL.DEEPMASK.OCTAVES_TEST", "MODEL.DEEPMASK.MASK_THRESH_TEST"),
    *("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
)
_WIDTH = 32
_MAX_WIDTH = 1024
_STAGES = (1, 2, 3, 4)


def convert(path: str, options: Options) -> tuple[dict[str, Tensor], Report]:
    """Convert a released file; see :class:`~instseg.convert.common.Converter`.

    The file tells whether it is DeepMask or SharpMask.
    """
    content = read_torch7(path)
    model = content.get("model") if isinstance(content, dict) else content
    if not isinstance(model, Torch7Object) or model.class_name not in _CONFIGS:
        content_class = getattr(model, "class_name", f"a {type(model).__name__}")
        raise CheckpointError(
            f"{path} holds {content_class}; expected an object of class {' or '.join(_CONFIGS)}, "
            "or a table with one as 'model'"
        )
    try:
        trained = content.get("config") if isinstance(content, dict) else None
        layout = _layout(path, model, _table(trained))
        return _convert(path, model, layout, options)
    except RecursionError:
        raise CheckpointError(f"{path} holds modules that are nested too deeply") from None


def _convert(
    path: str, model: Torch7Object, layout: Layout, options: Options
) -> tuple[dict[str, Tensor], Report]:
    conversion = Conversion(path, layout, options)
    names = {id(value): name for name, value in _tensors(model, "", set())}
    fields = model.fields
    _put(conversion, names, fields.get("trunk"), _trunk())
    _put(conversion, names, fields.get("scoreBranch"), _SCORE_HEAD)
    if model.class_name == "nn.DeepMask":
        _put(conversion, names, fields.get("maskBranch"), _MASK_HEAD)
    else:
        _put(conversion, names, fields.get("maskBranchDM"), _MASK_HEAD)
        _put_refinement(conversion, names, fields)
    return conversion.finish(names.values(), _EXAMPLE)


def _layout(path: str, model: Torch7Object, trained: dict[Any, Any]) -> Layout:
    """``trained``: the options of the training, as the authors' files hold them."""
    fields = model.fields
    sharp = model.class_name == "nn.SharpMask"
    trunk, score, mask = (
        list(_layers(fields.get(part), set()))
        for part in ("trunk", "scoreBranch", "maskBranchDM" if sharp else "maskBranch")
    )

    def facts(cfg: CfgNode) -> Iterator[Fact]:
        node = "MODEL.DEEPMASK"
        yield Fact("MODEL.META_ARCHITECTURE", model.class_name[3:], model.class_name)
        if len(trunk) == len(_trunk()):
            for layer, key in ((trunk[-2], "FEATURE_DIM"), (trunk[-1], "EMBEDDING_DIM")):
                yield from _outputs(layer, f"{node}.{key}")
        if score:
            yield from _outputs(score[0], f"{node}.SCORE_DIM")
        if mask and "weight" in mask[-1]:
            side = math.isqrt(len(mask[-1]["weight"]))
            if side**2 == len(mask[-1]["weight"]):
                yield Fact(f"{node}.MASK_SIZE", side, f"masks of {side} x {side}")
        for name, key in _TRAINED.items():
            if (value := _whole(trained.get(name))) is not None:
                yield Fact(
                    f"{node}.{key}", value, f"{name} {value}, in the options of its training,"
                )
        for name, key in (("km", "MASK_DIM"), ("ks", "SKIP_DIM")) if sharp else ():
            width = fields.get(name, _WIDTH)
            if not isinstance(width, int) or not 0 < width <= _MAX_WIDTH or width % 16:
                raise CheckpointError(
                    f"{path}: {name} is {width!r}; expected a multiple of 16 up to {_MAX_WIDTH}"
                )
            yield Fact(f"MODEL.SHARPMASK.{key}", width, f"{name} {width}")

    stated_keys = [f"MODEL.DEEPMASK.{key}" for x, key in _TRAINED.items() if _whole(trained.get(x))]
    untold = tuple(key for key in _UNTOLD if key not in stated_keys)
    return Layout(_CONFIGS[model.class_name], lambda cfg: list(facts(cfg)), untold)


def _outputs(layer: dict[str, Array], key: str) -> Iterator[Fact]:
    if "weight" in layer:
        count = len(layer["weight"])
        yield Fact(key, count, f"{count} outputs of a layer")


def _whole(value: Any) -> int | None:
    """The whole number above 0 that Lua stores as a double; None for anything else."""
    usable = isinstance(value, int | float) and 0 < value < 2**31 and value == int(value)
    return int(value) if usable else None


def _trunk() -> list[str]:
    """Our layers in the order of the authors'."""
    layers = ["backbone.conv1", "backbone.bn1"]
    for stage, count in enumerate(_BLOCKS, start=1):
        for block in range(count):
            prefix = f"backbone.layer{stage}.{block}"
            for i in (1, 2, 3):
                layers += [f"{prefix}.conv{i}", f"{prefix}.bn{i}"]
            if block == 0:
                layers += [f"{prefix}.downsample.0", f"{prefix}.downsample.1"]
    return [*layers, "embedding.reduce", "embedding.project"]


def _put_refinement(conversion: Conversion, names: dict[int, str], fields: dict[Any, Any]) -> None:
    """SharpMask's own layers; ``refs[k]`` holds ``neths[k]`` and ``netvs[k]`` as well."""
    refs = _table(fields.get("refs"))
    _put(conversion, names, refs.get(0), ("refinement.start",))
    for stage in _STAGES:
        layers = [f"refinement.horizontal.{stage - 1}.{i}" for i in (0, 2, 4)]
        layers += [f"refinement.vertical.{stage - 1}.{i}" for i in (0, 2)]
        if stage == _STAGES[-1]:
            layers.append("refinement.output")
        _put(conversion, names, refs.get(stage), layers)


def _put(conversion: Conversion, names: dict[int, str], module: Any, layers: Sequence[str]) -> None:
    """Take the layers of ``module``, in their order, as ours."""
    # Layers that only one side has are reported as unknown or missing.
    for tensors, name in zip(_layers(module, set()), layers, strict=False):
        if {"a", "b"} <= tensors.keys():
            # A frozen normalisation a x + b becomes one with a running variance of 1.
            ones = np.ones(tensors["a"].size)
            values = {
                "weight": (tensors["a"], "a"),
                "bias": (tensors["b"], "b"),
                "running_mean": (0 * ones, ""),
                "running_var": ((1 - _EPS) * ones, ""),
            }
        else:
            values = {key: (tensor, key) for key, tensor in tensors.items()}
        for key, (value, origin) in values.items():
            target = f"{name}.{key}"
            if target in conversion.expected:
                sources = [names[id(tensors[origin])]] if origin else []
                conversion.put(target, _shaped(value, conversion.expected[target]), *sources)


def _shaped(value: Array, expected: Sequence[int]) -> Tensor:
    """A linear layer's numbers, with two more axes where we have a convolution."""
    tensor = torch.from_numpy(np.array(value)).float()
    same_layout = tensor.numel() == np.prod(expected) and tensor.shape[:1] == tuple(expected[:1])
    return tensor.reshape(*expected) if same_layout else tensor


def _layers(module: Any, visited_ids: set[int]) -> Iterator[dict[str, Array]]:
    """{"weight", "bias"} or {"a", "b"} of the layers of a module, in the order they are applied."""
    if not isinstance(module, Torch7Object) or id(module) in visited_ids:
        return
    visited_ids.add(id(module))
    parameters = {key: module.fields.get(key) for key in _PARAMETERS}
    tensors = {key: x for key, x in parameters.items() if isinstance(x, np.ndarray) and x.size}
    if tensors:
        yield tensors
    children = _table(module.fields.get("modules"))
    for index in sorted(key for key in children if isinstance(key, int)):
        yield from _layers(children[index], visited_ids)


def _tensors(value: Any, name: str, visited_ids: set[int]) -> Iterator[tuple[str, Array]]:
    """Every parameter of the network once, with its path."""
    if id(value) in visited_ids:
        return
    visited_ids.add(id(value))
    content = value.fields if isinstance(value, Torch7Object) else value
    if not isinstance(content, dict):
        return
    for key, item in content.items():
        path = f"{name}.{key}".lstrip(".")
        if isinstance(item, np.ndarray):
            if key in _PARAMETERS and item.size and id(item) not in visited_ids:
                visited_ids.add(id(item))
                yield path, item
        else:
            yield from _tensors(item, path, visited_ids)


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
