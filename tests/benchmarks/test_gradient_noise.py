"""benchmarks/gradient_noise.py: a row a step; in the first one a picture noised anew has the quieter gradient."""

import gradient_noise
import pytest


def test_a_row_a_step_written_into_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- noise -->\nold\n<!-- /noise -->\nbelow\n")
    gradient_noise.main(gradient_noise.Options(num_inference_steps=5, samples=2, page=page))
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"above\n<!-- noise -->\n{printed}\n<!-- /noise -->\nbelow\n"
    head, _, *rows, half = printed.splitlines()
    assert head == "| step | sigma | sampled | noised anew | ratio |"
    cells = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [0, 1, 2, 3, 4]
    together = [cell.strip() for cell in half.strip("|").split("|")]
    assert together[:2] == ["0 to 2, a picture's mean gradient", ""]
    for sampled, renoised, ratio in (*(row[2:] for row in cells), [float(cell) for cell in together[2:]]):
        assert ratio == pytest.approx(renoised / sampled, rel=0.06)
    assert cells[0][4] < 0.7
