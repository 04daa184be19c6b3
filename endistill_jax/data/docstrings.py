"""English text of an installed Python: docstrings of its modules, classes and functions, and its language topics.

Source files are parsed with `ast`; nothing that is read is ever imported or run.

Docstrings are full of templates: the same paragraph on `axis` or on the arguments of a distribution is in hundreds of
them. Splitting by content alone would leave such paragraphs in the training and in the held-out texts, and held-out
metrics would reward memory; see `without_near_copies`.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import pathlib
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement

MINIMUM_CHARACTERS = 40
SPLIT_PERCENTAGES = {"train": 90, "validation": 5, "test": 5}
SEQUENCE_WORDS = 8
LARGEST_SHARED_PART = 0.5

# What the main program of this project imports. Its installed dependency closure is the `packages` configuration.
ROOT_DISTRIBUTIONS = (
    "flax",
    "gin-config",
    "jax",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "safetensors",
    "scipy",
    "seqio",
    "tensorflow",
    "tensorflow-datasets",
)

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "testing", "testdata", "test_data", "idle_test", "pydoc_data"}
    | {"_vendor", "__pycache__"}
)
_SKIPPED_FILES = re.compile(r"^(test_.*|.*_test|.*_tests|conftest|.*_pb2|.*_pb2_grpc|.*_generated)\.py$")
_DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = ast.stmt | ast.ExceptHandler | ast.match_case  # what may hold a definition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text and where it is from."""

    text: str  # the docstring, its common indentation removed
    module: str  # dotted name of the module that holds it; for language topics `pydoc_data.topics`
    name: str  # qualified name of the class or function, empty for a module, the topic's name for a topic
    source: str  # distribution that holds it, `stdlib` for the standard library


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned docstring) of a parsed module and of every class and function in it."""
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, ast.Module | _DEFINITIONS):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield name, text
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DEFINITIONS):
                pending.append((f"{name}.{child.name}" if name else child.name, child))
            elif isinstance(child, _BLOCKS):
                pending.append((name, child))


def read_module(path: pathlib.Path, module: str, source: str) -> Iterator[Document]:
    """The docstrings of one source file; nothing if it is not valid Python of this version."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError, OSError):
        return
    for name, text in docstrings(tree):
        yield Document(text=text, module=module, name=name, source=source)


def read_topics(path: pathlib.Path) -> Iterator[Document]:
    """The language reference that `help()` shows: the literal dict `topics` of `pydoc_data/topics.py`."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "topics":
            for name, text in ast.literal_eval(statement.value).items():
                yield Document(text=inspect.cleandoc(text), module="pydoc_data.topics", name=name, source="stdlib")


def read_files(files: Iterable[tuple[pathlib.Path, pathlib.PurePath]], source: str) -> Iterator[Document]:
    """Documents of (path, path relative to the import root) pairs, tests and generated code left out."""
    for path, relative in files:
        if relative.suffix != ".py" or _SKIPPED_FILES.match(relative.name):
            continue
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and not any(p.endswith("-info") for p in relative.parts):
            parts = relative.with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield from read_module(path, module, source)


def read_folder(folder: pathlib.Path, source: str) -> Iterator[Document]:
    """Documents of all source files below a folder that is an import root."""
    files = sorted(folder.rglob("*.py"))
    yield from read_files(((path, path.relative_to(folder)) for path in files), source)


def read_distribution(name: str, distribution: importlib.metadata.Distribution) -> Iterator[Document]:
    """Documents of one installed distribution, from the list of files that its installer recorded."""
    files = sorted(distribution.files or (), key=str)
    located = ((pathlib.Path(str(distribution.locate_file(file))), file) for file in files)
    yield from read_files(located, name)


def standard_library() -> pathlib.Path:
    """Folder of the running Python's standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


def installed_closure(roots: Iterable[str] = ROOT_DISTRIBUTIONS) -> dict[str, importlib.metadata.Distribution]:
    """The installed ones among `roots` and all they require (extras left out), by normalized name, sorted."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(roots)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution
        requirements = [Requirement(line) for line in distribution.requires or ()]
        pending += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items()))


def content_key(text: str) -> str:
    """Hash of a text up to white space: two texts with the same key are the same text to this corpus."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def unique_documents(documents: Iterable[Document]) -> list[Document]:
    """Drops short texts and repeated ones (white space aside), and orders the rest by content."""
    kept: dict[str, Document] = {}
    for document in sorted(documents, key=lambda d: (d.source != "stdlib", d.source, d.module, d.name, d.text)):
        text = document.text.strip()
        if len(text) < MINIMUM_CHARACTERS or "\0" in text:
            continue
        if any("\ud800" <= character <= "\udfff" for character in text):  # lone surrogates are not UTF-8
            continue
        kept.setdefault(content_key(text), dataclasses.replace(document, text=text))
    return [kept[key] for key in sorted(kept)]


def split_of(text: str) -> str:
    """Split of a text, from its letters alone, so that copies that differ in case, digits or punctuation stay together.

    It depends on nothing else: the same text is in the same split in every configuration and on every machine.
    """
    letters = re.sub(r"[\W\d_]+", " ", text.casefold()).strip()
    # A text without letters would share one key with all others of its kind; its full content is used instead.
    bucket = int(hashlib.sha256((letters or content_key(text)).encode()).hexdigest(), 16) % 100
    for split, percentage in SPLIT_PERCENTAGES.items():
        if bucket < percentage:
            return split
        bucket -= percentage
    raise AssertionError("split percentages do not add up to 100")


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Documents by split, near-copies between the training and the held-out splits left out."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLIT_PERCENTAGES}
    for document in documents:
        splits[split_of(document.text)].append(document)
    held_out = [document.text for split in splits if split != "train" for document in splits[split]]
    train_texts, held_out_texts = without_near_copies([document.text for document in splits["train"]], held_out)
    kept = train_texts | held_out_texts
    return {split: [document for document in splits[split] if document.text in kept] for split in splits}


def without_near_copies(train: Iterable[str], held_out: Iterable[str]) -> tuple[set[str], set[str]]:
    """(training texts, held-out texts) that may stay.

    First every training text goes of whose word sequences half or more are in held-out texts, then every held-out text
    of which half or more are in the training texts that are left.
    """
    held_out_sequences = {text: word_sequences(text) for text in held_out}
    of_held_out = set().union(*held_out_sequences.values())

    def mostly_in(sequences: set[str], others: set[str]) -> bool:
        return len(sequences & others) >= LARGEST_SHARED_PART * len(sequences)

    kept, seen = set(), set()
    for text in train:
        sequences = word_sequences(text)
        if not mostly_in(sequences, of_held_out):
            kept.add(text)
            seen |= sequences & of_held_out
    return kept, {text for text, sequences in held_out_sequences.items() if not mostly_in(sequences, seen)}


def word_sequences(text: str) -> set[str]:
    """Every run of eight words of a text, case, digits and punctuation aside; all of it if it is shorter."""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    last = max(len(words) - SEQUENCE_WORDS, 0)
    return {" ".join(words[start : start + SEQUENCE_WORDS]) for start in range(last + 1)}
