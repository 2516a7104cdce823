"""What each kind of input of a command consists of, so that a result is known by all the bytes that it came from."""

from collections.abc import Iterable
from pathlib import Path

from histoscale.data.catalog import open_catalog
from histoscale.data.fingerprint import bytes_of, content, contents, note_slides, told
from histoscale.data.storage import Store, is_remote
from histoscale.eval.architecture import is_release
from histoscale.eval.hub import model_folder
from histoscale.pretrain.checkpoint import read_checkpoint
from histoscale.pretrain.start import is_checkpoint, weight_files

_TOLD = ("config.json", "MODEL.json", "preprocessor_config.json")  # of a release


def read_encoder(spec: str, store: Store) -> None:
    """Notes the files behind an encoder: of a release, a model of transformers, a checkpoint. The weights of `timm:` and of names
    of the hub have no place of their own: the encoder's hash stands for them."""
    untrained = spec.startswith("random:")
    spec = spec.removeprefix("random:")
    for library in ("hf:", "hf-hub:"):
        if spec.startswith(library):
            folder = model_folder(spec.removeprefix(library))
            weights = [] if untrained else sorted(folder.glob("*.safetensors"))
            contents([*sorted(folder.glob("*.json")), *weights])
            return
    if "://" not in spec and not Path(spec).expanduser().is_dir():
        if not is_remote(spec) and Path(spec).expanduser().is_file():
            content(Path(spec).expanduser())
        return
    if is_release(spec, store):
        for name in (*_TOLD, *(() if untrained else ("model.safetensors",))):
            if store.exists(f"{spec}/{name}"):
                bytes_of(f"{spec}/{name}", store)
    elif not is_remote(spec):
        state = read_checkpoint(Path(spec).expanduser())
        told(state.path / "state.json", state.identity)


def read_start(spec: str) -> str:
    """What names the weights that `start.weights` takes: all that a checkpoint says, else the bytes of the files that are read;
    notes them. Raises StartError, CheckpointError, OSError."""
    if not is_checkpoint(spec):
        return " ".join(contents(weight_files(spec)))
    state = read_checkpoint(spec)
    told(state.path / "state.json", state.identity)
    return state.identity


def read_catalog(uri: str, store: Store, rows: Iterable[str] = ()) -> str:
    """What names a catalog's content, to the last byte; notes the files of some of its slides, which `rows` names by id.

    Raises CatalogError, Missing, StorageError.
    """
    catalog = open_catalog(uri, store)
    place = {slide_id: i for i, slide_id in enumerate(catalog.slide_ids)}
    uris = catalog.texts("uri")
    note_slides(sorted({str(uris[place[slide_id]]) for slide_id in rows if slide_id in place}), store)
    return catalog.content()
