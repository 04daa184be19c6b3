"""Finding a trained model: the bundled teacher, a Hugging Face or T5X checkpoint, or an earlier run of this system."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import fingerprint_params, fingerprint_vocabulary
from endistill_jax.checkpoints.huggingface.tokenizer import vocabulary_of, write_tokenizer
from endistill_jax.checkpoints.interchange import Params, Source, VocabularyFile, assemble
from endistill_jax.checkpoints.opening import open_source
from endistill_jax.checkpoints.reading import Facts, finished_steps, read_facts_of_step, restore_params
from endistill_jax.model.config import T5Config
from endistill_jax.sharding import abstract_params, param_shardings

BUNDLED = "bundled"
BUNDLED_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "assets" / "python_docs" / "teacher"
# Within the model directory of a run or of an import:
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


@dataclasses.dataclass(kw_only=True)
class TrainedModel:
    """A model that was trained earlier: its settings at once, its parameters when they are first needed.

    Attributes:
        source: where it is, as the user named it.
        config: its settings, as it shall be run.
        vocabulary_file: what lies beside it, if anything does.
        step: how far it was trained, if that is known; else 0.
        facts: what its checkpoint tells of how it was made; empty for a foreign one.
        notes: what was assumed because the checkpoint does not say, a sentence each.
    """

    source: str
    config: T5Config
    vocabulary_file: VocabularyFile | None
    step: int
    facts: Facts
    notes: tuple[str, ...] = ()
    _read: Callable[[Mesh | None], tuple[Params, str]]
    _loaded: tuple[Params, str] | None = None

    def load(self, mesh: Mesh | None = None) -> Params:
        """Reads the parameters, unless they are there already: nested dictionaries, layers stacked.

        Args:
            mesh: every array goes straight onto the devices that keep a part of it; None gives NumPy arrays.

        Raises:
            UserError: naming what cannot be read.
        """
        if self._loaded is None:
            self._loaded = self._read(mesh)
        return self._loaded[0]

    @property
    def params(self) -> Params:
        """The parameters, where `load` put them."""
        return self.load()

    @property
    def fingerprint(self) -> str:
        """Of the parameters' content, as they are stored."""
        self.load()
        return self._loaded[1]

    @property
    def vocabulary(self) -> str | None:
        """Fingerprint of the vocabulary it was trained with; None if nothing tells."""
        if "run" in self.facts:
            return self.facts["run"]["vocabulary"]
        return fingerprint_of(self.vocabulary_file)


def open_model(source: str, dtype: str = "float32", scan_layers: bool = True) -> TrainedModel:
    """Finds a model and checks names, shapes and files; reads no parameters yet.

    Args:
        source: "bundled", the model directory of a run or of an import, a Hugging Face T5 folder, the name of one on
            the Hugging Face hub, or a T5X checkpoint.
        dtype: float32 or bfloat16: type of its parameters and of its computations.
        scan_layers: whether its layers run in a compiled loop.

    Raises:
        UserError: if there is no model, or it cannot be read.
    """
    execution = {"dtype": dtype, "scan_layers": scan_layers, "dropout_rate": 0.0}
    folder = pathlib.Path(source).expanduser()
    steps = finished_steps(str(folder / CHECKPOINTS))
    if steps:
        facts = read_facts_of_step(str(folder / CHECKPOINTS), steps[-1])
        config = dataclasses.replace(T5Config(**facts["run"]["model"]), **execution)
        return TrainedModel(
            source=source,
            config=config,
            vocabulary_file=vocabulary_of(folder / TOKENIZER),
            step=steps[-1],
            facts=facts,
            _read=lambda mesh: _read_run(str(folder / CHECKPOINTS), steps[-1], facts, config, mesh),
        )
    opened = open_source(str(BUNDLED_FOLDER) if source == BUNDLED else source)
    config = dataclasses.replace(opened.config, **execution)
    return TrainedModel(
        source=source,
        config=config,
        vocabulary_file=opened.vocabulary,
        step=opened.step,
        facts={},
        notes=opened.notes,
        _read=lambda mesh: _read_source(opened, config, mesh),
    )


def fingerprint_of(file: VocabularyFile | None) -> str | None:
    """The fingerprint of a vocabulary file with its sentinels."""
    from endistill_jax.data.vocabulary import load_vocabulary

    return None if file is None else fingerprint_vocabulary(load_vocabulary(file.path, extra_ids=file.extra_ids))


def keep_tokenizer(model_dir: str, file: VocabularyFile) -> None:
    """Puts a vocabulary into a model directory, in the form that Hugging Face tokenizers have."""
    folder = pathlib.Path(model_dir).expanduser() / TOKENIZER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".model") as local:  # the file may lie on a bucket
        local.write(epath.Path(file.path).read_bytes())
        local.flush()
        write_tokenizer(folder, file._replace(path=local.name))


def _read_source(opened: Source, config: T5Config, mesh: Mesh | None) -> tuple[Params, str]:
    with opened:
        return assemble(opened, config.dtype, None if mesh is None else param_shardings(config, mesh))


def _read_run(directory: str, step: int, facts: Facts, config: T5Config, mesh: Mesh | None) -> tuple[Params, str]:
    """Restores a run's parameters; those of an import, whose fingerprint is known, come in their final type at once."""
    fingerprint = facts.get("import", {}).get("fingerprint")
    abstract = None
    if mesh is not None:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, config.dtype if fingerprint else leaf.dtype, sharding=sharding
            ),
            abstract_params(config),
            param_shardings(config, mesh),
        )
    params = restore_params(directory, step, abstract_params=abstract)[0]
    fingerprint = fingerprint or fingerprint_params(params)
    leaves, tree = jax.tree.flatten(params)
    del params  # so that each leaf is let go when it has been cast
    for index, leaf in enumerate(leaves):
        leaves[index] = leaf.astype(jnp.dtype(config.dtype))
    return jax.tree.unflatten(tree, leaves), fingerprint
