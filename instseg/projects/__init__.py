"""The registration module: finds the projects, and is the only place where instseg imports them.

A project is one paper: a package with an object ``PROJECT`` (:class:`Project`) that says what the
rest has to know of it.  Its import registers its classes.  A project is either a folder of
``projects/``, installed as ``instseg.projects.<name>``, or an installed package that names its
``PROJECT`` in an entry point of the group ``instseg.projects``::

    [project.entry-points."instseg.projects"]
    my_paper = "my_package:PROJECT"
"""

import functools
import logging
import pkgutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

if not any(package.ispkg for package in pkgutil.iter_modules(__path__)):
    # A checkout keeps projects/ beside instseg/, also what was added after its installation.
    __path__.append(str(Path(__file__).parents[2] / "projects"))


@dataclass(frozen=True)
class Project:
    """What a paper declares about itself.

    Configurations are named by path or by their name inside ``configs/``; overrides are
    ``(KEY, VALUE, ...)``.

    Attributes:
        name: of its folder, or of its entry point.
        title, paper, family, best_at, ap, milliseconds, weights: cells of its row in the README's
            table; ``ap`` is what a short training with ``example`` gave.
        order: place in that table, from 1; those without one come last.
        add_config: adds its keys to a configuration.
        ancestors: names of the projects that it builds on and may import.
        example: a configuration that trains on synthetic data in minutes on a CPU.
        reference: the paper's own configuration.
        any_score: overrides by which no instance is dropped for its score.
        fast: overrides by which any of its configurations searches a small image quickly.
        authors: checks that the authors' code in a checkout has the network of a configuration, and
            gives a function that gets it ready, with random weights, to predict on (H, W, 3) uint8
            images in BGR order; that function has a process of its own.
        narrow: overrides that make ``example`` as small as tests want it, and have its network find
            something with random weights.
    """

    name: str
    title: str
    paper: str
    family: str
    best_at: str
    example: str
    reference: str
    ap: str = ""
    milliseconds: str = ""
    weights: str = "-"
    order: float = float("inf")
    add_config: "Callable[[CfgNode], None] | None" = None
    ancestors: tuple[str, ...] = ()
    any_score: tuple[Any, ...] = ()
    fast: tuple[Any, ...] = ()
    narrow: tuple[Any, ...] = ()
    authors: "Callable[[CfgNode, Path], Callable[[], Callable[[Any], Any]]] | None" = None

    @property
    def row(self) -> str:
        """Its line of the README's table of systems."""
        link = f"[{self.title}](projects/{self.name}/README.md)"
        cells = (link, self.paper, self.family, self.best_at, self.ap, self.milliseconds)
        return f"| {' | '.join((*cells, self.weights))} |".replace("|  |", "| |")


def folders() -> list[str]:
    """Names of the folders of ``projects/``; imports none."""
    return sorted(package.name for package in pkgutil.iter_modules(__path__) if package.ispkg)


@functools.cache
def projects() -> tuple[Project, ...]:
    """Every project, in the order of the README's table; their classes are registered.

    A project of somebody else that cannot be used is left out with a warning that names the
    distribution.
    """
    usable: list[Project] = []
    for entry in _entries():
        project = _installed(entry) if entry.dist is not None else entry.load()
        if project is not None and project.name in [known.name for known in usable]:
            _leave_out(entry, f"there is another project {project.name}")
        elif project is not None:
            usable.append(project)
    return tuple(sorted(usable, key=lambda project: (project.order, project.name)))


def add_project_configs(cfg: "CfgNode") -> None:
    """Import every project, which registers its classes, and add the keys it defines to ``cfg``."""
    for project in projects():
        if project.add_config is not None:
            project.add_config(cfg)


def converters() -> dict[str, str]:
    """Authors' formats of weights, in alphabetical order, and the modules that convert them.

    A project declares a format by a module: ``convert_<format>``, or ``convert`` for the format
    that has the name of the project.  No project is imported: a command's help names the formats.
    """
    packages: dict[str, str] = {}
    for entry in _entries():
        try:
            packages.setdefault(entry.name, entry.module)
        except AttributeError:  # malformed: projects() tells, where it is used
            continue
    modules: dict[str, str] = {}
    for project, package in packages.items():
        try:
            spec = find_spec(package)
        except Exception:  # of a parent package: projects() tells
            continue
        for module in pkgutil.iter_modules(spec and spec.submodule_search_locations or []):
            first, _, format_name = module.name.partition("_")
            if first == "convert":
                modules[format_name or project] = f"{package}.{module.name}"
    return dict(sorted(modules.items()))


def _entries() -> list[EntryPoint]:
    """Entry points of all projects; those of the folders come first and have no distribution."""
    ours = [EntryPoint(name, f"{__name__}.{name}:PROJECT", __name__) for name in folders()]
    return [*ours, *entry_points(group=__name__)]


def _installed(entry: EntryPoint) -> Project | None:
    """The project that an entry point names; None if there is none that can be used."""
    try:
        project = entry.load()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _leave_out(
            entry, f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        )
        logger.debug("its traceback", exc_info=error)
        return None
    if not isinstance(project, Project):
        _leave_out(entry, f"{entry.value} is no instseg.projects.Project")
        return None
    return project


def _leave_out(entry: EntryPoint, reason: str) -> None:
    distribution = entry.dist.name if entry.dist is not None else "unknown"
    logger.warning(
        "project %s of the distribution %s is left out: %s", entry.name, distribution, reason
    )
