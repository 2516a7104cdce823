"""Models that are trained already, on disk while a study runs: one that is killed goes on behind the last of them."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from histoscale.data.journal import names_file

_MADE_OF = "made_of"


@dataclass(frozen=True)
class Kept:
    """One file a model in `folder`. made_of: a digest of everything that trains them: a file that was made of other things is no
    model of this study."""

    folder: Path
    made_of: str

    @staticmethod
    def of(folder: Path, facts: Any) -> "Kept":
        """facts: whose `repr` names all that the models are made of."""
        return Kept(folder, hashlib.sha256(repr(facts).encode()).hexdigest())

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The state of a model; None where there is none, not whole, or of other things."""
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get(_MADE_OF) != self.made_of:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, number: int, state: Mapping[str, Tensor]) -> None:
        """Whole or not at all. Raises OSError that names the file, as on a full disk."""
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with names_file(partial):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, {_MADE_OF: self.made_of})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"
