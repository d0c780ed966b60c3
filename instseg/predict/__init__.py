"""The work of ``instseg predict``: pictures and videos in, overlays, masks and one JSON file out.

``predictions.json`` is a list with one object per instance, in the result format of COCO, so that
``pycocotools.coco.COCO.loadRes`` reads it::

    {"image_id": 1,
     "file_name": "a/cat.jpg",
     "frame": 0,
     "category_id": 17,
     "category_name": "cat",
     "bbox": [x, y, width, height],
     "score": 0.98,
     "segmentation": {"size": [height, width], "counts": "..."}}

``image_id`` counts pictures, and after them the frames of videos, from 1.  ``file_name`` is the
input as given, or FOLDER/NAME.  ``frame`` counts from 0 and is there for videos and cameras only.
``category_id`` is the id in the data set ``DATASETS.TEST[0]`` where Detectron2 knows its ids, else
the class counted from 0; ``category_name`` is that number as text where no names are known.
Coordinates are pixels of the upright picture.  ``segmentation`` is compressed RLE, left out for
models without masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from instseg.config import load_cfg
from instseg.engine.predictor import Predictor
from instseg.errors import ConfigError
from instseg.predict.pictures import predict_pictures
from instseg.predict.results import Results, json_list
from instseg.predict.sources import find_sources, prepare_output
from instseg.predict.videos import predict_video


@dataclass(frozen=True)
class PredictOptions:
    """What ``instseg predict`` is asked to do; the fields are its command-line arguments."""

    config_file: str
    inputs: Sequence[str]
    output: Path
    weights: str | None = None
    confidence: float = 0.5
    overlay: bool = True
    instance_masks: bool = False
    allow_partial: bool = False
    overrides: Sequence[str] = ()


def predict(options: PredictOptions) -> int:
    """Predict on everything in ``options.inputs`` and write the results as they come.

    A picture or video that cannot be used is one line on stderr, and the rest is done.

    Returns:
        0, or 1 if some input could not be used.
    Raises:
        ConfigError, CheckpointError, OutputError: nothing can be done; found before the model is
            built where it can be.
    """
    if not 0 <= options.confidence <= 1:
        raise ConfigError(f"--confidence is {options.confidence}; expected a number from 0 to 1")
    sources = find_sources(options.inputs)
    prepare_output(options.output, sources)
    cfg = load_cfg(options.config_file, options.overrides)
    if not (options.weights or cfg.MODEL.WEIGHTS):
        raise ConfigError("no weights to predict with; pass --weights FILE or MODEL.WEIGHTS FILE")
    predictor = Predictor(
        cfg, options.weights, overrides=options.overrides, allow_partial=options.allow_partial
    )
    results = Results(
        predictor,
        options.output,
        options.confidence,
        overlay=options.overlay,
        instance_masks=options.instance_masks,
    )
    image_ids = count(1)
    with json_list(options.output / "predictions.json") as add_records:
        pictures = [source for source in sources if source.kind == "picture"]
        predict_pictures(results, pictures, add_records, image_ids)
        for source in sources:
            if source.kind != "picture":
                predict_video(results, source, add_records, image_ids)
    return 1 if results.failures else 0
