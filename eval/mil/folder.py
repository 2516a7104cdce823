"""A folder of embedding stores as it was found: whether the `embed` that fills it has finished, and why a slide has no store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoscale.data.jsonfiles import JsonError, parse_object
from histoscale.data.names import slide_key
from histoscale.eval.stores import StoreError

_PICKLES = "pt_files"  # where CLAM puts them, beside h5_files


@dataclass(frozen=True)
class Folder:
    """path: of the stores. unfinished: the state of the `embed` that has not finished with them, "" for none (other tools leave
    no state). failed: slide -> why `embed` gave it up. near: key of a slide's name -> files there whose names differ by case or
    suffixes alone. pickles: names of `.pt` files there."""

    path: Path
    unfinished: str
    failed: dict[str, str]
    near: dict[str, list[str]]
    pickles: frozenset[str]

    def absent(self, slide_id: str) -> str:
        """Why the folder has no store of that slide."""
        if (self.path / f"{slide_id}.h5").is_symlink():
            return "its store is a link to a file that is not there"
        if slide_id in self.failed:
            return f"no embedding store: embed gave the slide up ({self.failed[slide_id]})"
        if slide_id in self.pickles:
            return "no embedding store: a .pt file lies there, and pickles are not opened; write its tensors into an .h5"
        near = self.near.get(slide_key(slide_id))
        if near:
            return f"no embedding store of its name: is it {near[0]}? Rename the one or the other"
        return "no embedding store"

    @property
    def hint(self) -> str:
        """What else may have been meant where no store is found at all; "" for nothing."""
        if not self.path.is_dir():
            return f"{self.path} is no folder of this machine"
        inside = [each.name for each in sorted(self.path.iterdir()) if each.is_dir() and any(each.glob("*.h5"))]
        return f"stores lie in {self.path / inside[0]}: give that folder" if inside else ""


def read_folder(path: Path) -> Folder:
    """Look at names and at what `embed` noted beside them; no store is opened. Raises StoreError for a damaged note."""
    near: dict[str, list[str]] = {}
    for each in sorted(path.glob("*.h5")):
        near.setdefault(slide_key(each.stem), []).append(each.name)
    places = (path, path / _PICKLES, path.parent / _PICKLES)
    pickles = frozenset(each.stem for place in places for each in place.glob("*.pt"))
    state = _noted(path / "state.json", "its embed may not have finished")
    ours = state.get("command") == "embed"
    status = str(state.get("status", "unknown"))
    found = _noted(path / "summary.json", "why slides have no store is not known").get("embed") if ours else None
    failed = found.get("failed") if isinstance(found, dict) else None
    failed = {str(name): str(why) for name, why in failed.items()} if isinstance(failed, dict) else {}
    return Folder(path, "" if not ours or status == "done" else status, failed, near, pickles)


def _noted(path: Path, unknown: str) -> Mapping[str, Any]:
    """A JSON object that a run left; nothing where there is none: other tools use such names for other things. Raises StoreError
    for an empty one, and for one that begins as ours and was cut."""
    try:
        data = path.read_bytes()
        return parse_object(data)
    except OSError:
        return {}
    except JsonError as error:
        if data.strip(b" \t\r\n\0")[:1] not in (b"", b"{"):
            return {}
        raise StoreError(f"{path} is damaged ({error}), so {unknown}: run that embed again, or delete the file") from None
