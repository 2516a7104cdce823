"""Paths on a command line: taken to the letter, `~` expanded, and URIs refused where only a disk will do."""

import os
import re
from typing import Any

# What these keys hold is a path, or a name that may be one, and never anything that Hydra's grammar should read.
ANYWHERE = {
    "manifest", "catalog", "previous", "tiles", "pretraining", "encoder", "start.weights", "monitor.labelled", "online.catalog",
    "store", "mirror", "data_root", "method.gram.source",
}  # fmt: skip
ON_DISK = {
    "out", "embeddings", "floor_embeddings", "annotations", "checkpoint", "summary", "runs", "registered", "root", "labels.path",
    "storage.cache_dir",
}  # fmt: skip
_HOME = re.compile(r"((?:[a-z]+:)*)(~[\w.-]*)(?=/|$)")  # ~/x, and hf:~/x, random:~/x
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def is_path(key: str) -> bool:
    """Whether a dotted key holds a path, in a phase of a run too."""
    return re.sub(r"^phases\.\w+\.", "", key) in ANYWHERE | ON_DISK


def expanded(values: Any) -> Any:
    """Nested values in which every text that begins with a home directory, whatever the shell made of it, names it in full."""
    if isinstance(values, dict):
        return {key: expanded(below) for key, below in values.items()}
    if isinstance(values, list):
        return [expanded(below) for below in values]
    home = _HOME.match(values) if isinstance(values, str) else None
    return home[1] + os.path.expanduser(values[home.end(1) :]) if home else values


def empty(values: dict[str, Any]) -> str | None:
    """What is wrong with the first key of dotted `values` that is to name a path and is empty, as an unset variable of the shell
    leaves it; None: nothing."""
    key = next((key for key in sorted(values) if is_path(key) and (values[key] == "" or values[key] == [""])), None)
    return None if key is None else f"{key}= is empty: give a path ({key}=. is the folder that this runs in)"


def credential(values: dict[str, Any]) -> str | None:
    """What is wrong with the first key of dotted `values` that holds a URI with a password or a token; None: nothing."""
    for key in sorted(key for key in values if is_path(key)):
        for value in values[key] if isinstance(values[key], list) else [values[key]]:
            if isinstance(value, str) and ":/" in value:
                from histoscale.data.storage import check_secret  # what reads stores, which no other refusal waits for

                try:
                    check_secret(value)
                except ValueError as error:
                    return f"{key}=: {error}"
    return None


def uri_on_disk(values: dict[str, Any]) -> str | None:
    """What is wrong with the first key of dotted `values` that holds a URI and must name a place on a disk; None: nothing."""
    anywhere = values.get("dataset.name") == "cohort"  # a table and slides; other sets are folders
    for key in sorted(values.keys() & (ON_DISK if anywhere else ON_DISK | {"data_root"})):
        for value in values[key] if isinstance(values[key], list) else [values[key]]:
            scheme = _URI.match(value) if isinstance(value, str) else None
            if scheme is None:
                continue
            if scheme[1].lower() == "file":
                return f"{key}={value}: give the path itself, {key}={re.sub('^file:/+', '/', value, flags=re.IGNORECASE)}"
            if key == "out":
                return (
                    f"out={value} is in an object store, and results are written to a disk (files are locked and renamed there): "
                    "give a folder of this machine, or of a file system that all ranks see, and copy it when it is done"
                )
            return f"{key}={value} is in an object store, and {key}= is read from a disk: copy it here first, then give its path"
    return None
