"""eva's own package as an oracle, where it is installed: see oracle_eva.py, which also measures larger sets."""

from pathlib import Path

import pytest

package = pytest.importorskip("eva", reason="kaiko-eva is not installed: see the first lines of oracle_eva.py")


@pytest.mark.slow
def test_scores_and_metrics_are_evas(tmp_path: Path) -> None:
    import oracle_eva

    found = oracle_eva.main(tmp_path, {"set": "tiny", "runs": "2", "workers": "0", "steps": "300"})
    assert abs(found["difference_of_means"]) < 0.03  # 300 rows
    assert all(abs(its - ours) < 1e-5 for its, ours in found["metrics"].values())
