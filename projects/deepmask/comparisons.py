"""Compares running the network densely with running it patch by patch."""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from instseg.modeling import Comparison
from instseg.projects.deepmask.inference import FILL, pyramid, resize_padded

if TYPE_CHECKING:
    from instseg.projects.deepmask.deepmask import DeepMask

# The slow way is measured on _SAMPLES windows, _BATCH of them in a forward pass.
_SAMPLES = 64
_BATCH = 16


def dense_against_patches(model: "DeepMask", image: Tensor) -> Comparison:
    """Vectors and scores of all windows of an image, or of patches cut out one by one.

    The second way is measured on windows spread evenly over all scales, and extrapolated.

    Args:
        model: in evaluation mode.
        image: (3, h, w).
    """
    height, width = image.shape[-2:]
    scales = pyramid(height, width, model.octaves, model.max_size)
    windows = [
        (scale, row, column)
        for scale in scales
        for row in range(_windows(scale.height, model))
        for column in range(_windows(scale.width, model))
    ]
    margin, side = model.patch_size // 2 + model.context, model.patch_size + 2 * model.context
    # Resizing beforehand favours the patches.
    levels = {scale: resize_padded(image, scale, margin, model.stride)[0] for scale in scales}
    levels = {s: F.pad(x, (0, side, 0, side), value=FILL) for s, x in levels.items()}
    chosen = windows[:: max(len(windows) // _SAMPLES, 1)][:_SAMPLES]

    def dense() -> None:
        for scale in scales:
            model.search(image, scale)

    def one_by_one() -> None:
        for start in range(0, len(chosen), _BATCH):
            patches = []
            for scale, *cell in chosen[start : start + _BATCH]:
                top, left = (model.stride * index for index in cell)
                patch = levels[scale][:, top : top + side, left : left + side]
                patches.append({"image": patch})
            maps = model.patch_features(patches)
            features = maps[model.in_feature]
            model.score_head(features, model.embedding(features))

    return Comparison(
        name=f"{len(windows)} windows",
        peer=f"patch by patch, from {len(chosen)} of them",
        ours=dense,
        theirs=one_by_one,
        share=len(chosen) / len(windows),
    )


def _windows(length: int, model: "DeepMask") -> int:
    """Windows along a side of an image; see :mod:`instseg.projects.deepmask.inference`."""
    padded = -(-(length + 2 * (model.patch_size // 2)) // model.stride)
    return padded - model.patch_size // model.stride + 1
