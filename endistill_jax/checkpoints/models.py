"""Finding a trained model: the bundled teacher, a Hugging Face or T5X checkpoint, or an earlier run of this system."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.fingerprint import (
    fingerprint_params,
    fingerprint_pieces,
    fingerprint_vocabulary,
    pieces_of_vocabulary,
)
from endistill_jax.checkpoints.interchange import Source, assemble
from endistill_jax.checkpoints.manager import finished_steps, read_manifest, restore_params
from endistill_jax.checkpoints.manifest import Manifest
from endistill_jax.checkpoints.tokenizer import (
    VocabularyFile,
    check_vocabulary,
    load_tokenizer,
    vocabulary_of,
    write_tokenizer,
)
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, Params, abstract_params, config_from_plain
from endistill_jax.sharding import param_shardings
from endistill_jax.storage import is_remote, stored_path

BUNDLED = "bundled"
BUNDLED_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "assets" / "python_docs" / "teacher"
# Within the model directory of a run or of an import:
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
# Of a finished run whose checkpoints were not kept: a model directory with its parameters alone.
PRODUCT = "product"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(kw_only=True)
class TrainedModel:
    """A model that was trained earlier: its settings at once, its parameters when they are first needed.

    Attributes:
        source: where it is, as the user named it.
        vocabulary_file: the one stored with it, if any.
        step: optimizer steps trained, 0 if unknown.
        manifest: of its checkpoint; empty for a foreign one.
        notes: assumptions about what the checkpoint does not specify, a sentence each.
        pieces: fingerprint of its vocabulary's pieces, if there is no SentencePiece model.
    """

    source: str
    config: ModelConfig
    vocabulary_file: VocabularyFile | None
    step: int
    manifest: Manifest
    notes: tuple[str, ...] = ()
    pieces: str | None = None
    _read: Callable[[Any], tuple[Params, str]]  # shardings -> the parameters and their fingerprint
    _loaded: Params | None = None
    _shardings: Any = None  # of what is loaded
    _fingerprint: str | None = None

    def load(self, shardings: Any = None) -> Params:
        """The parameters: nested dictionaries, layers stacked; read unless already loaded.

        Args:
            shardings: tree of `NamedSharding` like the parameters: arrays are loaded onto their devices, or moved there
                if already loaded elsewhere. None gives NumPy arrays, or those already loaded.
        """
        if self._loaded is None:
            self._loaded, self._fingerprint = self._read(shardings)
            self._shardings = shardings
        elif shardings is not None and shardings != self._shardings:
            self._loaded, self._shardings = jax.device_put(self._loaded, shardings), shardings
        return self._loaded

    def load_on(self, mesh: Mesh, placement: str = "sharded") -> Params:
        """As `load`, on a mesh by our own rules; see `sharding.logical_rules`."""
        return self.load(param_shardings(self.config, mesh, placement))

    def release(self) -> None:
        """Frees the parameters; `load` reads them again."""
        self._loaded = None

    @property
    def params(self) -> Params:
        """The parameters, where `load` put them."""
        return self.load()

    @property
    def fingerprint(self) -> str:
        """Of the parameters' content, as they are stored."""
        if self._fingerprint is None:
            self.load()
        return self._fingerprint

    @property
    def vocabulary(self) -> str | None:
        """Fingerprint of the vocabulary it was trained with; None if unknown."""
        if "run" in self.manifest:
            return self.manifest["run"]["vocabulary"]
        return fingerprint_of(self.vocabulary_file)

    def has_other_vocabulary(self, vocabulary: Any) -> bool:
        """Whether it is known to have been trained with another vocabulary."""
        if self.vocabulary is not None:
            return self.vocabulary != fingerprint_vocabulary(vocabulary)
        return self.pieces is not None and self.pieces != fingerprint_pieces(pieces_of_vocabulary(vocabulary))


def open_model(source: str, dtype: str = "float32", scan_layers: bool = True) -> TrainedModel:
    """Finds a model and checks names, shapes and files; reads no parameters yet.

    Args:
        source: "bundled", the model directory of a run or of an import (its last step) or `checkpoints/<step>` in it, a
            Hugging Face T5 folder, the name of one on the Hugging Face hub, or a T5X checkpoint.
        dtype: float32 or bfloat16, of its parameters and of its computations.
        scan_layers: whether its layers run in a compiled loop.
    """
    execution = {"dtype": dtype, "scan_layers": scan_layers}
    run = find_run(source)
    if run is not None:
        directory, step = run
        manifest = read_manifest(str(directory), step)
        config = dataclasses.replace(config_from_plain(manifest["run"]["model"]), **execution)
        return TrainedModel(
            source=source,
            config=config,
            vocabulary_file=vocabulary_of(directory.parent / TOKENIZER),
            step=step,
            manifest=manifest,
            pieces=manifest.get("import", {}).get("pieces"),
            _read=lambda shardings: _read_run(str(directory), step, manifest, config, shardings),
        )
    path = str(BUNDLED_FOLDER) if source == BUNDLED else source
    opened = open_source(path)
    config = dataclasses.replace(opened.config, **execution)
    unread = [opened]

    def read(shardings: Any) -> tuple[Params, str]:
        # A source is closed after reading, so a repeated read opens it again.
        with unread.pop() if unread else open_source(path) as tensors:
            return assemble(tensors, config.dtype, shardings)

    return TrainedModel(
        source=source,
        config=config,
        vocabulary_file=opened.vocabulary,
        step=opened.step,
        manifest={},
        notes=opened.notes,
        pieces=opened.pieces,
        _read=read,
    )


def lazy_model(source: str, config: ModelConfig) -> TrainedModel:
    """A model that will have been trained in the model directory `source` by the time its parameters are first read."""

    def read(shardings: Any) -> tuple[Params, str]:
        model = open_model(source, config.dtype, config.scan_layers)
        return model.load(shardings), model.fingerprint

    return TrainedModel(source=source, config=config, vocabulary_file=None, step=0, manifest={}, _read=read)


def open_source(source: str) -> Source:
    """Opens a foreign checkpoint; what exists locally is never looked for on the hub.

    Args:
        source: a Hugging Face T5 folder; a T5X checkpoint (its model directory, the folder of a step, or the file in
            it), local or gs://; the name of a model on the Hugging Face hub, such as google/t5-v1_1-small.
    """
    path = stored_path(source)
    if (path / "config.json").exists():
        if is_remote(source):
            raise UserError(
                f"{source} is a Hugging Face folder on a bucket, and these are read from local disks only: copy it "
                "with 'gcloud storage cp -r', or import it and copy what that writes"
            )
        return huggingface.open_folder(source)
    if t5x.is_checkpoint(source):
        return t5x.open_checkpoint(source)
    if not path.exists() and _HUB_NAME.fullmatch(source):
        return huggingface.open_folder(huggingface.download(source))
    raise UserError(
        f"no model at {source}; give 'bundled', a Hugging Face T5 folder (with config.json) or hub name, a T5X "
        "checkpoint (checkpoint_<step>), or the model directory of a run (with checkpoints/<step>)"
    )


def find_run(source: str) -> tuple[epath.Path, int] | None:
    """The directory of the checkpoints that a path names, and the step: the last, if the path names none.

    A product comes before the checkpoints it was made from: where there are still some, they are being removed.
    """
    folder = stored_path(source)
    if folder.name.isdecimal() and int(folder.name) in finished_steps(str(folder.parent)):
        return folder.parent, int(folder.name)
    for directory in (folder / PRODUCT / CHECKPOINTS, folder / CHECKPOINTS, folder):
        if steps := finished_steps(str(directory)):
            return directory, steps[-1]
    return None


def choose_vocabulary(model: TrainedModel, file: str | None, extra_ids: int) -> VocabularyFile | None:
    """The vocabulary of a model: the one given by the user, which must be its own, or the one stored with it."""
    found = model.vocabulary_file
    if file is not None:
        found = VocabularyFile(file, extra_ids)
        if model.has_other_vocabulary(load_tokenizer(file, extra_ids=extra_ids)):
            raise UserError(
                f"{model.source} was trained with another vocabulary than {file} with {extra_ids} extra ids; "
                "give its own, or leave vocabulary_file out"
            )
    if found is not None:
        check_vocabulary(found, model.config)
    return found


def print_notes(model: TrainedModel) -> None:
    """Prints the assumptions made about a model."""
    for note in model.notes:
        print(f"{model.source}: {note}")


def fingerprint_of(file: VocabularyFile | None) -> str | None:
    """The fingerprint of a vocabulary file with its sentinels."""
    return None if file is None else fingerprint_vocabulary(load_tokenizer(file.path, extra_ids=file.extra_ids))


def keep_tokenizer(model_dir: str, file: VocabularyFile) -> None:
    """Writes a vocabulary into a model directory, in the format of Hugging Face tokenizers."""
    folder = epath.Path(model_dir).expanduser() / TOKENIZER
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, file)


def _read_run(directory: str, step: int, manifest: Manifest, config: ModelConfig, shardings: Any) -> tuple[Params, str]:
    """Restores a run's parameters; those of an import, whose fingerprint is known, come in their final type at once."""
    fingerprint = manifest.get("import", {}).get("fingerprint")
    abstract = None
    if shardings is not None:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, config.dtype if fingerprint else leaf.dtype, sharding=sharding
            ),
            abstract_params(config),
            shardings,
        )
    params = restore_params(directory, step, abstract_params=abstract)[0]
    fingerprint = fingerprint or fingerprint_params(params)
    leaves, tree = jax.tree.flatten(params)
    del params  # so that each leaf is freed once it is cast
    for index, leaf in enumerate(leaves):
        leaves[index] = leaf.astype(jnp.dtype(config.dtype))
    return jax.tree.unflatten(tree, leaves), fingerprint
