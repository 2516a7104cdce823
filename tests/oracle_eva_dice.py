"""eva's own segmentation code as an oracle, in an environment of its own.

    uv venv EVA && uv pip install --python EVA/bin/python "kaiko-eva[vision]==0.4.5" jsonargparse==4.31.0
    ORACLE_EVA=EVA/bin/python pytest -s tests/oracle_eva_dice.py

eva runs in one other process, which is told of files with arrays and answers in files; this file holds both sides.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FLAG = "--answer"


def serve() -> None:
    """Runs under eva's Python, without this project: a folder a line, with a question in it."""
    import torch
    from eva.vision.data.datasets import CoNSeP, MoNuSAC
    from eva.vision.data.transforms.common import ResizeAndCrop
    from eva.vision.data.wsi.patching.samplers import GridSampler
    from eva.vision.losses import DiceLoss
    from eva.vision.metrics import MonaiDiceScore
    from eva.vision.models.networks.decoders.segmentation import ConvDecoderWithImage
    from eva.vision.models.networks.decoders.segmentation.typings import DecoderInputs
    from skimage import draw

    torch.set_num_threads(1)
    for line in sys.stdin:
        folder = Path(line.strip())
        given: dict[str, Any] = dict(np.load(folder / "question.npz"))
        said: dict[str, Any] = {}
        what = str(given.pop("what"))
        if what == "dice":
            labels, predicted, classes = (
                torch.from_numpy(given["labels"]),
                torch.from_numpy(given["predicted"]),
                int(given["classes"]),
            )
            ignore = int(given["ignore"]) if "ignore" in given else None
            for empty in (True, False):
                metric = MonaiDiceScore(num_classes=classes, include_background=False, ignore_index=ignore, ignore_empty=empty)
                for start in range(0, len(labels), 5):  # in unequal batches, as it is fed
                    metric.update(predicted[start : start + 5], labels[start : start + 5])
                said[f"dice_{empty}"] = metric.compute().numpy()
        if what == "loss":
            logits = torch.from_numpy(given["logits"]).requires_grad_()
            ignore = int(given["ignore"]) if "ignore" in given else None
            loss = DiceLoss(softmax=True, batch=True, ignore_index=ignore)(logits, torch.from_numpy(given["labels"]))
            loss.backward()
            said = {"loss": loss.detach().numpy(), "gradient": logits.grad.numpy()}
        if what == "decoder":
            tokens, rgb = torch.from_numpy(given["tokens"]), torch.from_numpy(given["rgb"])
            decoder = ConvDecoderWithImage(in_features=tokens.shape[1], num_classes=int(given["classes"]))
            own = decoder.state_dict()
            mine = [name for name in given if name.startswith("w/")]
            decoder.load_state_dict({new: torch.from_numpy(given[old]) for new, old in zip(own, mine, strict=True)})
            decoder.train()
            logits = decoder(DecoderInputs([tokens], tuple(rgb.shape[2:]), rgb))
            said = {"logits": logits.detach().numpy(), "count": sum(p.numel() for p in decoder.parameters())}
        if what == "polygon":
            mask = np.zeros((int(given["height"]), int(given["width"])), np.int64)
            rows, columns = draw.polygon(given["vertices"][:, 0], given["vertices"][:, 1], mask.T.shape)
            mask[columns, rows] = 1
            said["mask"] = mask
        if what == "consep":
            view = ResizeAndCrop(size=224, mean=[0, 0, 0], std=[1, 1, 1])
            data = CoNSeP(root=str(given["root"]), split="train", sampler=GridSampler(shuffle=False), transforms=view)
            data.configure()
            items = [data[i] for i in range(len(data))]
            said = {"pixels": np.stack([x.numpy() for x, _, _ in items]), "labels": np.stack([y.numpy() for _, y, _ in items])}
        if what == "monusac":
            view = ResizeAndCrop(size=224, mean=[0, 0, 0], std=[1, 1, 1])
            data = MoNuSAC(root=str(given["root"]), split="test", export_masks=False, transforms=view)
            items = [data[i] for i in range(len(data))]
            said = {
                "pixels": np.stack([item[0].numpy() for item in items]),
                "labels": np.stack([item[1].numpy() for item in items]),
            }
        np.savez(folder / "reply.npz", **said)
        print("answered", flush=True)


if FLAG in sys.argv:
    serve()
    sys.exit(0)


import mask_fixtures as fixtures  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from histoscale.eval.datasets.consep import open_consep  # noqa: E402
from histoscale.eval.datasets.monusac import open_monusac  # noqa: E402
from histoscale.eval.datasets.polygons import paint  # noqa: E402
from histoscale.eval.decoder import dice_loss, new_decoder  # noqa: E402
from histoscale.eval.mask_views import Cutter, score_views  # noqa: E402
from histoscale.eval.scores.overlap import confusions, monai_dice, overlap  # noqa: E402

PYTHON = os.environ.get("ORACLE_EVA", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ORACLE_EVA names no Python with kaiko-eva: see the first lines of this file")


Ask = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    folder = tmp_path_factory.mktemp("eva")
    with (folder / "stderr").open("w") as errors:
        eva = subprocess.Popen([PYTHON, __file__, FLAG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert eva.stdin is not None and eva.stdout is not None

        def question(**arrays: Any) -> dict[str, np.ndarray]:
            np.savez(folder / "question.npz", **arrays)
            print(folder, file=eva.stdin, flush=True)
            for line in eva.stdout or ():  # eva greets first
                if line.strip() == "answered":
                    return dict(np.load(folder / "reply.npz"))
            raise AssertionError((folder / "stderr").read_text()[-3000:])

        yield question
        eva.stdin.close()
        eva.wait(timeout=60)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ignore", [None, 5])
def test_dice_is_evas(ask: Ask, seed: int, ignore: int | None) -> None:
    rng = np.random.default_rng(seed)
    classes, n = (5 if ignore is None else 6), 23
    # Blocks of classes, a third of the images empty, a class that is rare, predictions that are often right.
    labels = rng.choice(classes, (n, 8, 8), p=[0.5, *np.full(classes - 1, 0.5 / (classes - 1))]).repeat(4, 1).repeat(4, 2)
    labels[::3] = 0
    labels[labels == 1] = np.where(rng.random((labels == 1).sum()) < 0.05, 1, 0)
    guess = rng.integers(
        0, classes if seed % 2 else 5, labels.shape
    )  # eva's decoder never says the ignored class: both are tried
    right = (rng.random(labels.shape) < 0.6) & (labels < 5)
    predicted = np.where(right, labels, guess)
    asked = {} if ignore is None else {"ignore": ignore}
    said = ask(what="dice", labels=labels, predicted=predicted, classes=classes, **asked)
    counts = overlap(confusions(torch.from_numpy(labels), torch.from_numpy(predicted), classes), ignore, "prediction")
    for empty in (True, False):
        mine = monai_dice(counts, drop_empty=empty)
        print(
            f"MonaiDice seed {seed} ignore {ignore} ignore_empty {empty}: ours {mine:.8f} eva {float(said[f'dice_{empty}']):.8f}"
        )
        assert abs(mine - said[f"dice_{empty}"]) < 1e-5


@pytest.mark.parametrize("ignore", [None, 5])
def test_loss_and_gradient_are_evas(ask: Ask, ignore: int | None) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 5, 20, 20)).astype(np.float32)
    labels = rng.integers(0, 5 if ignore is None else 6, (6, 20, 20))
    asked = {} if ignore is None else {"ignore": ignore}
    said = ask(what="loss", logits=logits, labels=labels, **asked)
    mine = torch.from_numpy(logits).requires_grad_()
    loss = dice_loss(mine, torch.from_numpy(labels), ignore, "prediction")
    loss.backward()
    assert mine.grad is not None
    assert abs(float(loss.detach()) - said["loss"]) < 1e-6
    np.testing.assert_allclose(mine.grad.numpy(), said["gradient"], atol=1e-8)


@pytest.mark.parametrize("side", [14, 16, 28])
def test_the_decoder_is_evas(ask: Ask, side: int) -> None:
    rng = np.random.default_rng(2)
    tokens, rgb = rng.normal(size=(2, 384, side, side)).astype(np.float32), rng.normal(size=(2, 3, 224, 224)).astype(np.float32)
    decoder = new_decoder(384, 5, 0, "test", 0).train()
    weights = {f"w/{name}": value.numpy() for name, value in decoder.state_dict().items()}
    said = ask(what="decoder", tokens=tokens, rgb=rgb, classes=5, **weights)
    mine = decoder(torch.from_numpy(tokens).flatten(2).transpose(1, 2), torch.from_numpy(rgb)).detach().numpy()
    print(f"decoder {side}: max difference {np.abs(mine - said['logits']).max():.2e}, {int(said['count'])} parameters")
    assert sum(p.numel() for p in decoder.parameters()) == said["count"]
    np.testing.assert_allclose(mine, said["logits"], atol=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_polygons_are_scikit_images(ask: Ask, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.uniform(-8, 58, (12, 2))  # crosses itself and leaves the image
    if seed % 3 == 1:
        vertices = np.rint(vertices)  # whole numbers: pixels on the outline
    if seed % 3 == 2:
        vertices = np.rint(vertices * 2) / 2
    said = ask(what="polygon", vertices=vertices, height=40, width=50)
    mine = np.zeros((40, 50), np.int64)
    paint(mine, vertices, 1)
    np.testing.assert_array_equal(mine, said["mask"])


def test_tiles_of_consep_are_evas(ask: Ask, tmp_path: Path) -> None:
    fixtures.write_consep(tmp_path / "data", train=2, test=1, side=500)
    said = ask(what="consep", root=str(tmp_path / "data"))
    masks = open_consep(tmp_path / "data", fixtures.CONSEP)
    views = score_views(masks)
    rows = np.flatnonzero(masks.roles[views.images] == "train")
    pixels, labels = Cutter(masks, 2).cut(views, rows, 224)
    np.testing.assert_array_equal(labels, said["labels"])
    np.testing.assert_array_equal(pixels, np.rint(said["pixels"] * 255).astype(np.uint8))


def test_images_of_monusac_are_evas(ask: Ask, tmp_path: Path) -> None:
    fixtures.write_monusac(tmp_path / "data")
    said = ask(what="monusac", root=str(tmp_path / "data"))
    masks = open_monusac(tmp_path / "data", fixtures.MONUSAC)
    views = score_views(masks)
    pixels, labels = Cutter(masks, 2).cut(views, masks.rows("report"), 224)
    np.testing.assert_array_equal(labels, said["labels"])
    np.testing.assert_array_equal(pixels, np.rint(said["pixels"] * 255).astype(np.uint8))
