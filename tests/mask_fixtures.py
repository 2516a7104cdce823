"""CoNSeP and MoNuSAC in their exact layouts, small, with synthetic nuclei whose truth is known."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from histoscale.eval.datasets.public import PublicConfig

CONSEP = PublicConfig("consep", "any", None)
TRAIN, TEST = "MoNuSAC_images_and_annotations", "MoNuSAC Testing Data and Annotations"
MONUSAC = PublicConfig("monusac", "any", None)


def nuclei(side: int, seed: int, types: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [side, side, 3], instances and types [side, side]: twelve discs of types 1 to `types`, darker by type."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    instances, kinds = np.zeros((side, side), np.int32), np.zeros((side, side), np.int32)
    for number in range(1, 13):
        cx, cy, radius = rng.integers(0, side, 2).tolist() + [int(rng.integers(side // 25, side // 12))]
        disc = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        instances[disc], kinds[disc] = number, 1 + number % types
    image = 230 - 22 * kinds[..., None] + rng.integers(0, 9, (side, side, 3))
    return image.astype(np.uint8), instances, kinds


def write_consep(root: Path, train: int = 3, test: int = 2, side: int = 260, older: bool = False) -> dict[str, np.ndarray]:
    """The layout under `root`; -> types [side, side] by image name."""
    truth = {}
    for part, count in (("Train", train), ("Test", test)):
        for folder in ("Images", "Labels", "Overlay"):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            name = f"{part.lower()}_{number}"
            image, instances, types = nuclei(side, seed=len(truth))
            Image.fromarray(image).save(root / part / "Images" / f"{name}.png")
            write_types(root / part / "Labels" / f"{name}.mat", instances, types, older)
            truth[name] = types
    return truth


def write_types(path: Path, instances: np.ndarray, types: np.ndarray, older: bool) -> None:
    numbers = np.unique(instances[instances > 0])
    centroids = [np.argwhere(instances == n).mean(axis=0)[::-1] for n in numbers]
    newer = {
        "inst_map": instances.astype(np.float64),
        "type_map": types.astype(np.float64),
        "inst_type": np.array([[types[instances == n].max()] for n in numbers], np.float64),
        "inst_centroid": np.array(centroids),
    }
    savemat(path, {"label": np.stack([instances, types], axis=-1)} if older else newer, do_compression=True)


Region = tuple[str, list[tuple[float, float]]]


def annotation(regions: list[Region]) -> str:
    """Aperio's XML, an Annotation a region."""
    parts = []
    for number, (name, vertices) in enumerate(regions, 1):
        corners = "".join(f'<Vertex X="{x}" Y="{y}" Z="0" />' for x, y in vertices)
        parts.append(
            f'<Annotation Id="{number}" Name="" ReadOnly="0" LineColor="65280" Visible="1" Selected="0"><Attributes>'
            f'<Attribute Name="{name}" Id="0" Value="" /></Attributes><Regions><RegionAttributeHeaders />'
            f'<Region Id="{number}" Type="0" Text="" NegativeROA="0"><Attributes /><Vertices>{corners}</Vertices></Region>'
            "</Regions><Plots />"
            "</Annotation>"
        )
    return f'<?xml version="1.0"?><Annotations MicronsPerPixel="0.250000">{"".join(parts)}</Annotations>'


def write_monusac_image(
    root: Path, part: str, slide: str, number: int, regions: list[Region], height: int = 60, width: int = 90, seed: int = 0
) -> Path:
    """One image and its XML; -> the path of the image."""
    folder = root / part / slide
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(120, 255, (height, width, 3), dtype=np.uint8)
    path = folder / f"{slide}_{number}.tif"
    Image.fromarray(pixels).save(path)
    path.with_suffix(".xml").write_text(annotation(regions))
    path.with_suffix(".svs").write_bytes(b"")  # beside it in the archive, never opened
    return path


def write_monusac(root: Path, train: int = 4, test: int = 3, height: int = 60, width: int = 90) -> None:
    """`train` and `test` patients, an image each, with a few outlines of every class; ambiguous zones in the test part."""
    names = ["Epithelial", "Lymphocyte", "Neutrophil", "Macrophage"]
    for part, count, first in ((TRAIN, train, 1000), (TEST, test, 5000)):
        for patient in range(count):
            rng = np.random.default_rng(first + patient)
            regions: list[Region] = []
            for number in range(8):
                cx, cy, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 9)
                angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
                outline = [(cx + radius * np.cos(a), cy + radius * np.sin(a)) for a in angles]
                regions.append((names[number % 4], [(round(float(x), 3), round(float(y), 3)) for x, y in outline]))
            if part == TEST:
                regions.append(("Ambiguous", [(1, 1), (1, 12), (14, 12), (14, 1)]))
            write_monusac_image(root, part, f"TCGA-AB-{first + patient}-01Z-00-DX1", 1, regions, height, width, seed=patient)
