"""statefeed report: what it reads, that its page is whole and needs nothing, and what a browser makes of it."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from statefeed.lm import cli, config
from statefeed.lm.compare import figures, measurements, results, sources
from statefeed.lm.compare.page import page as write_page
from statefeed.lm.compare.results import Result, from_line, to_line
from statefeed.lm.compare.run_result import read_run
from statefeed.lm.compare.sources import read
from statefeed.lm.compare.tasks import tasks
from statefeed.lm.config import Config

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ENDS = {"bptt": 136.0, "ft-bptt": 149.0, "dsf": 140.0}


def result(
    rule: str, seed: int = 1, cell: str = "gru", layers: int = 1, width: int = 256, scale: float = 1.0
) -> Result:
    """A run of four evaluations that comes down to scale times what its rule ends with."""
    model = config.Model(cell=cell, layers=layers, width=width, feedback=rule)  # type: ignore[arg-type]
    recipe = Config(model=model, train=config.Train(seed=seed, epochs=2))
    end = scale * ENDS[rule] + seed - 1
    return Result(
        config=dataclasses.asdict(recipe),
        metadata={"corpus": "ptb & <more>", "parameters": 1000, "torch": "2", "threads": 1, "machine": "m"},
        outcome="finished",
        valid=[
            {"step": 10 * k, "epochs": k / 2, "seconds": 3.0 * k, "perplexity": end * factor}
            for k, factor in enumerate((1.6, 1.3, 1.1, 1.0), 1)
        ],
        alignment=[] if rule == "bptt" else [{"step": 10, "epochs": 0.5, "cosine": 0.7, "norm_ratio": 1.1}],
        ms={"data": 1.0, "forward": 10.0, "backward": 20.0 + seed, "optimizer": 2.0},
        tokens_per_s=1000.0,
        peak_bytes=2.0**30,
        test=None,
    )


@pytest.fixture(scope="module")
def compared() -> list[Result]:
    """Three rules, two seeds, over widths, depths and cells."""
    shapes = [("gru", 1, 256, 1.0), ("gru", 1, 512, 0.9), ("gru", 3, 256, 0.8), ("lstm", 1, 256, 0.95)]
    return [
        result(rule, seed, cell, layers, width, scale)
        for cell, layers, width, scale in shapes
        for rule in ENDS
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def benchmarks() -> list[dict[str, object]]:
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    common = {"bench": "layers", "cell": "gru", "T": 64, "command": "statefeed bench layers", "dirty": True}
    common |= {"commit": "0123456789abcdef", "machine": {"cpu": "a CPU", "gpu": None}, "threads": 2}
    return [
        {**common, "implementation": "torch.nn", "variant": "as shipped", "ms": spread},
        {**common, "implementation": "statefeed", "variant": "dsf", "ms": {**spread, "median": 1.5}},
    ]


@pytest.fixture(scope="module")
def page(
    compared: list[Result], benchmarks: list[dict[str, object]], run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page of a comparison, a run folder and a benchmark, made by the command."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "rules").mkdir()
    (folder / "rules" / "compare.jsonl").write_text("".join(map(results.to_line, compared)))
    (folder / "layers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in benchmarks))
    output = folder / "report.html"
    arguments = ["report", str(folder / "rules"), str(run), str(folder / "layers.jsonl"), "-o", str(output)]
    assert cli.main([*arguments, f"--figures={folder / 'figures'}"]) == 0
    return output


# What it reads -------------------------------------------------------------------------------------------------------


def test_it_reads_runs_comparisons_and_benchmarks_in_nested_folders(page: Path, run: Path, tmp_path: Path) -> None:
    everything = read([page.parent])
    assert (len(everything.results), len(everything.benchmarks)) == (24, 2)
    (alone,) = read([run]).results
    assert (alone.rule, alone.outcome, alone.metadata["corpus"]) == ("bptt", "finished", "story.txt")
    shutil.copytree(run, tmp_path / "runs" / "one")
    shutil.copytree(run, tmp_path / "runs" / "copy")
    assert len(read([tmp_path]).results) == 1
    metrics = tmp_path / "runs" / "copy" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"backward_ms": ', '"backward_ms": 1'))  # another, and slower
    assert len(read([tmp_path]).results) == 2


def test_runs_are_written_as_records(run: Path, compared: list[Result], tmp_path: Path) -> None:
    (tmp_path / "compare.jsonl").write_text("".join(map(results.to_line, compared)))
    arguments = ["report", str(run), str(tmp_path / "compare.jsonl"), "-o", str(tmp_path / "report.html")]
    assert cli.main([*arguments, f"--records={tmp_path / 'all.jsonl'}"]) == 0
    assert read([tmp_path / "all.jsonl"]).results == [read_run(run), *compared]
    for name in ("all.jsonl", "compare.jsonl", "new.txt", "nowhere/new.jsonl"):  # and no record is replaced
        before = {path: path.read_text() for path in tmp_path.glob("*.jsonl")}
        assert cli.main([*arguments, f"--records={tmp_path / name}"]) == 2
        assert {path: path.read_text() for path in tmp_path.glob("*.jsonl")} == before


def test_a_result_is_equal_after_writing_and_reading(compared: list[Result]) -> None:
    assert [from_line(to_line(one)) for one in compared] == compared


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (None, "there is no file or folder"),
        ({"notes.txt": "x"}, "holds no run, no compare.jsonl and no records of a benchmark"),
        (
            {"a.jsonl": "{}\n"},
            "a.jsonl is no record of a comparison or a benchmark, one JSON object a line: config must",
        ),
        ({"a.jsonl": "no json\n"}, "is no record"),
        ({"a.jsonl": "caf\udce9\n"}, "a.jsonl is not UTF-8 text"),
        ({"metrics.jsonl": ""}, "is not a run folder"),
    ],
)
def test_a_user_error_raises_one_sentence(
    made: dict[str, str] | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    if made is not None:
        folder.mkdir()
        for name, text in made.items():
            (folder / name).write_text(text, errors="surrogateescape")
    assert cli.main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_no_page_is_written_if_figures_cannot_be_saved(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, taken = tmp_path / "report.html", tmp_path / "taken"
    taken.write_text("mine")
    assert cli.main(["report", str(run), "-o", str(page), f"--figures={taken}"]) == 2
    assert capsys.readouterr().err == f"statefeed: --figures must name a folder, got {taken}\n"
    assert not page.exists()


GOOD = {"bench": "layers", "machine": {"cpu": "a CPU"}, "ms": {"median": 2, "min": 1, "max": 3}}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("bench", "it must be an object, got 'bench'"),
        (["bench"], "it must be an object, got ['bench']"),
        ({"bench": [1]}, "bench must be text, got [1]"),
        ({**GOOD, "ms": 3}, "ms must be an object, got 3"),
        ({**GOOD, "ms": {"median": 1}}, "ms.min must be a number, got None"),
        ({**GOOD, "ms": {"median": 4, "min": 1, "max": 3}}, "ms must have its median between min and max, got {"),
        ({**GOOD, "machine": "m"}, "machine must be an object, got 'm'"),
        ({**GOOD, "command": ["x"]}, "command must be text, got ['x']"),
        ({"config": 3}, "config must be an object, got 3"),
        ({"metadata": 3}, "metadata must be an object, got 3"),
        ({"version": 4}, "version must be at most 3, got 4 of a newer statefeed"),
        ({"version": "x"}, "version must be a whole number, got 'x'"),
        ({"metadata": {}}, "metadata.parameters must be a whole number, got None"),
        ({"valid": [{}]}, "valid[0].step must be a whole number, got None"),
        (
            {"valid": [{"step": 1, "epochs": 1, "seconds": 1, "perplexity": float("nan")}]},
            "valid[0].perplexity must be finite, got nan",
        ),
        ({"config": {"train": {"lr": "fast"}}}, "train.lr must be a number, got 'fast'"),
        ({"config": {"model": {"feedback": "nothing"}}}, "feedback must be"),
    ],
)
def test_an_invalid_record_is_reported_with_its_file_and_line(
    record: object, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    good = json.loads(to_line(result("dsf")))
    if isinstance(record, dict) and "bench" not in record:
        record = {**good, **record}
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, GOOD, record)))
    assert cli.main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"statefeed: line 3 of {path} is no record of a comparison or a benchmark, one JSON object a "
    )
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, GOOD)))
    assert cli.main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.jsonl", '{"a": 1}\n', "line 1 of {path} is no row of a run's metrics: split must be text, got None"),
        ("metrics.jsonl", "[]\n", "line 1 of {path} is no row of a run's metrics: it must be an object, got []"),
        ("metrics.jsonl", '{"split": "foo", "step": 1}\n', "split must be train, valid, test, alignment, got 'foo'"),
        ("metrics.jsonl", '{"split": "valid", "step": "x"}\n', "step must be a whole number, got 'x'"),
        ("metrics.jsonl", "{\n", "line 1 of {path} is no row of a run's metrics: Expecting"),
        ("record.json", "[]", "{path} cannot be read: it must be an object, got []"),
        ("record.json", "{}", "{path} cannot be read: splits must be an object, got None"),
        (
            "record.json",
            '{"splits": {"train": {"sha256": ""}}, "parameters": 1, "steps_per_epoch": "x"}',
            "steps_per_epoch must be a whole number, got 'x'",
        ),
    ],
)
def test_a_damaged_run_is_reported_with_its_file(
    name: str, content: str, sentence: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / name).write_text(content)
    assert cli.main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert sentence.format(path=folder / name) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_gradient_without_a_direction_is_no_damage(tmp_path: Path) -> None:
    """The cosine with a gradient that is zero is NaN."""
    one = result("dsf")
    one.alignment[0]["cosine"] = float("nan")
    (tmp_path / "compare.jsonl").write_text(to_line(one))
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 0


def test_a_run_that_was_killed_within_a_row_is_reported_without_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    assert read_run(folder) == read_run(run)


# The page ------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Every tag with its attributes, and whether all that were opened are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_its_ids_are_unique(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.open == []
    places = [a.get(k) or "" for _, a in reader.tags for k in ("src", "href", "xlink:href") if k in a]
    assert places
    assert all(place.startswith(("#", "data:")) for place in places)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    names = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(names) == len(set(names))
    assert {place[1:] for place in places if place[0] == "#"} <= set(names)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(names)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags


def test_the_page_has_every_task_and_benchmark(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "ptb &amp; &lt;more&gt;, gru 1x256 plain, 2 epochs",
        "ptb &amp; &lt;more&gt;, gru 1x512 plain, 2 epochs",
        "ptb &amp; &lt;more&gt;, gru 3x256 plain, 2 epochs",
        "ptb &amp; &lt;more&gt;, lstm 1x256 plain, 2 epochs",
        "story.txt, gru 2x16 plain, 12 steps",
        "ptb &amp; &lt;more&gt;, 2 epochs, models of 1,000 parameters, within 5%",
        "Over sizes and cells",
        "statefeed bench layers",
    ]
    # dsf, two seeds: 140 and 141, 140.5 on average, 0.5 * sqrt(2) apart from it.
    assert "<td>140.50 ± 0.71</td>" in text
    assert "2 (1 to 3)" in text
    assert "a CPU, 2 threads" in text
    assert "commit 0123456789 and changes" in text


def test_figures_are_those_of_the_paper(page: Path, compared: list[Result]) -> None:
    drawn = figures.draw(compared)
    forms = {title.rpartition(": ")[2] for title in drawn}
    assert forms == {
        "perplexity against epoch",
        "alignment with BPTT",
        "perplexity against width",
        "perplexity against depth",
        "perplexity by cell",
    }
    files = list((page.parent / "figures").iterdir())
    assert len(files) >= len(drawn)
    assert all(path.read_text(encoding="utf-8").startswith("<svg") for path in files)
    again = {title: figures.svg(figure) for title, figure in figures.draw(compared).items()}
    assert again == {title: figures.svg(figure) for title, figure in drawn.items()}


def test_a_figure_with_a_time_needs_one_that_was_measured_in_turns(compared: list[Result]) -> None:
    first = next(iter(tasks(compared).values()))
    times = {(measurements.step_key(first[0]), "m, 1 thread"): {"dsf": 500.0, "bptt": 2000.0}}
    timed = {title: figure for title, figure in figures.draw(compared, times).items() if "m, 1 thread" in title}
    assert {title.rpartition(": ")[2] for title in timed} == {
        "perplexity against time, m, 1 thread",
        "speed against quality, m, 1 thread",
    }
    time, speed = timed.values()
    lines = {line.get_label(): line for line in time.axes[0].lines}
    assert set(lines) == {"dsf", "bptt"}
    assert list(lines["dsf"].get_xdata()) == [5.0, 10.0, 15.0, 20.0]  # not the 3 s to 12 s of the run
    assert list(lines["bptt"].get_xdata()) == [20.0, 40.0, 60.0, 80.0]
    points = {line.get_label(): line.get_xydata().tolist() for line in speed.axes[0].lines}
    assert points["dsf"] == [[500.0, pytest.approx(140.5)]]
    elsewhere = {(measurements.step_key(first[0]), "m, 2 threads"): {"dsf": 500.0, "bptt": 2000.0}}
    assert figures.draw(compared, elsewhere).keys() == figures.draw(compared).keys()


def test_the_axis_shows_how_rules_differ_and_names_what_it_leaves_out(compared: list[Result]) -> None:
    first = list(next(iter(tasks(compared).values())))
    figure = figures.plot_vs_epochs(first)
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert low < 136 < 149.5 < high < 170
    far = dataclasses.replace(first[0], valid=[{**row, "perplexity": 900.0} for row in first[0].valid])
    far = dataclasses.replace(far, config={**far.config, "model": {**far.config["model"], "feedback": "gate"}})
    figure = figures.plot_vs_epochs([*first, far])
    assert figure is not None
    assert figure.axes[0].get_ylim() == (low, high)
    assert figure.axes[0].get_legend_handles_labels()[1][-1] == "gate (off the scale)"


def test_every_figure_names_machine_and_threads_and_explains_its_spread(compared: list[Result]) -> None:
    times = {(measurements.step_key(compared[0]), "m, 1 thread"): {"dsf": 500.0, "bptt": 2000.0}}
    for title, figure in figures.draw(compared, times).items():
        caption = figure.get_suptitle().replace("\n", " ")
        assert "m, 1 thread" in caption
        assert re.search("mean over the (seeds|pairs)", caption) or "timed in turns" in caption
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes), title
        assert figure.legends or figure.axes[0].get_legend() or title.endswith(": difference")  # whose rows name rules


def test_what_is_drawn_is_what_was_measured(compared: list[Result]) -> None:
    same = next(iter(tasks(compared).values()))
    lines = {line.get_label(): line for line in figures.plot_vs_epochs(same).axes[0].lines}  # type: ignore[union-attr]
    assert list(lines["dsf"].get_xdata()) == [0.5, 1.0, 1.5, 2.0]
    assert list(lines["dsf"].get_ydata()) == pytest.approx([140.5 * factor for factor in (1.6, 1.3, 1.1, 1.0)])
    width = figures.plot_by(compared, "model.width", "perplexity against width")
    (axes,) = next(iter(width.values())).axes
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert points["bptt"] == [pytest.approx([256, 136.5]), pytest.approx([512, 0.9 * 136 + 0.5])]
    (cells,) = (figure.axes[0] for figure in figures.by_cell(compared).values())
    heights = [float(height) for container in cells.containers for height in container.lines[0].get_ydata()]
    assert sorted(heights) == pytest.approx(
        sorted([e + 0.5 for e in ENDS.values()] + [0.95 * e + 0.5 for e in ENDS.values()])
    )


def test_every_rule_has_its_own_style_in_every_figure() -> None:
    """Of twenty rules one has no time of a step and some are exact, so that the figures do not show the same ones."""
    made = [result("dsf", width=width) for width in (256, 512) for _ in range(20)]
    compared = []
    for k, one in enumerate(made):
        config = {**one.config, "model": {**one.config["model"], "feedback": 0.05 * (k % 20) or "bptt"}}
        more = {"alignment": []} if k % 20 % 3 == 0 else {}
        compared.append(dataclasses.replace(one, config=config, **more))
    first = next(iter(tasks(compared).values()))
    ms = {one.rule: 1.0 + k for k, one in enumerate(first) if k % 20 != 1}
    drawn = [figures.plot_vs_epochs(first), figures.frontier(first, ms, "m"), figures.alignment(first)]
    shown: list[dict[str, tuple[object, ...]]] = []
    for figure in drawn:
        assert figure is not None
        lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
        shown.append({str(line.get_label()): (line.get_color(), line.get_marker()) for line in lines})
        assert len(set(shown[-1].values())) == len(lines)
        assert figure.legends  # below the panel
        assert figure.axes[0].get_legend() is None
    chosen = figures.styles(one.rule for one in first).values()
    assert len({(style.line, style.marker) for style in chosen}) == 20  # to be read without the colors
    assert [len(chosen) for chosen in shown] == [20, 19, 13]
    assert all(style[rule] == shown[0][rule] for style in shown[1:] for rule in style)
    assert not drawn[1].axes[0].texts  # type: ignore[union-attr]
    (wide,) = figures.plot_by(compared, "model.width", "perplexity against width").values()
    bars = {str(c.get_label()): c.lines[0] for c in wide.axes[0].containers}
    assert len({(line.get_color(), line.get_marker()) for line in bars.values()}) == 20


# A browser -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(page: Path, width: int, tmp_path: Path) -> None:
    """In a frame as wide as a phone's screen or a desk's, since no window of Chromium is narrower than 500."""
    window = f"--window-size={max(width, 500)},1500"
    found = measured(
        page.read_text(encoding="utf-8"),
        "(boxes => [innerWidth, document.documentElement.scrollWidth, Math.max(...boxes.map(b => b.right)),"
        "Math.min(...boxes.map(b => b.width)), boxes.length])"
        "([...document.querySelectorAll('figure svg, .table, p, h1, h2')].map(part => part.getBoundingClientRect()))",
        width,
        tmp_path,
    )
    inner, wide, right, narrowest, boxes = found
    assert inner == width
    assert wide <= width
    assert right <= width
    assert narrowest > 300
    assert boxes > 40
    picture = tmp_path / "page.png"
    browse(tmp_path / "frame.html", tmp_path, window, f"--screenshot={picture}")
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (max(width, 500), 1500)
    assert picture.stat().st_size > 20_000  # and not an empty sheet


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to look at the page with")
def test_a_phone_shows_the_perplexity_of_a_rule_with_a_long_name(tmp_path: Path) -> None:
    one = result("dsf")
    config = {**one.config, "model": {**one.config["model"], "feedback": "dsf@0.3/calibrated@0.6/log_spaced(64)"}}
    text = write_page(sources.Found([dataclasses.replace(one, config=config)]))
    heading = "[...document.querySelectorAll('th')].filter(th => th.textContent == 'valid perplexity')"
    (right,) = measured(text, f"{heading}.map(th => th.getBoundingClientRect().right)", 390, tmp_path)
    assert right < 374  # the page ends 1rem before the screen


def measured(text: str, script: str, width: int, folder: Path) -> list[float]:
    """The numbers of an array that a script makes in a page, which a frame of some width shows in frame.html."""
    post = f"<script>onload = () => {{ parent.postMessage(({script}).join(' '), '*') }}</script></body>"
    (folder / "page.html").write_text(text.replace("</body>", post), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><script>onmessage = event => { document.title = event.data }</script><body style='margin:0'>"
        f"<iframe src='page.html' style='border:0;width:{width}px;height:1500px'></iframe></body>"
    )
    window = f"--window-size={max(width, 500)},1500"
    page = browse(frame, folder, window, "--virtual-time-budget=5000", "--dump-dom")
    return [float(number) for number in re.findall(r"<title>(.*?)</title>", page)[0].split()]


def browse(path: Path, folder: Path, *flags: str) -> str:
    """What headless Chromium prints about a page."""
    quiet = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    quiet += ("disable-component-update", "disable-sync", "hide-scrollbars")
    assert CHROMIUM is not None
    command = [CHROMIUM, *(f"--{flag}" for flag in quiet), f"--user-data-dir={folder / 'profile'}", *flags]
    return subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
