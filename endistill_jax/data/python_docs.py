"""Cache of prepared data between runs, and its lock."""

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
from endistill_jax.data.docstrings import without_near_copies
from endistill_jax.data.text_pipeline import seqio, tf, tfds


def cache_folder() -> pathlib.Path:
    """`$ENDISTILL_CACHE`, else `$XDG_CACHE_HOME/endistill_jax`, else `~/.cache/endistill_jax`."""
    if chosen := os.environ.get("ENDISTILL_CACHE"):
        return pathlib.Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(parent).expanduser() / "endistill_jax"


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Holds the lock `name` in `folder` (created if need be); other processes wait. It goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass(kw_only=True)
class PythonDocsConfig(tfds.core.BuilderConfig):
    """What is read.

    Attributes:
      packages: whether installed distributions are read in addition to the standard library.
      folder: read the source files below this folder instead of anything installed.
      files: number of files a split is written to, so that as many hosts can each read their own.
    """

    packages: bool = False
    folder: str | None = None
    files: int = 16


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
        splits = split_documents(docstrings.unique_documents(read_corpus(self.builder_config)))
        return {split: self._generate_examples(documents) for split, documents in splits.items()}

    def _generate_examples(self, documents: list[docstrings.Document]):
        for document in documents:
            yield docstrings.content_key(document.text), dataclasses.asdict(document)


def split_documents(documents: list[docstrings.Document]) -> dict[str, list[docstrings.Document]]:
    """Documents by split, near-copies between the training and the held-out splits left out."""
    splits: dict[str, list[docstrings.Document]] = {split: [] for split in docstrings.SPLIT_PERCENTAGES}
    for document in documents:
        splits[docstrings.split_of(document.text)].append(document)
    held_out = [document.text for split in splits if split != "train" for document in splits[split]]
    train_texts, held_out_texts = without_near_copies([document.text for document in splits["train"]], held_out)
    kept = train_texts | held_out_texts
    return {split: [document for document in splits[split] if document.text in kept] for split in splits}


def read_corpus(config: PythonDocsConfig) -> Iterator[docstrings.Document]:
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


def python_docs_builder(config: str | PythonDocsConfig = "stdlib", data_dir: str | None = None) -> PythonDocs:
    """The builder of a configuration, its data prepared first if they are not there yet.

    Args:
      config: `stdlib`, `packages`, or a configuration of one's own.
      data_dir: folder for prepared data; by default one in the cache folder (see `cache_folder`). Below it each
        set of Python and package versions has its own folder, so a corpus of another installation is never reused.

    Raises:
      UserError: no such configuration.
    """
    if isinstance(config, str):
        config = _known_config(config)
    versions = corpus_versions(config)
    digest = hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:12]
    root = pathlib.Path(data_dir) if data_dir else cache_folder() / "datasets"
    folder = root / f"{versions['python']}-{digest}"
    builder = PythonDocs(data_dir=str(folder), config=config)
    if not _is_prepared(builder):
        with exclusive(folder, config.name), _silence():
            # Another process may have prepared it while this one waited.
            builder = PythonDocs(data_dir=str(folder), config=config)
            if not _is_prepared(builder):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(num_shards=config.files, try_download_gcs=False)
                )
    return builder


def _is_prepared(builder: PythonDocs) -> bool:
    # Not `builder.is_prepared()`, which logs a warning for a folder that is not there yet.
    return (pathlib.Path(builder.data_dir) / "dataset_info.json").exists()


def _known_config(name: str) -> PythonDocsConfig:
    known = {config.name: config for config in PythonDocs.BUILDER_CONFIGS}
    if name not in known:
        raise UserError(f"python_docs has no configuration {name!r}; it has {', '.join(known)}")
    return known[name]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silences TFDS's notices and progress bars, which concern downloads; there are none here."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


class PythonDocsSource(seqio.DataSource):
    """SeqIO source of the corpus, prepared when it is first read and not when a task is defined."""

    def __init__(self, config: str | PythonDocsConfig = "stdlib", data_dir: str | None = None):
        self._config = _known_config(config) if isinstance(config, str) else config
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
