"""Fixtures of the tests of data sets."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.support.records import NAME


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Registers what a function makes of :func:`tests.support.records.plain`; returns the name."""

    def register(function: Callable[[], Any], classes: Any = ("cat", "dog")) -> str:
        DatasetCatalog.register(NAME, function)
        if classes is not None:
            MetadataCatalog.get(NAME).thing_classes = classes
        return NAME

    yield register
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)
