"""benchmarks/gradient_noise.py: a row a step; in the first one a picture noised anew has the quieter gradient."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gradient_noise

    return gradient_noise


def test_a_row_a_step_written_into_the_page(script, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- noise -->\nold\n<!-- /noise -->\nbelow\n")
    script.main(script.Options(num_inference_steps=5, samples=2, page=page))
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"above\n<!-- noise -->\n{printed}\n<!-- /noise -->\nbelow\n"
    head, _, *rows = printed.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "step",
        "t",
        "sigma",
        "sampled",
        "noised anew",
        "ratio",
    ]
    cells = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [[0, 801], [1, 601], [2, 401], [3, 201], [4, 1]]
    for row in cells:
        assert row[5] == pytest.approx(row[4] / row[3], rel=0.06)
    assert cells[0][5] < 0.7
