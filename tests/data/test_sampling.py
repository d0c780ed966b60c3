"""Images are drawn by groups of the same size or kind."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.utils import comm
from PIL import Image

import instseg
from instseg.data.build import register_datasets
from instseg.data.dataset import load_all
from instseg.data.loaders import build_train_loader
from instseg.data.sampling import build_sampler, group_of, repeat_factors
from instseg.errors import ConfigError

CONFIG = "mask_rcnn/mask_rcnn_nuclei.yaml"
GROUPED = ["DATALOADER.SAMPLER_TRAIN", "GroupedTrainingSampler"]
RECORDS: list[dict[str, Any]] = [
    *({"width": 256, "height": 256} for _ in range(16)),
    *({"width": 360, "height": 360} for _ in range(4)),
    {"width": 256, "height": 256, "group": "purple"},
]


def config(*words: Any) -> Any:
    return instseg.load_cfg(CONFIG, [*GROUPED, "DATALOADER.NUM_WORKERS", 0, *words])


def drawn(power: float, count: int = 6000, start: int = 0, step: int = 1) -> list[int]:
    np.random.seed(0)
    sampler = build_sampler(config("DATALOADER.GROUP_POWER", power), RECORDS)
    assert sampler is not None
    return list(itertools.islice(sampler, start, count, step))


def test_a_group_is_the_key_of_an_image_or_its_size() -> None:
    assert Counter(map(group_of, RECORDS)) == {"256 x 256": 16, "360 x 360": 4, "purple": 1}


@pytest.mark.parametrize(
    ("power", "expected"), [(1.0, (16, 4, 1)), (0.5, (4, 2, 1)), (0.0, (1, 1, 1))]
)
def test_groups_are_drawn_in_proportion_to_a_power_of_their_size(
    power: float, expected: tuple[int, ...]
) -> None:
    counts = Counter(group_of(RECORDS[index]) for index in drawn(power))
    shares = [counts[name] / 6000 for name in ("256 x 256", "360 x 360", "purple")]
    np.testing.assert_allclose(shares, np.array(expected) / sum(expected), atol=0.02)
    within = Counter(index for index in drawn(power) if index < 16)
    assert max(within.values()) < 1.3 * min(within.values())


def test_no_image_is_left_out_of_a_pass() -> None:
    assert set(drawn(0.0, 16 * 3)) == set(range(21))


def test_the_factor_of_the_largest_group_is_one() -> None:
    factors = repeat_factors(RECORDS, 0.5)
    assert factors[0] == 1 and factors[16] == 2 and factors[20] == 4


def test_the_seed_gives_the_order_and_processes_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = drawn(0.5, 40)
    assert alone == drawn(0.5, 40)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: np.random.randint(2**31))
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert drawn(0.5, 20) == alone[rank::2]


def test_a_loader_draws_by_the_groups_of_a_coco_file(tmp_path: Path) -> None:
    images, annotations = [], []
    for number in range(9):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
        image = {"id": number, "file_name": f"{number}.png", "width": 32, "height": 32}
        images.append(image | ({"group": "rare"} if number == 8 else {}))
        box = {"bbox": [4, 4, 20, 20], "area": 400, "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
        annotations.append(
            {"id": number + 1, "image_id": number, "category_id": 1, "iscrowd": 0, **box}
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path / 'a.json'}"
    cfg = config("DATALOADER.GROUP_POWER", 0.0, "DATASETS.TRAIN", (name,))
    register_datasets(cfg)
    np.random.seed(0)
    batches = itertools.islice(build_train_loader(cfg, load_all((name,))), 25)
    counts = Counter(Path(sample["file_name"]).stem for batch in batches for sample in batch)
    assert 35 < counts["8"] < 65


def test_other_samplers_stay_detectron2s_and_other_powers_are_refused() -> None:
    stock = instseg.load_cfg(CONFIG, ["DATALOADER.SAMPLER_TRAIN", "TrainingSampler"])
    assert build_sampler(stock, RECORDS) is None
    with pytest.raises(ConfigError, match="GROUP_POWER is 2.0; expected a number from 0 to 1"):
        config("DATALOADER.GROUP_POWER", 2.0)
    with pytest.raises(ConfigError, match="RepeatFactorTrainingSampler or GroupedTrainingSampler"):
        instseg.load_cfg(CONFIG, ["DATALOADER.SAMPLER_TRAIN", "Grouped"])
