"""A configuration of an impossible model gives one line; a paper's defect its traceback."""

from typing import Any

import pytest
from detectron2.config import configurable, get_cfg
from detectron2.layers import get_norm
from torch import nn

from instseg.errors import ConfigError
from instseg.modeling.building import building


class Paper(nn.Module):
    """A paper of somebody else."""

    @configurable
    def __init__(self, *, norm: str, channels: Any) -> None:
        super().__init__()
        self.norm = get_norm(norm, 2 + channels)

    @classmethod
    def from_config(cls, cfg: Any, values: dict[str, Any]) -> dict[str, Any]:
        return values


def build(**values: Any) -> None:

    with building():
        Paper(get_cfg(), values)


def test_what_detectron2_or_torch_refuse_is_a_config_error() -> None:
    build(norm="BN", channels=2)
    with pytest.raises(ConfigError, match="cannot be built: 'Foo' .KeyError in get_norm of"):
        build(norm="Foo", channels=2)
    with pytest.raises(ConfigError, match="cannot be built: .*negative"):
        build(norm="BN", channels=-9)


def test_an_exception_in_a_papers_own_init_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        build(norm="BN", channels="2")
    assert caught.traceback[-1].frame.code.name == "__init__"


def test_an_init_that_does_not_take_what_from_config_gives_keeps_its_traceback() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        build(norm="BN", channels=2, depth=3)


def test_a_config_error_passes_unchanged() -> None:
    with pytest.raises(ConfigError, match=r"^MODEL\.X is 1; expected 2$"), building():
        raise ConfigError("MODEL.X is 1; expected 2")
