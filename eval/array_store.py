"""One array on disk in pieces: written once, gone on with after a kill, read by memory map so that memory stays bounded."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from histoscale.data.journal import Journal


class ArrayStore:
    """[rows, *shape] in `folder`, `piece` rows a file. Pieces appear whole or not at all."""

    def __init__(self, folder: Path, rows: int, piece: int) -> None:
        self.folder, self.rows, self.piece = folder, rows, piece
        self._maps: dict[int, np.ndarray] = {}

    def fill(self, make: Callable[[np.ndarray], np.ndarray], text: str, journal: Journal) -> None:
        """Make the pieces that are missing. make: rows int64 [b] -> [b, *shape]."""
        numbers = range(-(-self.rows // self.piece))
        missing = [number for number in numbers if self._open(number) is None]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with journal.progress(self.rows, text, "views") as progress:
            progress.advance(sum(len(self._places(number)) for number in numbers) - sum(len(self._places(m)) for m in missing))
            for number in missing:
                places = self._places(number)
                made = make(places)
                if len(made) != len(places):
                    raise ValueError(f"{text}: {len(made)} rows were made of {len(places)}")
                partial = self.folder / f"{number:05d}.{os.getpid()}.partial"
                with partial.open("wb") as file:
                    np.save(file, made, allow_pickle=False)
                partial.replace(self._file(number))
                progress.advance(len(places))

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """[b, *shape], copied into memory. Raises FileNotFoundError for rows of a piece that was never made."""
        found = []
        for row in rows.tolist():
            piece = self._open(row // self.piece)
            if piece is None:
                raise FileNotFoundError(f"{self._file(row // self.piece)} is missing or cut short: fill the store again")
            found.append(piece[row % self.piece])
        return np.stack(found)

    def _places(self, number: int) -> np.ndarray:
        return np.arange(number * self.piece, min((number + 1) * self.piece, self.rows))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"

    def _open(self, number: int) -> np.ndarray | None:
        if number not in self._maps:
            try:
                held = np.load(self._file(number), mmap_mode="r", allow_pickle=False)
            except (FileNotFoundError, ValueError, EOFError):  # not made yet, or cut short by a failing disk: made again
                return None
            if len(held) != len(self._places(number)):
                return None
            self._maps[number] = held
        return self._maps[number]
