"""Exported files, which take half a minute to trace: made once for all tests."""

import functools
from collections.abc import Callable

import pytest

from tests.support.exported import Case, VideoCase


@pytest.fixture(scope="session")
def exported_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Gives the case of "yolact" or "yolact_plus"."""
    return functools.cache(lambda paper: Case(paper, tmp_path_factory.mktemp(paper)))


@pytest.fixture(scope="session")
def exported_video(tmp_path_factory: pytest.TempPathFactory) -> VideoCase:
    return VideoCase(tmp_path_factory.mktemp("video"))
