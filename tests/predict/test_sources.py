"""Inputs of ``instseg predict``: folders, sequences, addresses."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.data.sequences import ImageSequence, is_pattern, natural_order, numbered_files
from instseg.errors import ConfigError, ImageError
from instseg.predict.sources import find_sources, prepare_output


def write_images(folder: Path, *names: str) -> Path:
    """Images of 8 x 6 pixels, each darker than the next one."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / name)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = write_images(tmp_path / "in", "x.png", "a/x.png", "a/b/x.png", "c/y.png", ".h/x.png")
    (tree / "a" / "loop").symlink_to(tree, target_is_directory=True)
    (tree / "a" / "notes.txt").touch()
    (tree / "empty").mkdir()
    return tree


def test_folders_inside_a_folder_are_passed_over_and_that_is_said(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert [source.name for source in find_sources([str(tree)])] == [str(tree / "x.png")]
    message = f"{tree}: 3 folders in it passed over; --recursive searches them"
    assert caplog.messages == [message]


def test_folders_inside_a_folder_are_searched_on_request_but_not_links(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sources = find_sources([str(tree)], recursive=True)
    names = ["x.png", "a/x.png", "a/b/x.png", "c/y.png"]
    assert [source.name for source in sources] == [str(tree / name) for name in names]
    assert [source.stem for source in sources] == ["x", "x_2", "x_3", "y"]
    assert caplog.messages == [
        f"{tree}: 1 other files passed over",
        f"{tree}: 1 links to folders in it passed over",
    ]


def test_a_folder_with_images_in_folders_only_says_how_to_search_them(tree: Path) -> None:
    (tree / "x.png").unlink()
    with pytest.raises(ConfigError, match="none of the 0 files .*; it holds 3 folders"):
        find_sources([str(tree)])


def test_the_folder_of_results_is_not_searched(tree: Path) -> None:
    sources = find_sources([str(tree)], recursive=True, output=tree / "a")
    assert [Path(source.name).name for source in sources] == ["x.png", "y.png"]
    prepare_output(tree / "a", sources)


def test_a_folder_that_cannot_be_read_is_told_and_the_others_are_searched(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    iterdir = Path.iterdir

    def refused(self: Path) -> object:
        if self.name == "a":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert len(find_sources([str(tree)], recursive=True)) == 2
    assert f"{tree / 'a'} cannot be read: Permission denied; passed over" in caplog.messages


def test_the_images_of_a_folder_are_one_sequence_in_natural_order(tmp_path: Path) -> None:
    names = ["f_10.png", "f_9.png", "f_1.png", "F_2.png"]
    folder = write_images(tmp_path / "walk", *names)
    (folder / "v.mp4").touch()
    sequence, video = find_sources([str(folder)], sequences=True)
    assert (sequence.kind, sequence.stem, video.kind) == ("sequence", "walk", "video")
    file_names = [Path(file).name for file in sequence.files]
    assert file_names == ["f_1.png", "F_2.png", "f_9.png", "f_10.png"]


def test_each_folder_of_a_tree_is_a_sequence_of_its_own(tree: Path) -> None:
    sources = find_sources([str(tree)], sequences=True, recursive=True)
    assert [source.stem for source in sources] == ["in", "a", "b", "c"]
    assert {source.kind for source in sources} == {"sequence"}


def test_natural_order_is_total() -> None:
    names = ["1", "01", "a", "a1", "a01b", "", "1a", "²", "a²", "A1"]
    assert len(sorted(names, key=natural_order)) == len(names)


def test_a_pattern_is_the_files_with_a_number_in_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = ["f_00003.png", "f_00001.png", "f_100000.png", "f_2.png", "f_000009.png", "f_0000x.png"]
    write_images(tmp_path, *names, "f_00002.jpg")
    (tmp_path / "f_00007.png").mkdir()
    pattern = str(tmp_path / "f_%05d.png")
    file_names = [Path(file).name for file in numbered_files(pattern)]
    assert file_names == ["f_00001.png", "f_00003.png", "f_100000.png"]
    assert "99997 of the numbers 1 to 100000 have no file" in caplog.text
    [source] = find_sources([pattern])
    assert (source.kind, source.stem, len(source.files)) == ("sequence", "f", 3)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("%d.png", ["0.png", "2.png", "10.png"]),
        ("%03d.png", ["002.png", "010.png"]),
        ("%3d.png", ["002.png", "010.png"]),
        ("a(%d.png", ["a(1.png"]),
    ],
)
def test_numbers_have_the_width_that_a_pattern_says(
    tmp_path: Path, pattern: str, names: list[str]
) -> None:
    write_images(tmp_path, "0.png", "2.png", "10.png", "002.png", "010.png", "a(1.png")
    assert [Path(file).name for file in numbered_files(tmp_path / pattern)] == names


@pytest.mark.parametrize("name", ["a.png", "9%.png", "%s.png", "%d_%d.png", "%%d.png", "%dx/a"])
def test_what_is_no_pattern_is_the_name_of_a_file(name: str) -> None:
    assert not is_pattern(name)


def test_a_file_with_the_name_of_a_pattern_is_that_file(tmp_path: Path) -> None:
    write_images(tmp_path, "f_%d.png", "f_1.png")
    [source] = find_sources([str(tmp_path / "f_%d.png")])
    assert source.kind == "image"


def test_a_pattern_of_no_file_is_nothing_to_predict_on(tmp_path: Path) -> None:
    pattern = str(tmp_path / "none" / "f_%d.png")
    with pytest.raises(ConfigError, match="nothing to predict on: .*f_%d.png does not exist"):
        find_sources([pattern])
    with pytest.raises(ImageError, match="f_%d.png: there are no files of such names"):
        ImageSequence(pattern, numbered_files(pattern))


def test_results_never_go_beside_the_images_of_a_sequence(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", "f_1.png")
    for sources in (
        find_sources([str(folder)], sequences=True),
        find_sources([str(folder / "f_%d.png")]),
    ):
        with pytest.raises(ConfigError, match="is the folder of the input"):
            prepare_output(folder, sources)


def test_frames_have_the_names_of_their_files_and_the_time_of_their_place(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "1.png", "2.png", "3.png")
    frames = list(ImageSequence("f", numbered_files(folder / "%d.png"), fps=4))
    assert [(frame.file, frame.time) for frame in frames] == [
        ("1.png", 0),
        ("2.png", 0.25),
        ("3.png", 0.5),
    ]
    assert [int(frame.image[0, 0, 2]) for frame in frames] == [0, 1, 2]


def test_images_that_cannot_be_used_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png", "4.png")
    (tmp_path / "2.png").write_text("<html>404</html>")
    Image.fromarray(np.full((6, 8), 9000, np.uint16)).save(tmp_path / "3.png")
    frames = []
    with pytest.raises(ImageError) as error:
        for frame in ImageSequence("f", numbered_files(tmp_path / "%d.png"), fps=1):
            frames.append((frame.file, frame.time))
    assert frames == [("1.png", 0), ("4.png", 3)]
    message = f"f: 2 of 4 images cannot be used, first {tmp_path / '2.png'}: is HTML or XML text"
    assert str(error.value).startswith(message)


def test_a_stream_is_known_by_its_address_without_the_password() -> None:
    [source] = find_sources(["rtsp://user:secret@camera:554/live/main.sdp?key=secret"])
    assert (source.kind, source.stem) == ("stream", "main")
    assert source.name == "rtsp://camera:554/live/main.sdp"
    assert source.url.startswith("rtsp://user:secret@")
    assert "secret" not in repr(source)


@pytest.mark.parametrize("url", ["http://host", "http://host/", "http://../..", "http://h/ .mp4"])
def test_the_files_of_a_stream_have_a_name(url: str, tmp_path: Path) -> None:
    [source] = find_sources([url])
    assert (tmp_path / f"{source.stem}.json").parent == tmp_path
    assert source.stem not in ("", ".", "..") and os.sep not in source.stem
