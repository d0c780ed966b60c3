"""Training on label images is training on the same instances in COCO's format, to the digit."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import instseg
from instseg.data.build import register_dataset
from instseg.data.dataset import DataSet, load
from instseg.masks import as_text
from instseg.training.trainer import Trainer
from tests.conftest import ROOT, load_module

write_labels = load_module(ROOT / "tools/label_images.py").write
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 3),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 1, "INPUT.CROP.SIZE", [96, 96]),
    *("INPUT.MIN_SIZE_TRAIN", (96,), "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
]


def read(name: str) -> DataSet:
    register_dataset(name)
    return load(name)


def essence(dataset: DataSet) -> list[Any]:
    """What a model sees of the records: everything but names and ids."""
    kept = ("bbox", "bbox_mode", "category_id", "iscrowd")
    return [
        (
            (record["height"], record["width"]),
            [
                ([annotation[key] for key in kept], text_of(annotation["segmentation"]))
                for annotation in record["annotations"]
            ],
        )
        for record in dataset.records
    ]


def text_of(rle: dict[str, Any]) -> dict[str, Any]:
    return rle if isinstance(rle["counts"], str) else as_text(rle)


def trained(config: str, name: str, output: Path) -> dict[str, torch.Tensor]:
    """Weights after three iterations."""
    words: Sequence[Any] = [*SMALL, "DATASETS.TRAIN", (name,), "DATASETS.TEST", ()]
    cfg = instseg.load_cfg(config, [*words, "OUTPUT_DIR", str(output)])
    output.mkdir()
    torch.manual_seed(1)
    np.random.seed(1)
    trainer = Trainer(cfg)
    trainer.train()
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def nuclei(data_root: Path, folder: Path, count: int) -> str:
    """The name of a data set of the first images of the nuclei."""
    content = json.loads((data_root / "nuclei/instances_val.json").read_text())
    images = sorted(content["images"], key=lambda image: image["id"])[:count]
    ids = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (folder / "some.json").write_text(json.dumps(content))
    return f"coco:{folder}/some.json:{data_root}/nuclei/images"


def test_records_of_the_nuclei_are_those_of_coco(data_root: Path, tmp_path: Path) -> None:
    coco = nuclei(data_root, tmp_path, 12)
    name = write_labels(coco, tmp_path)
    expected, labels = read(coco), read(name)
    assert labels.classes == expected.classes
    assert len(labels.records) == len(expected.records) == 12
    assert essence(labels) == essence(expected)
    from_coco, from_labels = expected.coco, labels.coco
    assert [(a["area"], a["bbox"]) for a in from_coco.anns.values()] == [
        (a["area"], a["bbox"]) for a in from_labels.anns.values()
    ]


def test_three_iterations_give_the_weights_of_a_training_in_cocos_format(
    data_root: Path, tmp_path: Path
) -> None:
    coco = nuclei(data_root, tmp_path, 6)
    labels = write_labels(coco, tmp_path / "labels")
    config = "mask_rcnn/mask_rcnn_nuclei.yaml"
    first = trained(config, coco, tmp_path / "a")
    second = trained(config, labels, tmp_path / "b")
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
    # The comparison can fail: without one image the weights differ.
    shutil.move(tmp_path / "labels/labels/000000.png", tmp_path)
    other = trained(config, labels, tmp_path / "c")
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
