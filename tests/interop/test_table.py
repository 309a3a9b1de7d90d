"""The table of the documents: the newest record of a package and model on a machine is the one that is shown."""

import json
import sys

import pytest

from interop import table


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    table.PAGE.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    return table.PAGE


def line(ratio, package="darts", model="GRU"):
    spread = {"median": ratio, "min": ratio / 2, "max": ratio * 2}
    return json.dumps(
        {
            "package": package,
            "model": model,
            "shape": "4x3x2",
            "step_ms": {"plain": spread, "statefeed": spread},
            "step_ratio": spread,
            "losses": {"plain": 0.25, "statefeed": 0.25},
            "versions": {package: "1.0"},
            "cpu": "a processor",
        }
    )


def test_the_newest_record_of_each_model_is_a_row(page, tmp_path):
    (tmp_path / "m.jsonl").write_text("\n".join([line(1.0), line(3.0), line(2.0, model="LSTM")]) + "\n")
    table.write()
    rows = [text for text in page.read_text().splitlines() if text.startswith("| darts")]
    assert rows == [
        "| darts 1.0 | GRU | 4x3x2 | 3.0 | 3.00 (1.50 to 6.00) | 0.25, 0.25 | a processor |",
        "| darts 1.0 | LSTM | 4x3x2 | 2.0 | 2.00 (1.00 to 4.00) | 0.25, 0.25 | a processor |",
    ]
    assert page.read_text().startswith("above\n")
    assert page.read_text().endswith(f"\n{table.END}\nbelow\n")


def test_without_records_there_is_no_table(page):
    table.write()
    assert page.read_text() == f"above\n{table.BEGIN}\n{table.END}\nbelow\n"


def test_the_picture_shows_every_record_and_losses_that_differ(page, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "table", table)  # as the script imports it
    from interop import picture

    other = json.loads(line(2.0, model="LSTM")) | {"losses": {"plain": 0.25, "statefeed": 0.5}}
    records = [json.loads(line(1.5)), other]
    for record in records:
        record["threads"] = 1
        record["versions"]["torch"] = "2"
    (axes,) = picture.draw(records).axes
    assert [text.get_text() for text in axes.texts] == ["1.50x, same loss", "2.00x, loss 0.25, 0.5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["darts: GRU", "darts: LSTM"]
