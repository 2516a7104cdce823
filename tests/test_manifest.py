"""The manifest: what is read, and every bad row named in one error."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from histoscale.data.manifest import ManifestError, mpp_problem, parse_manifest, read_manifest
from histoscale.data.storage import Missing, Store


def write(folder: Path, text: str) -> str:
    path = folder / "slides.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_columns_labels_and_relative_uris(tmp_path: Path, store: Store) -> None:
    header = "\ufeffslide_id,uri,patient_id,mpp,objective,tumour,note"
    found = read_manifest(write(tmp_path, f"{header}\na,sub/a.svs,p1,0.25,40,1,\nb,/data/b.svs,,,,0,x y\n\n"), store)
    assert [s.slide_id for s in found] == ["a", "b"]
    assert found[0].uri == str(tmp_path / "sub/a.svs") and found[1].uri == "/data/b.svs"
    assert (found[0].mpp, found[0].objective, found[0].patient_id) == (0.25, 40.0, "p1")
    assert (found[1].mpp, found[1].patient_id) == (None, None)
    assert found[0].labels == {"tumour": "1"} and found[1].labels == {"tumour": "0", "note": "x y"}


def test_parquet_reads_the_same(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "slides.parquet"
    rows = {"slide_id": ["a", "b"], "uri": ["a.svs", "az://c/b.svs"], "mpp": [0.5, None], "tumour": [1, 0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    found = read_manifest(str(path), store)
    assert [(s.uri, s.mpp, s.labels) for s in found] == [
        (str(tmp_path / "a.svs"), 0.5, {"tumour": "1"}), ("az://c/b.svs", None, {"tumour": "0"}),
    ]  # fmt: skip


def test_all_bad_rows_stand_in_one_error(tmp_path: Path, store: Store) -> None:
    rows = ["slide_id,uri,mpp", "a,a.svs,", ",b.svs,", "c,,", "../d,d.svs,", "e,e.svs,fine", "a,f.svs,", "g,az://c/g.svs?sig=SECRET,",
            "h,ftq://h.svs,"]  # fmt: skip
    with pytest.raises(ManifestError) as caught:
        read_manifest(write(tmp_path, "\n".join(rows)), store)
    text = str(caught.value)
    for part in ("7 bad rows", "row 3 (no slide_id)", "row 4 (c): no uri", "row 5 (../d)", "row 6 (e): mpp is 'fine'",
                 "a stands in rows 2, 7", "row 8 (g)", "storage.options.az.sas_token", "unknown scheme 'ftq'"):  # fmt: skip
        assert part in text
    assert "SECRET" not in text


@pytest.mark.parametrize("row", [
    "https://a.blob/y.svs?sv=1&sig=SECRET,b,,x", "c/y.svs?sv=1&sig=SECRET,b,,x", "b,c/y.svs?sv=1&sig=SECRET,,x",
    "b,b.svs,c/m.png?sig=SECRET,x", "b,b.svs,,seen at https://h/y?sig=SECRET", "b,b.svs,,https://h/to?next=https://a/y?sig=SECRET",
    "b,b.svs,,AccountName=a;AccountKey=SECRET==", "b,b.svs,,see https://h/#access_token=SECRET",
])  # fmt: skip
def test_a_token_in_any_cell_is_refused_and_not_shown(tmp_path: Path, store: Store, row: str) -> None:
    with pytest.raises(ManifestError, match="row 3 .*holds a token or a key, .*: drop it") as caught:
        read_manifest(write(tmp_path, f"slide_id,uri,mask,note\na,a.svs,,https://h/x?page=2\n{row}\n"), store)
    assert "SECRET" not in str(caught.value) and "1 bad rows" in str(caught.value)


def test_a_token_in_the_name_of_a_column_is_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(ManifestError, match="the name of the column https://h/y.sig=... holds a token or a key") as caught:
        read_manifest(write(tmp_path, "slide_id,uri,https://h/y?sig=SECRET\na,a.svs,1\n"), store)
    assert "SECRET" not in str(caught.value)


def test_a_row_that_costs_its_slide_is_shown_without_what_may_be_secret(tmp_path: Path, store: Store) -> None:
    """Also of one that is too long to be shown whole."""
    ids = [f"password=SECRET{'x' * 300}", f"{'x' * 80} password='SECRET {'y' * 300}'",
           f"{'z' * 180} password='SECRET{'y' * 300}'"]  # fmt: skip
    text = "slide_id,uri\na,a.svs\n" + "".join(f"{name},b.svs\n" for name in ids)
    _, refused = parse_manifest(write(tmp_path, text), store)
    assert [one.row for one in refused] == [3, 4, 5] and "SECRET" not in str(refused) and "longer than 200" in refused[0].reason


def test_relative_uris_are_looked_at_where_they_lead(tmp_path: Path, store: Store) -> None:
    store.read = lambda uri: b"slide_id,uri\na,a.svs?x=SECRET\n"  # type: ignore[method-assign]
    with pytest.raises(ManifestError, match="has a query string") as caught:
        read_manifest("https://host/folder/m.csv", store)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", ".hidden", "a\tb", "x" * 201])
def test_ids_that_leave_their_folder_are_refused(tmp_path: Path, store: Store, name: str) -> None:
    path = tmp_path / "slides.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"slide_id": [name], "uri": ["a.svs"]}), path)
    with pytest.raises(ManifestError, match="file name"):
        read_manifest(str(path), store)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,uri\na,b\n", "lacks the column slide_id; it has name, uri"),
        ("slide_id,mpp\na,1\n", "lacks the column uri"),
        ("slide_id,uri\n", "no rows"),
        ("", "lacks the column slide_id and uri"),
        ("slide_id,uri\na,b,c\n", "rows 2 have more cells"),
        ("slide_id,uri,uri\na,b,c\n", "'uri' twice"),
    ],
)
def test_a_table_of_the_wrong_shape(tmp_path: Path, store: Store, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(tmp_path, text), store)


def test_no_table_at_all(tmp_path: Path, store: Store) -> None:
    with pytest.raises(Missing):
        read_manifest(str(tmp_path / "none.csv"), store)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(str(tmp_path / "binary.csv"), store)
    (tmp_path / "text.parquet").write_text("slide_id,uri")
    with pytest.raises(ManifestError, match="no Parquet"):
        read_manifest(str(tmp_path / "text.parquet"), store)


@pytest.mark.parametrize("mpp", [0.0, 1000.0, -0.5, float("nan"), 0.049, 20.1])
def test_absurd_mpp_is_named(mpp: float) -> None:
    assert "absurd mpp" in str(mpp_problem(mpp))


def test_plausible_mpp_passes() -> None:
    assert mpp_problem(0.05) is None and mpp_problem(20.0) is None and "no mpp" in str(mpp_problem(None))
