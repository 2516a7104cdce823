"""The contact sheet: every slide small, with the outline of its tissue, because people look before they train."""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from scipy import ndimage

from histoscale.data.catalog import Catalog
from histoscale.data.parts import Rejected

_OUTLINE = (0, 122, 92)  # green stands out on pink and violet
_REASONS = 100  # rejected slides that are listed of each kind


@dataclass(frozen=True)
class Card:
    """One slide as it is shown. area: mm2 of tissue. share: of the slide's area. picture, outline: base64 JPEG and PNG."""

    slide_id: str
    patient: str
    site: str
    scanner: str
    organ: str
    stain: str
    mpp: float
    levels: str
    width_mm: float
    height_mm: float
    area: float
    share: float
    picture: str
    outline: str


def write_sheet(path: Path, catalog: Catalog, limit: int) -> None:
    """One HTML file that needs nothing else: at most `limit` slides, evenly spaced over the catalog, and why others were refused.

    All text is escaped. Pictures are the thumbnails that masks were made from; labels and macro images are never opened.
    """
    shown = np.unique(np.linspace(0, len(catalog) - 1, min(limit, len(catalog))).round().astype(int)).tolist()
    area = catalog.numbers("tissue_px") * catalog.numbers("mask_mpp") ** 2 / 1e6
    kinds: dict[str, list[Rejected]] = {}
    for found in catalog.rejected:
        kinds.setdefault(found.reason.split(":")[0], []).append(found)
    groups = Counter(
        (site or "no site", scanner or "no scanner", float(f"{mpp:.2g}"))
        for site, scanner, mpp in zip(catalog.texts("site"), catalog.texts("scanner"), catalog.numbers("mpp"), strict=True)
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("histoscale.data").joinpath("contact.html").read_text())
    page = template.render(
        catalog=catalog,
        cards=[_card(catalog, row, float(area[row])) for row in shown],
        facts={
            "slides": f"{len(catalog):,}",
            "patients": f"{len(set(catalog.texts('patient_id')) - {None}):,}",
            "sites": f"{len(set(catalog.texts('site')) - {None}):,}",
            "tissue": f"{area.sum() / 100:,.0f} cm²" if area.sum() >= 1000 else f"{area.sum():,.1f} mm²",
            "median tissue a slide": f"{np.median(area):,.1f} mm²" if len(area) else "none",
            "refused": f"{len(catalog.rejected):,}",
        },
        groups=groups.most_common(30),
        more_groups=max(0, len(groups) - 30),
        rejected=sorted(((kind, len(some), some[:_REASONS]) for kind, some in kinds.items()), key=lambda row: -row[1]),
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _card(catalog: Catalog, row: int, area: float) -> Card:
    slide, mpps = catalog.slides[row], catalog.level_mpps(row)
    width, height = (float(catalog.levels(name)[row, 0]) * mpps[0] / 1000 for name in ("width", "height"))
    jpeg = catalog.thumbnail(row)
    with Image.open(io.BytesIO(jpeg)) as image:
        outline = _outline(catalog.mask(row), image.size)
    return Card(
        slide.slide_id, slide.patient_id or "", slide.site or "", slide.scanner or "", slide.organ or "", slide.stain or "",
        mpps[0], ", ".join(f"{mpp:.3g}" for mpp in mpps), width, height, area, min(1.0, area / (width * height)),
        base64.b64encode(jpeg).decode(), base64.b64encode(outline).decode(),
    )  # fmt: skip


def _outline(mask: np.ndarray, size: tuple[int, int]) -> bytes:
    """The border of the tissue as a PNG of `size` (width, height) that is transparent elsewhere."""
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    line = ndimage.binary_dilation(small, iterations=2) & ~small
    image = Image.fromarray(line.astype(np.uint8), "P")
    image.putpalette([255, 255, 255, *_OUTLINE])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0, bits=1, optimize=True)
    return file.getvalue()
