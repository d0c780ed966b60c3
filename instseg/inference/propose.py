"""Proposals of a model for a whole data set, for detectors that start from them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from instseg.config.classes import class_count
from instseg.data.dataset import check_name, load
from instseg.data.proposal_files import Array, write_proposals
from instseg.errors import ConfigError, DatasetError
from instseg.inference.predictor import Predictor, require_weights
from instseg.modeling.contract import architectures

_MARGIN = 1e-6
"""Distance of scores from 0 and 1 that keeps their logits finite."""


def propose(
    config_file: str,
    weights: str | None,
    dataset: str,
    output: str | os.PathLike[str],
    overrides: Sequence[Any] = (),
    *,
    allow_partial: bool = False,
) -> int:
    """Write the boxes that a model without classes proposes for every image of a data set.

    ``TEST.DETECTIONS_PER_IMAGE`` limits their number.

    Args:
        config_file, weights, overrides, allow_partial: see :class:`Predictor`.
        dataset: a registered name or ``coco:PATH``; needs no annotations.
        output: the file to write, NAME.pkl; see :mod:`instseg.data.proposal_files`.
    Returns:
        the number of images.
    Raises:
        ConfigError: a model that tells classes apart, or a name that does not end in ``.pkl``.
        DatasetError, CheckpointError, ImageError, OutputError: a file cannot be read or written.
    """
    if not os.fspath(output).endswith(".pkl"):
        raise ConfigError(f"{output}: the name of a proposal file must end in .pkl")
    predictor = Predictor(
        config_file,
        weights,
        overrides=[*overrides, "DATASETS.TEST", (dataset,)],
        allow_partial=allow_partial,
        masks="cropped",
    )
    if classes := class_count(predictor.cfg):
        known = architectures(lambda kind: getattr(kind, "num_classes_key", "") is None)
        raise ConfigError(
            f"{config_file} is a model with classes ({classes.key}); proposals come from one "
            f"without, such as {', '.join(known)}"
        )
    check_name(dataset)
    if not allow_partial:
        require_weights(predictor.cfg, None, "propose with (--allow-partial takes random ones)")
    records = load(dataset).records
    if not records:
        raise DatasetError(f"data set {dataset} has no images")
    write_proposals(output, _proposals(predictor, records))
    return len(records)


def _proposals(
    predictor: Predictor, records: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, Array, Array]]:
    results = predictor.stream(record["file_name"] for record in records)
    for record, result in zip(tqdm(records, unit="image", disable=None), results, strict=True):
        instances = result["instances"].to("cpu")
        scores = instances.scores.double().numpy().clip(_MARGIN, 1 - _MARGIN)
        logits = np.log(scores / (1 - scores)).astype(np.float32)
        yield record["image_id"], instances.pred_boxes.tensor.float().numpy(), logits
