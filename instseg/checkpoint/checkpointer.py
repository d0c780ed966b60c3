"""Detectron2's checkpointer, made safe against bad files, misfits, full disks and sudden ends."""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from instseg.categories import Categories, ClassCount
from instseg.checkpoint.fit import Fit, few
from instseg.checkpoint.parts import rename_part, split_options
from instseg.checkpoint.reading import peek_iteration, read_weights
from instseg.checkpoint.wrappers import plain_names
from instseg.downloads import require_hash
from instseg.errors import CheckpointError
from instseg.files import TEMPORARY, atomic_write

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
T = TypeVar("T")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safe against bad files, misfits, full disks and sudden ends.

    Files are the same as Detectron2's; each method says what it guarantees beyond Detectron2's.
    Under ``DistributedDataParallel``, or with ``reads_once``, the main worker reads and writes the
    files, and all workers get the same content or the same error; every worker has to call the
    loading methods.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        sha256: str = "",
        allow_partial: bool = False,
        inference: bool = False,
        classes: ClassCount | None = None,
        categories: Categories | None = None,
        largest_instance: int | None = None,
        weights: Callable[[], dict[str, Tensor]] | None = None,
        reads_once: bool = False,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the module whose weights are saved and loaded, also inside a DDP wrapper.
            save_dir: local folder of the checkpoints; "" saves nothing.
            save_to_disk: whether this process saves; by default the main worker.
            sha256: SHA-256 that a file given to :meth:`load` must have, "" for any.
            allow_partial: load files that initialise less than half of the model, or for inference
                less than all of it.
            inference: the model will not be trained: a file must have exactly the tensors that
                inference uses.
            classes: of the model, for messages.
            categories: of the model, saved beside the weights for prediction.
            largest_instance: see :func:`instseg.data.sizes.largest_instance`; saved beside the
                weights for the prediction of large images.
            weights: gives the weights to save in place of those that ``model`` has.
            reads_once: the main worker reads for all workers, also without
                ``DistributedDataParallel``.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``, saved by key.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logger
        self.sha256 = sha256
        self.allow_partial = allow_partial
        self.inference = inference
        self.classes = classes
        self.categories = categories
        self.largest_instance = largest_instance
        self.weights = weights
        reads_once = reads_once and comm.get_world_size() > 1
        self._distributed = reads_once or isinstance(model, DistributedDataParallel)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``, then name it the last checkpoint.

        Each of these two steps happens completely or not at all.

        Args:
            name: file name without extension.
            kwargs: further tensors and plain values to save; ``iteration`` orders the checkpoints.
        Raises:
            OutputError: disk full or the like; the previous checkpoint and its tag are untouched.
            TypeError: something among the data could not be loaded again.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        file = Path(self.save_dir, f"{name}.pth")
        if file.name != f"{name}.pth":
            raise ValueError(f"{name!r} is no file name")
        for pattern in (f".*.pth.*{TEMPORARY}", f".{_TAG}.*{TEMPORARY}"):
            for stale in Path(self.save_dir).glob(pattern):  # left by a killed process
                with suppress(OSError):
                    stale.unlink()
        weights = self.weights() if self.weights else self.model.state_dict()
        data: dict[str, Any] = {"model": _in_usual_order(weights)}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        if self.categories is not None:
            data["categories"] = self.categories.as_coco()
        if self.largest_instance is not None:
            data["largest_instance"] = self.largest_instance
        data |= kwargs
        logger.info("Saving checkpoint to %s", file)
        atomic_write(file, lambda stream: _save_loadable(data, stream))
        self.tag_last_checkpoint(file.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the last checkpoint in the file that resuming looks at, atomically."""
        text = last_filename_basename.encode()
        atomic_write(Path(self.save_dir, _TAG), lambda file: file.write(text))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights, and the other saved objects, from a file or URL.

        Args:
            path: see :func:`read_weights`; "" loads nothing.  It may end with
                ``?matching_heuristics=True``, for Detectron2 to match names by their suffixes; or
                with ``?part=backbone.bottom_up``, which loads this part of the file into the same
                part of the model; see :func:`instseg.checkpoint.parts.rename_part`.
            checkpointables: which of the other objects to load if the file has them, None for all.
        Returns:
            the other contents of the file, e.g. ``iteration`` or ``categories``.
        Raises:
            CheckpointError: the file cannot be read, or without ``allow_partial`` fits less than
                half of the model, or for inference less than all of it; or less than half of the
                named part fits, also with ``allow_partial``.  The model is as it was.
        """
        if not path:
            logger.info("No weights given: the model starts from scratch")
            return {}
        file, options = split_options(path)
        part = options.get("part", "")
        checkpoint = self._on_main(lambda: self._load_file(file, part))
        if options.get("matching_heuristics") == "True":
            checkpoint["matching_heuristics"] = True
        return self._apply(checkpoint, path, checkpointables, resuming=False, part=part)

    def _load_file(self, filename: str, part: str = "") -> dict[str, Any]:
        require_hash(filename, self.sha256)
        if not part:
            return self._read(filename, self.sha256)
        weights = read_weights(filename, self.sha256)["model"]
        return {"model": rename_part(weights, part, self.model.state_dict(), filename)}

    def _read(self, file: str, sha256: str = "") -> dict[str, Any]:
        """The content of a file, its weights named as in the model if possible."""
        checkpoint = read_weights(file, sha256)
        checkpoint["model"] = plain_names(checkpoint["model"], self.model.state_dict())
        return checkpoint

    def has_checkpoint(self) -> bool:
        """Whether ``save_dir`` has a readable checkpoint to resume from."""
        return next(self._candidates(), None) is not None

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from: the tagged one, or the newest readable one, or ""."""
        file = next(self._candidates(), "")
        self._warn_unless_tagged(file)
        return file

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last good checkpoint in ``save_dir``, or else :meth:`load` weights alone.

        Resuming loads everything, model, ``checkpointables`` and iteration, and requires all of it;
        ``sha256`` and ``allow_partial`` apply to ``path`` only.

        Raises:
            CheckpointError: as :meth:`load`; or the checkpoint to resume from belongs to another
                model or training.
        """
        file, checkpoint = self._on_main(self._read_last) if resume else ("", {})
        if file:
            return self._apply(checkpoint, file, None, resuming=True)
        return self.load(path, checkpointables=[])

    def _read_last(self) -> tuple[str, dict[str, Any]]:
        for file in self._candidates():
            try:
                checkpoint = self._read(file)
            except CheckpointError as error:
                logger.warning("Cannot resume from the last checkpoint: %s", error)
            else:
                self._warn_unless_tagged(file)
                return file, checkpoint
        return "", {}

    def _tagged(self) -> str:
        """The file name in the tag file, "" without one."""
        try:
            return Path(self.save_dir, _TAG).read_text(errors="replace").strip()
        except OSError:
            return ""

    def _candidates(self) -> Iterator[str]:
        """Checkpoints to resume from, best first: the tagged one, then the newest ones."""
        if not self.save_dir:
            return
        files = {file.name: file for file in Path(self.save_dir).glob("*.pth")}
        # Looked up among these files, so that a damaged tag names no other file.
        tagged = files.pop(self._tagged(), None)
        if tagged and peek_iteration(tagged) is not None:
            yield str(tagged)
        dated = []
        for file in files.values():
            iteration = peek_iteration(file)
            if iteration is not None and iteration >= 0:  # somebody put a file without one there
                dated.append((iteration, file.stat().st_mtime, str(file)))
        for _, _, name in sorted(dated, reverse=True):
            yield name

    def _warn_unless_tagged(self, file: str) -> None:
        if file and Path(file).name != self._tagged():
            logger.warning(
                "%s names no readable checkpoint (%r); the newest readable one is %s",
                Path(self.save_dir, _TAG),
                self._tagged(),
                file,
            )

    def _apply(
        self,
        checkpoint: dict[str, Any],
        path: str,
        names: list[str] | None,
        *,
        resuming: bool,
        part: str = "",
    ) -> dict[str, Any]:
        """Check that the content of a file fits, and only then load it."""
        fit = self._fit(checkpoint, path, inference=self.inference and not resuming)
        missing_keys = [key for key in self.checkpointables if key not in checkpoint]
        if resuming and (missing_keys or not fit.complete):
            text = f"; {fit.remedy}" if fit.reshaped else ""
            text += f"; saved state missing: {few(missing_keys)}" if missing_keys else ""
            raise CheckpointError(
                f"cannot resume from {path}: {fit}{text}; resume with the configuration that wrote "
                f"it, or start anew in another OUTPUT_DIR with it as MODEL.WEIGHTS"
            )
        self._judge(fit, path, part)
        self._compare_classes(checkpoint, path)
        self._load_model(checkpoint)
        for key in self.checkpointables if names is None else names:
            if key in checkpoint:
                try:
                    self.checkpointables[key].load_state_dict(checkpoint.pop(key))
                except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise CheckpointError(
                        f"the state of {key!r} in {path} does not fit this training: {error}"
                    ) from error
        return checkpoint

    def _judge(self, fit: Fit, path: str, part: str) -> None:
        """Refuse weights that do not fit well enough, and log what starts from scratch."""
        text = f"{path}: {fit}"
        refused = self.inference and not fit.complete and not self.allow_partial
        if fit.reshaped or refused:
            text += f"; {fit.remedy}"
        half = 2 * fit.initialised >= (len(fit.theirs) if part else fit.total)
        if refused:
            leaves_random = fit.missing or fit.reshaped
            effect = "leaves the rest random" if leaves_random else "ignores unknown tensors"
            raise CheckpointError(
                f"{text}; or go on with --allow-partial (in Python allow_partial=True), which "
                f"{effect}"
            )
        if not half and part:
            raise CheckpointError(
                f"{text}; less than half of {part!r} fits this model: change MODEL.WEIGHTS to a "
                f"part that both models have"
            )
        if not half and not self.allow_partial:
            raise CheckpointError(
                f"{text}; less than half of the model would be initialised, so these are probably "
                f"weights of another architecture: change MODEL.WEIGHTS, or go on with "
                f"--allow-partial"
            )
        if fit.reshaped:
            text += f"; {fit.from_scratch} start from scratch"
        elif fit.missing:
            state = "stay random" if self.inference else "start from scratch"
            text += f"; missing tensors {state}"
        if not half:
            text = f"MOST OF THE MODEL STAYS RANDOM (--allow-partial). {text}"
        logger.log(logging.INFO if fit.complete else logging.WARNING, "%s", text)

    def _compare_classes(self, checkpoint: dict[str, Any], path: str) -> None:
        """Warn if the weights were trained on other classes than ``self.categories``."""
        ours = self.categories
        if ours is None:
            return
        try:
            theirs = Categories.of_checkpoint(checkpoint)
        except ValueError as error:
            logger.warning("%s: %s; they are not used", path, error)
            return
        if theirs is not None and theirs.names != ours.names:
            their_names, our_names = few(theirs.names), few(ours.names)
            logger.warning(
                "%s was trained for classes %s, but these are %s", path, their_names, our_names
            )

    def _fit(self, checkpoint: dict[str, Any], path: str, *, inference: bool) -> Fit:
        """Compare the weights with the model; rename them first if the file asks for it."""
        weights = checkpoint["model"]
        by_suffix = bool(checkpoint.pop("matching_heuristics", False))
        if by_suffix and weights:
            caffe2 = checkpoint.get("__author__") == "Caffe2"
            try:
                weights = align_and_update_state_dicts(self.model.state_dict(), weights, caffe2)
            except (AssertionError, KeyError, ValueError) as error:
                raise CheckpointError(f"names in {path} cannot be matched: {error}") from error
            checkpoint["model"] = weights
        for name, ours in self.model.state_dict().items():
            theirs = weights.get(name)
            if theirs is not None and ours.is_floating_point() > theirs.is_floating_point():
                raise CheckpointError(
                    f"{path} has {name} as {theirs.dtype}, the model as {ours.dtype}; expected "
                    "floating-point numbers: were the weights quantised?"
                )
        return Fit.measure(
            self.model, weights, by_suffix, inference=inference, classes=self.classes
        )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Do nothing: the summary of the fit was logged."""

    def _on_main(self, read: Callable[[], T]) -> T:
        """Give all workers the result of ``read`` on the main one, or its error."""
        if not self._distributed:
            return read()
        failure: Exception | None = None
        outcome: list[Any] = [None, ""]
        if comm.is_main_process():
            try:
                outcome[0] = read()
            except Exception as error:  # raised below, when no worker waits for this one
                failure, outcome[1] = error, str(error) or repr(error)
        group = dist.new_group(backend="gloo")  # objects travel through the CPU
        dist.broadcast_object_list(outcome, src=0, group=group)
        dist.destroy_process_group(group)
        if failure is not None:
            raise failure
        if outcome[1]:
            raise CheckpointError(outcome[1])
        return outcome[0]


def _in_usual_order(weights: dict[str, Any]) -> dict[str, Any]:
    """``weights`` without those stored channels last, in place; shared ones stay shared."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.dim() == 4 and not value.is_contiguous():
            if value.is_contiguous(memory_format=torch.channels_last):
                key = value.data_ptr(), value.shape
                weights[name] = copies.setdefault(key, value.contiguous())
    return weights


def _save_loadable(data: dict[str, Any], file: BinaryIO) -> None:
    """``torch.save``, but refuses data that could not be loaded again."""
    torch.save(data, file)
    file.flush()
    if peek_iteration(file.name) is None:
        raise TypeError(
            "the checkpoint could not be loaded again; save only tensors and plain values "
            "(a NumPy scalar needs float() or int())"
        )
