"""``instseg benchmark models --authors``: the authors' code as a peer, run without editing it."""

from pathlib import Path

import cv2
import pytest

from instseg.benchmark import benchmark_models, models
from instseg.benchmark.authors import authors_milliseconds
from instseg.benchmark.rows import Row
from instseg.cli import main
from instseg.errors import ConfigError
from tests.support.yolact_tiny import CONFIGS, PHOTO, TINY

CONFIG = "yolact/yolact_resnet50.yaml"
FILES = {
    "data/__init__.py": "",
    "data/config.py": """
from types import SimpleNamespace
cfg = SimpleNamespace(name="", mask_proto_debug=None)
def set_cfg(name):
    cfg.name = name
""",
    "utils/__init__.py": "",
    "utils/augmentations.py": """
import torch
class FastBaseTransform(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(3).cuda()
    def forward(self, images):
        return images.permute(0, 3, 1, 2) - self.mean[:, None, None]
""",
    "layers/__init__.py": "",
    "layers/output_utils.py": """
def postprocess(outputs, width, height):
    assert (width, height) == (64, 48), (width, height)
    return outputs
""",
    "yolact.py": """
import torch
from types import SimpleNamespace
from data.config import cfg
torch.cuda.current_device()
class Yolact(torch.nn.Module):
    def __init__(self):
        super().__init__()
        assert (cfg.name, cfg.mask_proto_debug) == ("yolact_resnet50_config", False)
        self.detect = SimpleNamespace(conf_thresh=0.5, use_fast_nms=False)
    def train(self, mode=True):
        super().train(mode)
    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        assert self.detect.use_fast_nms and self.detect.conf_thresh == 0
        assert images.shape == (1, 3, 48, 64) and images.dtype == torch.float32
        return images
""",
}
"""The parts of the authors' code that are called; like theirs, they want a GPU."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    return tmp_path / "code"


def test_the_authors_code_runs_on_the_cpu_in_a_process_of_its_own(checkout: Path) -> None:
    cfg = models._with_work(models.load_cfg(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    cpu, wall = authors_milliseconds(f"yolact={checkout}", cfg, [PHOTO], 2)
    assert cpu > 0 and wall > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.SQUARE_SIZE", 72, "the authors have no such network; choose yolact/"),
        ("MODEL.WEIGHTS", "a.pth", r"MODEL\.WEIGHTS is a\.pth; set MODEL\.WEIGHTS ''"),
        ("MODEL.DEVICE", "cuda", r"MODEL\.DEVICE is cuda; set MODEL\.DEVICE cpu"),
    ],
)
def test_a_configuration_without_such_a_peer_is_refused_before_anything_is_measured(
    key: str, value: object, message: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two configurations."""
    words = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    cfgs = [models.load_cfg(CONFIG, words) for _ in range(2)]
    cfgs[1].merge_from_list([key, value])
    monkeypatch.setattr(models, "load_cfg", lambda name, _: cfgs[int(name)])
    for measure in ("peak_row", "authors_milliseconds", "_benchmark_model"):
        monkeypatch.setattr(models, measure, lambda *_: pytest.fail("measured before the check"))
    with pytest.raises(ConfigError, match=message):
        benchmark_models(["0", "1"], peak=True, authors=f"yolact={checkout}")


def test_every_variant_has_a_row_against_the_authors_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_peak_memory", lambda *_: None)
    monkeypatch.setattr(models, "check_authors", lambda *_: None)
    monkeypatch.setattr(models, "authors_milliseconds", lambda *_: (30.0, 20.0))
    cv2.imwrite(str(tmp_path / "photo.png"), PHOTO)
    photos = [str(tmp_path / "photo.png")]
    rows: list[Row] = benchmark_models([CONFIGS["yolact"]], photos, TINY, 1, authors="yolact=code")
    stock, theirs = rows
    assert (stock.name, theirs.name) == ("yolact_shapes", "yolact_shapes")
    assert theirs.peer == "the authors' code" and theirs.peer_ms == 20
    assert theirs.ours_ms == stock.ours_ms and theirs.ratio_time == 20 / stock.ours_ms
    assert theirs.cpu_ms and theirs.ratio_cpu == 30 / theirs.cpu_ms


@pytest.mark.parametrize("option", ["yolact", "yolact=nowhere", "sgn=.", "=."])
def test_an_option_that_names_no_code_is_one_line(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "models", "--config-file", CONFIG, "--authors", option]) == 2
    assert f"--authors is {option}; expected NAME=FOLDER" in capsys.readouterr().err


def test_a_folder_of_other_code_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-file", CONFIG, "--authors", f"yolact={tmp_path}"]
    assert (
        main(["benchmark", "models", *words, "--", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]) == 2
    )
    assert "is no checkout of the authors' code; type: git clone" in capsys.readouterr().err
