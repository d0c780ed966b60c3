"""Files of a data set that cannot be read are reported before the first iteration."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from instseg.data import build, presence
from instseg.errors import DatasetError
from instseg.training.trainer import Trainer
from tests.data.test_check_data import config
from tests.support.coco_data import content, write_set


def _link_to(target: str) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), file.symlink_to(target))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (Path.unlink, "no such file"),
        (_link_to("nowhere.png"), "is a link to a file that is not there"),
        (_link_to("2.png"), "symbolic links"),
        (_link_to("."), "is a folder"),
        (lambda file: (file.unlink(), file.mkdir()), "is a folder"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is no regular file"),
        (lambda file: file.write_bytes(b""), r"the file is empty \(0 bytes\)"),
    ],
)
def test_what_is_no_file_to_read_is_found_before_training(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    name = write_set(tmp_path, content())
    cfg = config(name, name)
    spoil(tmp_path / "images/2.png")
    with pytest.raises(DatasetError, match=rf"1 of 2 .* first .*2\.png \(.*{reason}.*\)$"):
        Trainer.build_train_loader(cfg)
    with pytest.raises(DatasetError, match=rf"1 of 3 .* first .*2\.png \(.*{reason}.*\)$"):
        Trainer.build_test_loader(cfg, name)


def test_a_link_to_a_file_is_one(tmp_path: Path) -> None:
    name = write_set(tmp_path, content())
    (tmp_path / "images/2.png").rename(tmp_path / "moved.png")
    (tmp_path / "images/2.png").symlink_to(tmp_path / "moved.png")
    Trainer.build_train_loader(config(name))


def test_a_file_that_may_not_be_read_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_set(tmp_path, content())
    allowed = os.access
    monkeypatch.setattr(  # whoever is root may read everything
        presence.os, "access", lambda path, mode: "2.png" not in path and allowed(path, mode)
    )
    with pytest.raises(DatasetError, match=r"2\.png \(may not be read, for its permissions\)"):
        Trainer.build_train_loader(config(name))


def test_of_many_files_no_more_than_some_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing their folder tells what most of them are."""
    files = [tmp_path / f"{number}.png" for number in range(9)]
    for file in files:
        file.write_bytes(b"1")
    files[4].unlink()
    files[5].unlink()
    files[5].mkdir()
    asked = []
    problem = presence.file_problem
    monkeypatch.setattr(presence, "_MAX_CHECKED", 3)
    monkeypatch.setattr(
        presence, "file_problem", lambda file: asked.append(Path(file).stem) or problem(file)
    )
    unusable = dict(presence.unusable_files([*map(str, files), "shapes://shapes_val/32/0"]))
    assert unusable == {str(files[4]): "no such file", str(files[5]): "is a folder"}
    assert asked == ["0", "4", "5", "8"]


def test_earlier_frames_that_are_not_there_are_found_before_training(tmp_path: Path) -> None:
    """They may be of frames without an instance, which are no records of the training."""
    frame = {"file_name": "shapes://shapes_val/32/0"}
    references = [str(tmp_path / f"{number}.png") for number in (1, 2)]
    (tmp_path / "1.png").write_bytes(b"1")
    with pytest.raises(DatasetError, match=r"1 of 3 .* first .*2\.png \(no such file\)"):
        build.check_files("clips", [frame, frame | {"reference_files": references}])
    with pytest.raises(DatasetError, match=r"1 of 2 .* first .*2\.png \(no such file\)"):
        build.check_files("clips", [frame | {"flow_files": references[1:]}])


def test_images_named_without_a_folder_are_looked_for_where_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"1")
    assert dict(presence.unusable_files(["a.png", "./a.png", "b.png"])) == {"b.png": "no such file"}
