"""What people write beside their images: tables, and names of classes, patients and sites, each in one spelling."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from histoscale.data.delimited import Delimited, TableError, read_delimited
from histoscale.data.names import NamesError, fold, nearest, one_spelling, patient_key, truth, value_key
from histoscale.eval.datasets.patches import DatasetError

_SHOWN = 80  # characters of a name


def read_labels(path: Path, needed: Sequence[str], optional: Sequence[str]) -> Delimited:
    """A table in any of the forms of `read_delimited`. Raises DatasetError."""
    try:
        return read_delimited(path.read_bytes(), str(path), needed, optional)
    except (TableError, OSError) as error:
        raise DatasetError(str(error)) from error


def one_class(names: Sequence[str], where: str) -> tuple[list[str], tuple[str, ...]]:
    """(classes in one spelling each, what was joined in a sentence): case, blanks, Unicode form, 1.0 for 1; and True, yes and 1
    where a set has no other classes than these and their opposites.

    Raises DatasetError where a blank inside is the difference.
    """
    both = all(truth(name) is not None for name in set(names))
    return _one(names, "classes", (lambda name: str(truth(name))) if both else value_key, where)


def one_patient(names: Sequence[str], where: str) -> tuple[list[str], tuple[str, ...]]:
    """The same for patients: of TCGA barcodes the first three fields count. "" stays."""
    return _one(names, "patients", patient_key, where)


def one_site(names: Sequence[str], where: str) -> tuple[list[str], tuple[str, ...]]:
    """The same for sites. "" stays."""
    return _one(names, "sites", fold, where)


def _one(names: Sequence[str], what: str, key: Callable[[str], str], where: str) -> tuple[list[str], tuple[str, ...]]:
    try:
        spelt, said = one_spelling(names, what, key)
    except NamesError as error:
        raise DatasetError(f"{where}: {error}") from error
    return spelt, tuple(said)


def find_image(root: Path, told: str) -> Path:
    """The image that a table names, from `root` on; slashes of Windows and either form of Unicode are followed.

    Raises DatasetError: it leads out of the folder; it is not there, and which one looks most like it; it is no file, or no name.
    """
    try:
        return _found(root, told)
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        why = error.strerror if isinstance(error, OSError) else error
        raise DatasetError(f"the path {told[:_SHOWN]!r} cannot be followed ({why}): name an image") from error


def _found(root: Path, told: str) -> Path:
    if not told:
        raise DatasetError("the image '' is missing: name one")
    if "\0" in told:
        raise DatasetError(f"the path {told[:_SHOWN]!r} holds a character that no name of a file does: name an image")
    slashes = told.replace("\\", "/")
    forms = [unicodedata.normalize(form, text) for text in (told, slashes) for form in ("NFC", "NFD")]
    for spelling in dict.fromkeys([told, slashes, *forms]):
        path, real = root / spelling, (root / spelling).resolve()
        if not real.is_relative_to(root.resolve()):
            raise DatasetError(f"the path {told!r} leaves the folder (it leads to {real}): put the image itself there")
        if path.is_file():
            return path.relative_to(root) if path.is_relative_to(root) else real.relative_to(root.resolve())
        if path.exists():
            raise DatasetError(f"the path {told!r} is {'a folder' if path.is_dir() else 'no plain file'}: name an image")
    folder, name = (root / slashes).parent, Path(slashes).name
    while not folder.is_dir():
        folder, name = folder.parent, folder.name
    found = nearest(name, [path.name for path in folder.iterdir()])
    if found is None:
        raise DatasetError(f"the image {told!r} is missing")
    close = (folder.resolve() / found).relative_to(root.resolve()).as_posix()
    suffix = (folder / found).is_file() and Path(found).stem in (name, Path(name).stem)
    guess = "is the suffix another one?" if suffix else "is that the one?"
    raise DatasetError(f"the image {told!r} is missing; the nearest there is {close!r}: {guess}")
