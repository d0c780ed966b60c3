"""``MODEL.DTYPE_TEST auto``: the number type in which a network is fastest, if it is equal enough.

The choice depends on the processor, the network and its weights alone, so that it is the same in
every run: bfloat16 where the device has instructions for it and the network's outputs on a fixed
image are those in float32 but for 5 %, else float32.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from instseg.data.intensity import CHANNELS
from instseg.data.synthetic import shapes
from instseg.inference.precision import AUTO, BFLOAT16, FLOAT32, has_bfloat16, precision
from instseg.modeling import SplitModel

logger = logging.getLogger(__name__)

_SIDE = 256
_LARGEST_DIFFERENCE = 0.05
"""Of any output in bfloat16, by its norm; networks whose AP stays within 0.3 differ by 1 %."""


def chosen_dtype(cfg: CfgNode, model: nn.Module) -> str:
    """``MODEL.DTYPE_TEST``, in place of "auto" the number type that is chosen.

    Args:
        model: with its weights in float32.
    """
    if cfg.MODEL.DTYPE_TEST != AUTO:
        return str(cfg.MODEL.DTYPE_TEST)
    device = cfg.MODEL.DEVICE
    if not (has_bfloat16() if device == "cpu" else torch.cuda.is_bf16_supported(False)):
        return _said(FLOAT32, f"{device} has no instructions for bfloat16")
    pixels = shapes.image("shapes_hard_val", 0, _SIDE)[:, :, : CHANNELS[cfg.INPUT.FORMAT]]
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().to(device)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected = _outputs(model, image)
        with precision(BFLOAT16, device):
            outputs = _outputs(model, image)
    model.train(training)
    if not expected:
        return _said(FLOAT32, f"the network of {type(model).__name__} cannot be run by itself")
    pairs = zip(outputs, expected, strict=True)
    difference = max(float((x.float() - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs)
    dtype = BFLOAT16 if difference <= _LARGEST_DIFFERENCE else FLOAT32  # NaN is not <=
    return _said(dtype, f"its outputs in bfloat16 differ by {difference:.1%}")


def _said(dtype: str, reason: str) -> str:
    logger.info(f"MODEL.DTYPE_TEST auto is {dtype}: {reason}")
    return dtype


def _outputs(model: nn.Module, image: Tensor) -> Sequence[Tensor]:
    """What the network gives for an image; nothing where it is not known how to run it."""
    if isinstance(model, SplitModel):
        return model.raw(model.preprocess([{"image": image}]))
    if isinstance(model, GeneralizedRCNN):
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        return list(features.values())
    return []
