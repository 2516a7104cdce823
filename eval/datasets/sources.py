"""Where public sets come from: files, checksums, licences.

Checksums are those of kaiko-ai/eva's data set classes. Bounds of unpacked sizes follow from the numbers and sizes of the images.
"""

from dataclasses import dataclass

_HEADER = 4096  # bytes of a TIFF beside its pixels, at most
_SLACK = 1 << 20  # bytes of an HDF5 file or a table beside its rows, at most
_TABLE_ROW = 128  # bytes of a row of PCam's table, at most


@dataclass(frozen=True)
class Source:
    """One file at its publisher.

    name: of the file there. kind: `file`, `gz` or `zip`. makes: what is left of it in data_root: a file, or the folder of a zip.
    md5: of `name` (null where none is known); makes_md5: of `makes`. most_bytes: more than that in data_root is refused.
    """

    name: str
    kind: str
    makes: str
    md5: str | None
    makes_md5: str | None
    most_bytes: int


@dataclass(frozen=True)
class Origin:
    """licence: of the set. base: the URL that its files stand below, "" where nothing is fetched. how: what to do instead."""

    licence: str
    base: str
    files: tuple[Source, ...]
    how: str


def _tiles(name: str, md5: str | None, images: int) -> Source:
    return Source(f"{name}.zip", "zip", name, md5, None, images * (224 * 224 * 3 + _HEADER))


def _pcam(split: str, tiles: int, x_md5: str, y_md5: str) -> tuple[Source, ...]:
    stem = f"camelyonpatch_level_2_split_{split}"
    return (
        Source(f"{stem}_x.h5.gz", "gz", f"{stem}_x.h5", None, x_md5, tiles * 96 * 96 * 3 * 101 // 100 + _SLACK),
        Source(f"{stem}_y.h5.gz", "gz", f"{stem}_y.h5", None, y_md5, tiles + _SLACK),
        Source(f"{stem}_meta.csv", "file", f"{stem}_meta.csv", None, None, tiles * _TABLE_ROW + _SLACK),
    )


_CRC, _PCAM = "https://zenodo.org/records/1214456/files", "https://zenodo.org/records/2546921/files"
_CRC_REPORT = _tiles("CRC-VAL-HE-7K", "2fd1651b4f94ebd818ebf90ad2b6ce06", 7_180)
_PCAM_FILES = (
    *_pcam("train", 262_144, "01844da899645b4d6f84946d417ba453", "0781386bf6c2fb62d58ff18891466aca"),
    *_pcam("valid", 32_768, "81cf9680f1724c40673f10dc88e909b1", "94d8aacc249253159ce2a2e78a86e658"),
    *_pcam("test", 32_768, "2614b2e6717d6356be141d9d6dbfcb7e", "11ed647efe9fe457a4eb45df1dba19ba"),
)
ORIGINS = {
    "crc": Origin("CC BY 4.0", _CRC, (_tiles("NCT-CRC-HE-100K", "035777cf327776a71a05c95da6d6325f", 100_000), _CRC_REPORT), ""),
    "crc_nonorm": Origin("CC BY 4.0", _CRC, (_tiles("NCT-CRC-HE-100K-NONORM", None, 100_000), _CRC_REPORT), ""),
    "pcam": Origin("CC0", _PCAM, _PCAM_FILES, ""),
    "pcam_10shot": Origin("CC0", _PCAM, _PCAM_FILES, ""),
    "bach": Origin("CC BY-NC-ND 4.0", "", (), "get ICIAR2018_BACH_Challenge.zip from Zenodo record 3632035 and unpack it there"),
    "mhist": Origin("research agreement", "", (), "sign the agreement at bmirds.github.io/MHIST, then unpack images/ and "
                    "annotations.csv into mhist/ there"),
    "bracs": Origin("CC BY-NC 4.0", "", (), "get BRACS_RoI from its authors' site by hand and unpack it there"),
    "breakhis": Origin("CC BY 4.0", "", (), "no archive with a checksum is known here: get BreaKHis_v1 from its authors' site "
                       "and unpack it there"),
    "gleason": Origin("CC0", "", (), "get the images from Harvard Dataverse OCYCMP and cut them with create_patches.py of "
                      "eiriniar/gleason_CNN there"),
    "consep": Origin("unsettled", "", (), "its origin has been behind a login since 2023: unpack your copy into consep/ there"),
    "monusac": Origin("CC BY-NC-SA 4.0", "", (), "get both archives from monusac-2020.grand-challenge.org and unpack them there"),
    "tp53": Origin("GDC open access", "", (), "it is made from TCGA's diagnostic slides, which the GDC gives out"),
    "hest": Origin("CC BY-NC-SA 4.0", "", (), "get HEST-Bench from its authors (mahmoodlab/HEST says where) and put it there"),
}  # fmt: skip
