"""The notebook docs/tour.ipynb runs, and still finds what its committed outputs show."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = Path(__file__).parent.parent / "docs" / "tour.ipynb"
ENOUGH = 6   # of eight images; other chips round differently


def printed(notebook):
    """Return the text that each code cell prints or shows last, and whether it shows a picture."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [("".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell),
             any("image/png" in output.get("data", {}) for output in cell)) for cell in outputs]


def identified(notebook):
    """Return the table of the last cell: the images identified by the run and what the attacker sees."""
    rows = (line.split() for line in printed(notebook)[-1][0].splitlines())
    return {(row[1], row[2]): int(row[3]) for row in rows if len(row) > 4 and row[0].isdigit()}


@pytest.mark.slow
def test_the_tour_finds_what_it_shows(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")   # other tests run beside it
    committed = nbformat.read(PAGE, as_version=4)
    again = nbformat.read(PAGE, as_version=4)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(again, timeout=900, resources={"metadata": {"path": str(PAGE.parent)}}).execute()
    for before, now in zip(printed(committed), printed(again), strict=True):
        assert bool(before[0]) == bool(now[0]) and before[1] == now[1]
    for notebook in (committed, again):
        count = identified(notebook)
        assert len(count) == 6
        assert count.pop(("class_prior", "z")) <= 8 - ENOUGH and count.pop(("rve_pfl", "gradient")) <= 8 - ENOUGH
        assert all(number >= ENOUGH for number in count.values())
