"""The same tissue under several stains and scanners: how alike do its embeddings stay, and does one find the other?

As PLISM is used (owkin/plism-dataset, arXiv 2501.16239): for every pair of slides the mean cosine of registered tiles, and top-k
retrieval among the tiles of both; medians over pairs, by what differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from histoscale.data.fingerprint import content, contents
from histoscale.data.names import NamesError, fold, one_spelling, patient_key
from histoscale.eval.datasets.imagefiles import ImageFiles, common_side, measure
from histoscale.eval.datasets.labels import find_image, read_labels
from histoscale.eval.datasets.patches import USAGE_OF_OWN, DatasetError, LabelledPatches, hash_of
from histoscale.eval.knn import unit
from histoscale.eval.robustness.curves import cosine
from histoscale.eval.robustness.findings import Finding, RobustnessError
from histoscale.eval.scores.interval import IntervalConfig, Resampling

TABLE = "registered.csv"
COLUMNS = ("path", "tile_id", "scanner", "stain")
KEYS = {"scanner": fold, "stain": fold, "patient_id": patient_key}
DIFFER = ("scanner", "stain", "both")
SIMILARITIES = 1 << 25


@dataclass(frozen=True)
class RegisteredConfig:
    """top: of the retrieval. mpp: µm per pixel of the tiles, null where unknown."""

    top: list[int]
    mpp: float | None


@dataclass(frozen=True)
class RegisteredTiles:
    """patches: n images. conditions: int64 [n] into `slides`, (scanner, stain) of each. tiles: [n], ids. owners: [n], patients or
    else the tiles themselves, which `groups` names."""

    patches: LabelledPatches
    slides: tuple[tuple[str, str], ...]
    conditions: np.ndarray
    tiles: np.ndarray
    owners: np.ndarray
    groups: str


def open_registered(root: Path, config: RegisteredConfig, threads: int) -> RegisteredTiles:
    """registered.csv with path, tile_id, scanner, stain, and patient_id where known.

    Raises RobustnessError: a column is missing, an image is missing or leaves the folder, a tile stands twice under a scanner and
    stain, there are fewer than two slides, or two that share fewer than two tiles; DatasetError for a file that is no image.
    """
    path = root / TABLE
    if not path.is_file():
        raise RobustnessError(f"{root} holds no {TABLE}: expected one with the columns {', '.join(COLUMNS)}")
    content(path)
    try:
        table = read_labels(path, COLUMNS, ("patient_id",))
        rows = [row for _, row in table.rows]
        for name in ("scanner", "stain", "patient_id"):
            spelt, _ = one_spelling([row.get(name, "") for row in rows], f"names in the column {name}", KEYS[name])
            for row, value in zip(rows, spelt, strict=True):
                row[name] = value
    except (DatasetError, NamesError) as error:
        raise RobustnessError(str(error)) from error
    seen: set[tuple[str, str, str]] = set()
    for number, row in table.rows:
        place = (row["tile_id"], row["scanner"], row["stain"])
        try:
            row["path"] = find_image(root, row["path"]).as_posix()
        except DatasetError as error:
            raise RobustnessError(f"{path} line {number}: {error}") from error
        if not all(place) or place in seen:
            raise RobustnessError(
                f"{path} line {number}: tile {place[0]!r} of scanner {place[1]!r} and stain {place[2]!r} stands twice or lacks "
                "one of them: every tile must stand once under each"
            )
        seen.add(place)
    slides = sorted({(row["scanner"], row["stain"]) for row in rows})
    if len(slides) < 2:
        raise RobustnessError(f"{path} holds {len(slides)} combinations of scanner and stain: expected at least two to compare")
    conditions = np.array([slides.index((row["scanner"], row["stain"])) for row in rows])
    tiles = np.array([row["tile_id"] for row in rows])
    _check_shared(slides, conditions, tiles)
    known = all(row.get("patient_id") for row in rows)
    owners = np.array([row["patient_id"] for row in rows]) if known else tiles
    paths = [root / row["path"] for row in rows]
    sizes = measure(paths, threads)
    names = np.array([f"{scanner} / {stain}" for scanner, stain in slides])[conditions]
    patches = LabelledPatches(
        name=root.name, classes=("tile",), labels=np.zeros(len(rows), np.int64), roles=np.full(len(rows), "report"),
        patients=owners, sites=names, groups="patient" if known else "none", mpp=config.mpp, size_px=common_side(sizes),
        hash=hash_of("registered", *(row["path"] for row in rows), contents(paths)),
        read=ImageFiles(paths, sizes, threads), blocks=owners, slide_ids=names, usage=USAGE_OF_OWN,
    )  # fmt: skip
    return RegisteredTiles(patches, tuple(slides), conditions, tiles, owners, "patient" if known else "tile")


def _check_shared(slides: Sequence[tuple[str, str]], conditions: np.ndarray, tiles: np.ndarray) -> None:
    """Raises RobustnessError for two slides that share fewer than two tiles."""
    codes = np.unique(tiles, return_inverse=True)[1]
    has = np.zeros((len(slides), int(codes.max()) + 1), np.float32)
    has[conditions, codes] = 1
    shared = has @ has.T
    for a, b in combinations(range(len(slides)), 2):
        if shared[a, b] < 2:
            raise RobustnessError(
                f"the slides {' / '.join(slides[a])} and {' / '.join(slides[b])} share {shared[a, b]:.0f} tiles: expected at "
                "least two tile_ids that stand under both; add them, or leave one of the slides out"
            )


def counterpart_ranks(a: np.ndarray, b: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """Of the 2n stacked tiles a, b [n, D]: how many others are nearer by cosine than the counterpart, float64 [2n].

    A tie is half nearer: features that are all equal find nothing. Lengths are taken out in float32 first: in half precision
    norms above 256 overflow. The tile itself is left out by its place, whatever stands at rank 0.
    """
    x = unit(torch.from_numpy(np.concatenate([a, b]).astype(np.float32)).to(device))
    n = len(a)
    ranks = []
    for rows in torch.arange(2 * n, device=x.device).split(max(SIMILARITIES // (2 * n), 1)):
        similarity = x[rows] @ x.T
        own = similarity.gather(1, ((rows + n) % (2 * n))[:, None])
        similarity[torch.arange(len(rows), device=x.device), rows] = -torch.inf
        ties = (similarity == own).sum(1) - 1  # the counterpart is one
        ranks.append((similarity > own).sum(1).double().cpu() + ties.double().cpu() / 2)
    return torch.cat(ranks).numpy()


def compare(
    name: str,
    floor: bool,
    normalise: str,
    features: np.ndarray,
    held: RegisteredTiles,
    config: RegisteredConfig,
    interval: IntervalConfig,
    device: str = "cpu",
) -> list[Finding]:
    """Median cosine and median top-k over pairs of slides, all and by what differs; and PLISM's leaderboard where it is defined:
    the mean of four medians, each rounded to three decimals, of top-10 and of the cosine over all pairs.

    features: [n, D] of all rows. Pairs are of the tiles that both slides have.
    """
    draws = Resampling.of(held.owners, interval)
    owners = int(draws.codes.max()) + 1
    rows_of = [dict(zip(held.tiles[held.conditions == c].tolist(), np.flatnonzero(held.conditions == c).tolist(), strict=True))
               for c in range(len(held.slides))]  # fmt: skip
    differ, sums = [], []
    for a, b in combinations(range(len(held.slides)), 2):
        shared = sorted(rows_of[a].keys() & rows_of[b].keys())
        first, second = (np.array([rows_of[c][tile] for tile in shared]) for c in (a, b))
        ranks = counterpart_ranks(features[first], features[second], device).reshape(2, -1)
        values = [cosine(features[first], features[second]), *((ranks < k).mean(0) for k in config.top), np.ones(len(shared))]
        sums.append([np.bincount(draws.codes[first], weights=value, minlength=owners) for value in values])
        (scanner, stain), (other_scanner, other_stain) = held.slides[a], held.slides[b]
        differ.append(
            "both" if scanner != other_scanner and stain != other_stain else "scanner" if stain == other_stain else "stain"
        )
    table = np.array(sums, np.float32)  # pairs, values, owners
    kinds = np.array(differ)
    note = "" if held.groups == "patient" else "no patients are known: tiles are drawn as if independent, so it is too narrow"

    def find(measure: str, condition: str, of: Sequence[tuple[np.ndarray, int]], digits: int | None) -> Finding:
        """of: pairs (bool) and value of each median that is meaned."""
        parts = [np.stack([table[keep, place], table[keep, -1]], 1).reshape(-1, owners).T for keep, place in of]
        ends = np.cumsum([part.shape[1] for part in parts])[:-1]

        def value(totals: np.ndarray) -> np.ndarray:
            medians = []
            for part in np.split(totals, ends, axis=-1):
                with np.errstate(invalid="ignore", divide="ignore"):
                    medians.append(np.median(part[..., ::2] / part[..., 1::2], axis=-1))
            return np.mean([m if digits is None else m.round(digits) for m in medians], axis=0)

        pairs = int(np.any([keep for keep, _ in of], axis=0).sum())
        drawn = draws.interval(np.concatenate(parts, 1).astype(np.float64), value)
        return Finding(measure, name, normalise, condition, drawn, held.groups, floor, note=note, about={"slide_pairs": pairs})

    named = {"all": np.full(len(kinds), True)} | {kind: kinds == kind for kind in DIFFER if (kinds == kind).any()}
    measures = ("cosine", *(f"top-{k}" for k in config.top))
    found = [find(one, kind, [(keep, i)], None) for i, one in enumerate(measures) for kind, keep in named.items()]
    if 10 in config.top and len(named) == 1 + len(DIFFER):
        ten = 1 + config.top.index(10)
        found.append(find("leaderboard", "", [(named["all"], 0), *((named[kind], ten) for kind in DIFFER)], 3))
    return found
