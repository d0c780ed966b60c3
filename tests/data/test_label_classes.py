"""Lists of the classes of labels."""

import os
from pathlib import Path

import pytest

from instseg.data.findings import Kind
from instseg.data.readers import label_classes
from instseg.errors import DatasetError
from tests.data.test_labels import check, read, write_set

HEADER = "file,label,class\n"


def test_classes_come_from_a_csv_file_in_alphabetical_order(tmp_path: Path) -> None:
    rows = "a,2,x\na,7,early\na.png,300,x\n" + "b.tif,2,late\nb,7,x\nb,300,early\nother,1,x\n\n"
    dataset = read(write_set(tmp_path, classes=HEADER + rows))
    assert dataset.classes == ("early", "late", "x")
    numbers = [[entry["category_id"] for entry in r["annotations"]] for r in dataset.records]
    assert numbers == [[2, 0, 2], [1, 2, 0]]
    assert [dataset.category_id(number) for number in range(3)] == [1, 2, 3]


def test_a_list_of_classes_may_name_label_images_as_predict_writes_them(tmp_path: Path) -> None:
    rows = "a_labels.tif,2,x\na_labels,7,y\na,300,y\n"
    name = write_set(tmp_path, stems="a", classes=HEADER + rows)
    os.rename(tmp_path / "labels/a.tif", tmp_path / "labels/a_labels.tif")
    (record,) = read(name).records
    assert [entry["category_id"] for entry in record["annotations"]] == [0, 1, 1]


def test_a_csv_file_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    name = write_set(tmp_path, stems="a", classes="-")
    rows = "Label;comment;CLASS;File\r\n2;;x;a\r\n7;y;z;a\r\n300;;z;a\r\n"
    (tmp_path / "classes.csv").write_bytes(rows.encode("utf-8-sig"))
    assert read(name).classes == ("x", "z")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("a,2,x\n", r"its first line is 'a,2,x'; expected file,label,class"),
        ("", "its first line is ''; expected file,label,class"),
        (HEADER, "it has no rows below its header"),
        (HEADER + "a,2\n", r"line 2 is \['a', '2'\]; expected the name of an image"),
        (HEADER + "a,0,x\n", "line 2 is .*its label from 1"),
        (HEADER + "a,2.5,x\n", "line 2 is .*its label from 1"),
        (HEADER + "a,2,x\na,2,y\n", "line 3 says that label 2 of a is 'y', an earlier line 'x'"),
        (HEADER + "a,2,\udcff\n", "the list of classes .*codec can't decode"),
    ],
)
def test_a_list_of_classes_that_cannot_be_read_is_one_line(
    tmp_path: Path, rows: str, reason: str
) -> None:
    name = write_set(tmp_path, classes="-")
    (tmp_path / "classes.csv").write_bytes(rows.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match=reason):
        read(name)
    assert list(check(name).report.ids) == [Kind.FORMAT]


def test_a_list_of_classes_too_large_to_be_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_set(tmp_path, classes="-")
    (tmp_path / "classes.csv").write_text(HEADER + "a,2,x\n")
    monkeypatch.setattr(label_classes, "_LARGEST", 20)
    with pytest.raises(DatasetError, match=r"classes\.csv.* it has more than 20 bytes"):
        read(name)


def test_a_missing_list_of_classes_is_named(tmp_path: Path) -> None:
    name = write_set(tmp_path)
    with pytest.raises(DatasetError, match=r"classes\.csv: No such file"):
        read(f"{name}:{tmp_path}/classes.csv")


def test_a_label_without_a_class_is_an_error(tmp_path: Path) -> None:
    name = write_set(tmp_path, stems="a", classes=HEADER + "a,2,x\na,300,x\n")
    with pytest.raises(DatasetError, match=r"label 7 of .*a\.tif has no class; add a row to"):
        read(name)
    assert check(name).report.ids == {Kind.UNKNOWN_CATEGORY: ["a:7"]}
