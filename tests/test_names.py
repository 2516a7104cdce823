"""One name however it is written, and tables however they are saved."""

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from histoscale.data.delimited import TableError, read_delimited
from histoscale.data.manifest import ManifestError, read_manifest
from histoscale.data.names import (
    NamesError,
    codes,
    fold,
    is_missing,
    known,
    nearest,
    one_spelling,
    patient_key,
    same_value,
    site_key,
    slide_key,
    truth,
)
from histoscale.data.splits import SplitError, check_disjoint, groups
from histoscale.data.storage import Store


def rewritten(name: str, draw: random.Random) -> str:
    """The name in another case, with other blanks and in another form of Unicode."""
    text = draw.choice([str.upper, str.lower, str.title, str])(name)
    text = unicodedata.normalize(draw.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)  # full-width forms
    text = draw.choice([text, wide]).replace(" ", draw.choice([" ", "  ", "\u00a0", "\u2003"]))
    return draw.choice(["", " ", "\t", "\ufeff"]) + text + draw.choice(["", " ", "\u200b"])


@pytest.mark.parametrize("name", ["P3", "tumour tissue", "Hôpital Élysée", "Zürich", "a-1", "TCGA-AA-0001-01A", "007"])
def test_every_spelling_of_a_name_is_one(name: str) -> None:
    draw = random.Random(name)
    for _ in range(200):
        other = rewritten(name, draw)
        assert fold(other) == fold(name) == fold(fold(other))
        for key in (patient_key, site_key, slide_key):
            assert key(other) == key(name)


def test_names_that_differ_stay_apart() -> None:
    assert len({fold(name) for name in ("P3", "P30", "P-3", "P 3", "p_3", "tumour", "tumor")}) == 7
    with pytest.raises(NamesError, match="'P 3' and 'P3' differ by a blank inside alone"):
        one_spelling(["P3", "P 3", "P4"], "patients")


def test_the_spelling_that_most_have_stays_and_the_joined_are_told() -> None:
    chosen, said = one_spelling(["p3 ", "P3", "P3", "", "P4"], "patients")
    assert chosen == ["P3", "P3", "P3", "", "P4"]
    assert said == ["patients written in several ways are one each: 'P3', 'p3 ' as P3"]
    assert one_spelling(["b", "a", "b"], "classes") == (["b", "a", "b"], [])


def test_codes_follow_the_name_and_not_its_spelling() -> None:
    names = [f"P{i}" for i in (3, 1, 20, 1, 3)]
    draw = random.Random(0)
    assert codes(names).tolist() == [2, 0, 1, 0, 2]
    for _ in range(20):
        spelt = {name: rewritten(name, draw) for name in names}
        assert np.array_equal(codes([spelt[name] for name in names]), codes(names))


@pytest.mark.parametrize("text", ["", " ", "nan", "NaN", "NA", "N/A", "n/a ", "null", "NULL", " None", "NaT", "<NA>", "#N/A"])
def test_what_says_nothing_is_missing(text: str) -> None:
    assert is_missing(text) and known(text) == ""


@pytest.mark.parametrize("text", ["NAT", "nat", "none", "NONE", "Nat"])
def test_normal_adjacent_tissue_and_no_treatment_are_classes(text: str) -> None:
    """NaT and None are what pandas and Python write; in another case they are words that people write."""
    assert not is_missing(text) and known(f"{text} ") == text
    found = read_delimited(f"slide_id,tissue\ns1,{text}\ns2,None\ns3,NaT\n".encode(), "t.csv", ["slide_id"])
    assert [row["tissue"] for _, row in found.rows] == [text, "", ""]


def test_nancy_and_nadia_are_not_missing() -> None:
    assert [known(text) for text in ("Nancy ", "NA1", "nano", "0", "-", None)] == ["Nancy", "NA1", "nano", "0", "-", ""]


def test_values_that_mean_the_same() -> None:
    assert [truth(text) for text in ("True", "yes ", "1", "1.0", "FALSE", "No", "0.0", "2", "tumour")] == [
        True, True, True, True, False, False, False, None, None,
    ]  # fmt: skip
    assert same_value("1.0", "True") and same_value("no", "0") and same_value("Tumour ", "tumour") and same_value("3.0", "3")
    assert not same_value("1", "0") and not same_value("10", "1") and not same_value("3.5", "3")


def test_ids_lose_folders_and_suffixes() -> None:
    assert slide_key("slides/S1.SVS") == slide_key("D:\\scans\\s1.ome.tif") == slide_key("S1") == "s1"
    assert patient_key("7.0") == patient_key("7") != patient_key("70") and patient_key("tcga-aa-0001-01A") == "TCGA-AA-0001"
    assert nearest("S1", ["S1.svs", "S2.svs", "other"]) == "S1.svs" and nearest("S1", ["xyz"]) is None


ROWS = "slide_id,patient_id,note\na,P1,x y\nb,P2,\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_reads_the_same_however_it_is_saved(encoding: str, mark: str, end: str) -> None:
    text = ROWS.replace(",", mark).replace("\n", end)
    found = read_delimited(text.encode(encoding), "t.csv", ["slide_id"], ["patient_id"])
    assert found.columns == ["slide_id", "patient_id", "note"]
    assert found.rows == [
        (2, {"slide_id": "a", "patient_id": "P1", "note": "x y"}), (3, {"slide_id": "b", "patient_id": "P2", "note": ""}),
    ]  # fmt: skip


def test_columns_are_found_however_they_are_written() -> None:
    found = read_delimited(b"sep=;\nSlide ID;PATIENT-ID ;a,b\ns;NaN;c,d\nt\n", "t.csv", ["slide_id"], ["patient_id"])
    assert found.rows == [
        (3, {"slide_id": "s", "patient_id": "", "a,b": "c,d"}), (4, {"slide_id": "t", "patient_id": "", "a,b": ""}),
    ]  # fmt: skip
    for line in ("sep=\t", "sep=\t\r", "sep=\t \r"):  # as Excel writes it; the tab is no blank at its end
        found = read_delimited(f"{line}\nslide_id\turi\na\tb,c\n".encode(), "t.csv", ["slide_id", "uri"])
        assert found.columns == ["slide_id", "uri"] and found.rows == [(3, {"slide_id": "a", "uri": "b,c"})]
    for text, words in (
        ("slide,x\na,1\n", r"t.csv lacks the column slide_id; it has slide, x; is 'slide' meant to be slide_id\?"),
        ("slide_id,Slide ID\na,b\n", "'slide_id' twice"),
        ("slide_id\na,b\n", "rows 2 have more cells than the header"),
    ):
        with pytest.raises(TableError, match=words):
            read_delimited(text.encode(), "t.csv", ["slide_id"])
    with pytest.raises(TableError, match="neither|not UTF-8 text"):
        read_delimited("slide_id\nZürich\n".encode("latin-1"), "t.csv", ["slide_id"])


def test_manifests_have_one_spelling_of_patients_and_sites(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(
        "slide_id;uri;patient_id;site;tumour\n1;1.svs;P3;Zürich;1\n2;2.svs;p3 ;ZU\u0308RICH;NA\n3;3.svs;nan;N/A;0\n"
        "4;4.svs;P3;Zürich;1\n".encode("utf-16")
    )
    said: list[str] = []
    slides = read_manifest(str(path), store, said.append)
    assert [(s.patient_id, s.site) for s in slides] == [("P3", "Zürich"), ("P3", "Zürich"), (None, None), ("P3", "Zürich")]
    assert [s.labels for s in slides] == [{"tumour": "1"}, {}, {"tumour": "0"}, {"tumour": "1"}]
    assert len(said) == 2 and "'P3', 'p3' as P3" in said[0] and said[1].endswith("as Zürich")
    with pytest.raises(SplitError, match="1 of 4 slides have no patient_id"):
        groups(slides, "patient")
    path.write_text("slide_id,uri,patient_id\n1,1.svs,P 3\n2,2.svs,P3\n")
    with pytest.raises(ManifestError, match="differ by a blank inside alone"):
        read_manifest(str(path), store)


def test_no_spelling_hides_a_patient_in_two_parts() -> None:
    with pytest.raises(SplitError, match="P3 in test and train"):
        check_disjoint({"train": ["P3", "P4"], "test": ["p3 "]})
