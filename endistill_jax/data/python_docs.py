"""TFDS builder and SeqIO source of the offline corpus: English docstrings of the installed Python, nothing downloaded.

`python_docs/stdlib` reads the standard library and the language topics of `help()` (about 2 MB); `python_docs/packages`
adds the docstrings of the installed packages that this project depends on (about 24 MB). The texts depend on what is
installed, so a prepared corpus is stored in a folder named after Python's version and the packages' versions.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence

from endistill_jax.core.errors import UserError
from endistill_jax.data import docstrings
from endistill_jax.data.text_pipeline import seqio, tf, tfds


@dataclasses.dataclass(kw_only=True)
class PythonDocsConfig(tfds.core.BuilderConfig):
    """What is read."""

    packages: bool = False  # whether installed distributions are read in addition to the standard library
    folder: str | None = None  # read the source files below this folder instead of anything installed
    files: int = 16  # a split is written to so many, so that as many hosts can each read their own


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Docstrings and language topics of the installed Python, split by content."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [
        PythonDocsConfig(name="stdlib", description="The standard library and the language topics."),
        PythonDocsConfig(name="packages", description="The same and the packages this project uses.", packages=True),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("text", "module", "name", "source")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="English docstrings of an installed Python, split by content hash.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(corpus_versions(self.builder_config)),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        documents = docstrings.unique_documents(_read_corpus(self.builder_config))
        splits = docstrings.split_documents(documents)
        return {split: self._generate_examples(documents) for split, documents in splits.items()}

    def _generate_examples(self, documents: list[docstrings.Document]):
        for document in documents:
            yield docstrings.content_key(document.text), dataclasses.asdict(document)


def _read_corpus(config: PythonDocsConfig) -> Iterator[docstrings.Document]:
    """Every document of a configuration, repeated ones included."""
    if config.folder:
        yield from docstrings.read_folder(pathlib.Path(config.folder), pathlib.Path(config.folder).name)
        return
    library = docstrings.standard_library()
    yield from docstrings.read_folder(library, "stdlib")
    yield from docstrings.read_topics(library / "pydoc_data" / "topics.py")
    if config.packages:
        for name, distribution in docstrings.installed_closure().items():
            yield from docstrings.read_distribution(name, distribution)


def corpus_versions(config: PythonDocsConfig) -> dict[str, str]:
    """What a corpus was read from: versions of Python and, where they are read, of the packages."""
    versions = {"python": f"{platform.python_implementation()}-{platform.python_version()}"}
    if config.folder:
        versions["folder"] = config.folder
    elif config.packages:
        versions |= {name: distribution.version for name, distribution in docstrings.installed_closure().items()}
    return versions


def python_docs_builder(config: PythonDocsConfig, data_dir: str | None = None) -> PythonDocs:
    """The builder of a configuration, its data prepared first if they are not there yet.

    They are below `data_dir`, by default `cache_folder()`, where each set of Python and package versions has its own
    folder, so that a corpus of another installation is never reused.
    """
    versions = corpus_versions(config)
    digest = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:12]
    root = pathlib.Path(data_dir) if data_dir else cache_folder() / "datasets"
    folder = root / f"{versions['python']}-{digest}"
    builder = PythonDocs(data_dir=str(folder), config=config)
    if not _is_prepared(builder):
        with _lock(folder, config.name), _silence():
            # Another process may have prepared it while this one waited.
            builder = PythonDocs(data_dir=str(folder), config=config)
            if not _is_prepared(builder):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(num_shards=config.files, try_download_gcs=False)
                )
    return builder


def cache_folder() -> pathlib.Path:
    """`$ENDISTILL_CACHE`, else `$XDG_CACHE_HOME/endistill_jax`, else `~/.cache/endistill_jax`."""
    if chosen := os.environ.get("ENDISTILL_CACHE"):
        return pathlib.Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(parent).expanduser() / "endistill_jax"


def _is_prepared(builder: PythonDocs) -> bool:
    # Not `builder.is_prepared()`, which logs a warning for a folder that is not there yet.
    return (pathlib.Path(builder.data_dir) / "dataset_info.json").exists()


@contextlib.contextmanager
def _lock(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Holds the lock `name` in `folder`; other processes wait. The system releases it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silences TFDS's notices and progress bars, which concern downloads; there are none here."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


class PythonDocsSource(seqio.DataSource):
    """SeqIO source of the corpus, prepared when it is first read and not when a task is defined.

    `config` is `stdlib`, `packages`, or a configuration of one's own.
    """

    def __init__(self, config: str | PythonDocsConfig = "stdlib", data_dir: str | None = None):
        if isinstance(config, str):
            known = {each.name: each for each in PythonDocs.BUILDER_CONFIGS}
            if config not in known:
                raise UserError(f"python_docs has no configuration {config!r}; it has {', '.join(known)}")
            config = known[config]
        self._config = config
        self._data_dir = data_dir
        self._builder: PythonDocs | None = None
        super().__init__(splits=tuple(docstrings.SPLIT_PERCENTAGES))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config.name}, {self._config.folder}, {self._data_dir})"

    @property
    def builder(self) -> PythonDocs:
        """The prepared builder."""
        if self._builder is None:
            self._builder = python_docs_builder(self._config, self._data_dir)
        return self._builder

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return self.builder.info.splits[split].filenames

    def num_input_examples(self, split: str) -> int:
        return self.builder.info.splits[split].num_examples

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **_,
    ) -> tf.data.Dataset:
        read_config = tfds.ReadConfig(shuffle_seed=seed, skip_prefetch=True, try_autocache=False)
        if shard_info:
            read_config.input_context = tf.distribute.InputContext(
                num_input_pipelines=shard_info.num_shards, input_pipeline_id=shard_info.index
            )
        return self.builder.as_dataset(split=split, shuffle_files=shuffle, read_config=read_config)
