"""The report: whole HTML that needs nothing else, the right numbers in it, and what a browser makes of it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kdmos import evaluate, picture, report
from kdmos.errors import InputError
from kdmos.report import Chart, Facts, Figures, Method, Picture, Section, Table, build_report, plain, write_report

VOID = {"meta", "img", "link", "br", "hr", "input"}
DASH = report.NOTHING
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Elements of a page as [(tag, attributes)] and its text; fails on tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if data.strip() and self.open[-1:] != ["style"]:
            self.texts.append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def check(html):
    """What holds for every report; the page."""
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and len(page.all("h1")) == len(page.all("main")) == 1
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import|\bon\w+=", html)
    for tag, attributes in page.elements:
        for name in {"src", "href", "srcset", "xlink:href", "action", "data", "poster"} & set(attributes):
            assert (tag, name) in (("a", "href"), ("img", "src"))
            assert attributes[name].startswith({"a": "#", "img": "data:image/png;base64,"}[tag])
    for image in page.all("img"):
        assert image["alt"]
        assert base64.b64decode(image["src"].split(",", 1)[1], validate=True).startswith(PNG)
    targets = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(targets) == len(set(targets))
    assert {link["href"][1:] for link in page.all("a")} <= set(targets)
    return page


def scores(moving_iou, sequences=("00",), points=1000):
    """A dict as `evaluate_predictions` returns it, as far as tables read it."""
    row = {"scans": 3, "points": points, "moving_points": 40, "moving_iou": moving_iou, "moving_precision": 0.75}
    row |= {"moving_recall": 0.5, "static_iou": None, "iou": {"static": None, "moving": moving_iou}}
    row |= {"objects": 8, "object_recall": moving_iou / 2, "false_objects_per_scan": 10 * moving_iou}
    row["by_kind"] = [{"kind": "car", "points": 40, "recall": 0.5, "objects": 8, "object_recall": moving_iou / 2}]
    row["by_range"] = [
        {"metres": [0, 10], "moving_points": 40, "moving_iou": moving_iou},
        {"metres": [10, None], "moving_points": 0, "moving_iou": None},
    ]
    return {"total": row, "sequences": dict.fromkeys(sequences, row)}


def rows(html, caption):
    """Texts of the cells of a table, row by row."""
    table = re.search(rf"<figcaption>{re.escape(caption)}</figcaption>.*?</table>", html, re.DOTALL)[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return [[re.sub(r"<[^>]*>", "", cell) for cell in row] for row in cells]


# --- the page


def test_a_page_of_every_block_is_whole_and_needs_nothing_else():
    blocks = [
        Figures({"moving IoU, %": 0.5}),
        Table("Table", ["name", "share"], [["a", 0.25]]),
        Facts({"command": "kdmos evaluate https://example.org"}, "Facts"),
        Picture([("a scan", PNG), ("another", PNG)], "Picture"),
        Chart("Chart", [("a", 0, [[(0, 0.1), (10, 0.5)]])], share=True),
        "A paragraph.",
    ]
    page = check(build_report("Title", "Lead.", [Section(f"Part {i}", blocks) for i in range(4)]))
    assert {"viewport", "color-scheme"} <= {meta.get("name") for meta in page.all("meta")}
    assert len(page.all("a")) == 4 and len(page.all("img")) == 8 and len(page.all("svg")) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] == "Chart: a ends at 50.0" for svg in page.all("svg"))
    assert check(build_report("Title", "", [Section("Empty", [])])).all("a") == []
    assert check(build_report("Title", "", [])).texts == ["Title", "Title"]


def test_text_from_outside_is_escaped():
    bad = "<script>alert('1')</script> \"&{title}"
    method = Method(bad, scores(0.5, [bad, "01"]), {"val/moving_iou": [(1, 0.5)]}, bad)
    blocks = [*report.score_blocks([method]), *report.curve_charts([method]), Facts({bad: bad}, bad)]
    blocks += [Picture([(bad, PNG)], bad), Figures({bad: bad}), Table(bad, [bad], [[bad]]), bad]
    html = build_report(bad, bad, [Section(bad, blocks)])
    page = check(html)
    assert "<script" not in html
    assert page.all("img")[0]["alt"] == bad and page.texts.count(bad) >= 10


def test_cells():
    html = build_report(
        "",
        "",
        [
            Section(
                "",
                [
                    Table(
                        "T",
                        ["name", "share", "count", "seeds", "text", "some", "plain"],
                        [
                            ["a", 0.1234, 1234567, [0.5, 0.6, 0.7], "x", [None, 0.5, 0.5], plain(1234.5)],
                            ["b", None, np.int64(2), [None, 0.25], "y", [None, None], [plain(1), plain(2)]],
                            ["b", float("nan"), None, [10, 20], None, None, plain(None)],
                        ],
                    )
                ],
            )
        ],
    )
    assert rows(html, "T")[1:] == [
        ["a", "12.3", "1,234,567", "60.0 ± 10.0", "x", "50.0 ± 0.0 (2 of 3)", "1,234.50"],
        ["b", DASH, "2", "25.0 (1 of 2)", "y", DASH, "1.50 ± 0.71"],
        [DASH, DASH, "15.0 ± 7.1", DASH, DASH, DASH],  # one name for both rows
    ]
    assert [cell.get("class") for cell in check(html).all("th")][:7] == [
        None,
        "number",
        "number",
        "number",
        None,
        "number",
        "number",
    ]
    assert check(html).all("th")[8]["rowspan"] == "2"


def test_a_report_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, "old")
    write_report(path, "new \udce9")  # of a file name that is no Unicode
    assert path.read_text() == "new ?" and [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match=r"report\.html/x: cannot be written"):
        write_report(path / "x", "")


# --- methods side by side


def test_scores_of_methods():
    methods = [
        Method("rule", scores(0.3), note="Needs no training."),
        Method("student", [scores(0.5), scores(0.6)]),
        Method("not run"),
    ]
    html = build_report("", "", [Section("", report.score_blocks(methods))])
    head, rule, student = rows(html, "All scans together, %")
    assert head[:5] == ["method", "moving IoU", "precision", "recall", "static IoU"]
    assert head[5:8] == ["object recall", "false objects a scan", "objects"]
    assert rule == ["rule", "30.0", "75.0", "50.0", DASH, "15.0", "3.00", "8", "1,000", "40", "3"]
    objects = ["27.5 ± 3.5", "5.50 ± 0.71", "8"]
    assert student == ["student", "55.0 ± 7.1", "75.0", "50.0", DASH, *objects, "1,000", "40", "3"]
    assert rows(html, "Kinds of movers, %") == [
        ["kind", "method", "recall", "object recall", "objects", "moving points"],
        ["car", "rule", "50.0", "15.0", "8", "40"],
        ["student", "50.0", "27.5 ± 3.5", "8", "40"],
    ]
    assert rows(html, "Moving IoU by distance, %") == [
        ["", f"0{DASH}10 m", "10 m +"],
        ["rule", "30.0", DASH],
        ["student", "55.0 ± 7.1", DASH],
        ["moving points", "40", "0"],
    ]
    assert html.count("<strong>") == 3 and "<strong>55.0" in html  # equal ones are no best
    assert "Each sequence" not in html and "standard deviation" in html and "Needs no training." in html
    assert report.score_blocks([Method("not run")]) == []


def test_scores_of_each_sequence():
    methods = [Method("rule", scores(0.3, ["00", "01"])), Method("student", scores(0.5, ["00"]))]
    html = build_report("", "", [Section("", report.score_blocks(methods))])
    table = rows(html, "Each sequence, %")
    assert [row[:3] for row in table[1:]] == [
        ["00", "rule", "30.0"],
        ["student", "50.0", "75.0"],
        ["01", "rule", "30.0"],
        ["student", DASH, DASH],
    ]
    alone = build_report("", "", [Section("", report.score_blocks(methods[:1]))])
    assert [row[:2] for row in rows(alone, "Each sequence, %")[1:]] == [["00", "30.0"], ["01", "30.0"]]


def test_a_kind_that_one_method_was_not_scored_on_and_no_kinds():
    other = scores(0.5)
    other["total"] |= {"by_kind": [{**other["total"]["by_kind"][0], "kind": "bus", "object_recall": None}]}
    table = report.kind_table([Method("rule", scores(0.3)), Method("student", other)])
    assert [row[:4] for row in table.rows] == [
        ["car", "rule", 0.5, 0.15],
        ["car", "student", None, None],
        ["bus", "rule", None, None],
        ["bus", "student", 0.5, None],
    ]
    alone = report.kind_table([Method("student", other)])
    assert alone.head[:2] == ["kind", "recall"] and alone.rows == [["bus", 0.5, None, 8, 40]]
    still = scores(0.5)
    still["total"] |= {"by_kind": [], "object_recall": None, "false_objects_per_scan": None}
    html = build_report("", "", [Section("", report.score_blocks([Method("still", still)]))])
    assert "Kinds of movers" not in html and rows(html, "All scans together, %")[1][5:7] == [DASH, DASH]


def test_movable_has_its_columns_once_a_method_knows_it():
    student = scores(0.5)
    student["total"]["iou"] = {"static": 0.9, "movable": 0.8, "moving": 0.5}
    table = report.score_table([Method("rule", scores(0.3)), Method("student", student)])
    assert table.head[4:7] == ["static + movable IoU", "static IoU", "movable IoU"]
    assert [row[5:7] for row in table.rows] == [[None, None], [0.9, 0.8]]


def test_a_breakdown():
    table = report.breakdown("Recall by speed, %", ["0-2 m/s", "2 m/s +"], {"a": [0.5, None]}, [10, 0])
    assert rows(build_report("", "", [Section("", [table])]), "Recall by speed, %") == [
        ["", "0-2 m/s", "2 m/s +"],
        ["a", "50.0", DASH],
        ["moving points", "10", "0"],
    ]


# --- curves


def coordinates(html):
    lines = re.findall(r'<polyline[^>]*points="([^"]*)"', html)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_a_curve_is_drawn_where_its_values_are():
    chart = Chart("IoU, %", [("a", 0, [[(0, 0.0), (50, float("nan")), (100, 0.5)]]), ("b", 7, [[(100, 1.0)]])], True)
    html = build_report("", "", [Section("", [chart])])
    page = check(html)
    left, right, low, high = report.LEFT, report.WIDTH - report.RIGHT, report.HEIGHT - report.BOTTOM, report.TOP
    assert coordinates(html) == [[(left, low), (right, (low + high) / 2)], [(right, high)]]
    assert "50.0" in page.texts and [i["class"] for i in page.all("i")] == ["k0", "k1"]
    assert {"0", "20", "40", "60", "80", "100"} <= set(page.texts)


def test_curves_that_are_empty_flat_long_or_negative():
    runs = [[], [(0, float("nan"))], [(0, 0.0)], [(i, 3.0) for i in range(5000)], [(0, -1.0), (1, 2e-9)]]
    html = build_report("", "", [Section("", [Chart(f"{i}", [("a", i, [run])]) for i, run in enumerate(runs)])])
    page = check(html)
    assert "nan" not in html and len(page.all("svg")) == 5
    lines = coordinates(html)
    assert [len(line) for line in lines] == [0, 0, 1, report.CURVE_POINTS, 2]
    assert lines[3][-1][0] == report.WIDTH - report.RIGHT  # the last value stays


def test_ticks():
    assert report._ticks(0, 0.83) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert report._ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert report._ticks(-1, 1) == [-1, -0.5, 0, 0.5, 1]
    assert len(report._ticks(0, 0)) >= 2


def test_charts_of_methods_keep_one_colour_each():
    curve = {"val/moving_iou": [(1, 0.5)], "train/loss_epoch": [(1, 2.0)], "lr-SGD": [(1, 0.1)]}
    methods = [Method("rule"), Method("a", curves=[curve, curve]), Method("b", curves={"val/moving_iou": [(1, 0.4)]})]
    iou, loss = report.curve_charts(methods)
    assert [(name, colour, len(runs)) for name, colour, runs in iou.curves] == [("a", 1, 2), ("b", 2, 1)]
    assert [name for name, _, _ in loss.curves] == ["a"] and iou.share and not loss.share
    assert report.curve_charts([Method("rule")]) == []


def test_training_curves(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for part, steps in enumerate([(0, 10, 20), (10, 20, 30)]):  # killed after 20, resumed from 10
        writer = tensorboard.SummaryWriter(tmp_path / "tensorboard", filename_suffix=f".{part}")
        for step in steps:
            writer.add_scalar("val/moving_iou", part + step / 100, step)
        writer.close()
    for part, path in enumerate(sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)):
        path.rename(path.with_name(f"events.out.tfevents.{part}.host"))  # named by the second they began in
    curves = report.training_curves(tmp_path)
    assert curves == {
        "val/moving_iou": [(0, 0), (10, pytest.approx(1.1)), (20, pytest.approx(1.2)), (30, pytest.approx(1.3))]
    }
    with pytest.raises(InputError, match="no learning curves; expected the output= folder"):
        report.training_curves(tmp_path / "tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(InputError, match=r"need tensorboard: pip install 'kdmos\[train\]'"):
        report.training_curves(tmp_path)


# --- kdmos evaluate --report


@pytest.fixture(scope="module")
def scored(tmp_path_factory, write_sequence):
    """Data root of a synthetic sequence, predictions of it without scan 3, a training run of one value."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("scored")
    sequence = write_sequence(root / "data" / "sequences" / "00")
    predictions = root / "predicted" / "sequences" / "00" / "predictions"
    predictions.mkdir(parents=True)
    for path in sorted((sequence / "labels").iterdir()):
        labels = np.fromfile(path, np.uint32)
        np.where((labels & 0xFFFF > 250) & (np.arange(len(labels)) % 2 == 0), 251, 9).astype(np.uint32).tofile(
            predictions / path.name
        )
    (predictions / "000003.label").unlink()
    note = {"source": "here", "checkpoint": "<b>student</b>", "form": "published", "lookahead": 7}
    (root / "predicted" / "predict.json").write_text(json.dumps(note))
    return root


def run(*arguments):
    """Exit code of `kdmos evaluate`."""
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(argument) for argument in arguments])
    return exit.value.code


@pytest.fixture(scope="module")
def page_of_a_run(scored):
    path = scored / "report.html"
    options = ["--allow-missing", "--rule", "--report", path, "--frames", "2,5"]
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        pass
    else:
        writer = SummaryWriter(scored / "run" / "tensorboard")
        for step in range(20):
            writer.add_scalar("val/moving_iou", step / 40, 100 * step)
        writer.close()
        options += ["--run", scored / "run"]
    assert run(scored / "data", scored / "predicted", *options) == 0
    return path


def test_evaluate_writes_a_report(page_of_a_run, scored):
    html = page_of_a_run.read_text()
    page = check(html)
    expected = evaluate.evaluate_predictions(scored / "data", scored / "predicted", rule=True, allow_missing=True)
    _, predictions, rule = rows(html, "All scans together, %")
    for row, total in ((predictions, expected["total"]), (rule, expected["rule"]["total"])):
        keys = ("moving_iou", "moving_precision", "moving_recall", "static_iou")
        assert row[1:5] == [f"{100 * total[key]:.1f}" for key in keys]
        assert row[5] == f"{100 * total['object_recall']:.1f}" and row[6] == f"{total['false_objects_per_scan']:.2f}"
        assert row[7:] == [f"{total[key]:,}" for key in ("objects", "points", "moving_points", "scans")]
    kinds = zip(expected["total"]["by_kind"], expected["rule"]["total"]["by_kind"], strict=True)
    table = [row[-4:] for row in rows(html, "Kinds of movers, %")[1:]]
    assert table == [
        [f"{100 * row['recall']:.1f}", f"{100 * row['object_recall']:.1f}", f"{row['objects']}", f"{row['points']:,}"]
        for pair in kinds
        for row in pair
    ]
    assert "Not scored: 1 labelled scan of 00 that has no prediction." in page.texts
    assert {"<b>student</b>", "published", "7"} <= set(page.texts)  # what the predictions were made with
    assert len(page.all("img")) == 6 and any("scan 5" in image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == (scored / "run").exists()
    assert not list(scored.glob("**/*.png"))


def test_pictures_are_kept_where_they_are_asked_for(scored, tmp_path, capsys):
    options = ["--allow-missing", "--pictures", tmp_path / "pictures", "--report", tmp_path / "r.html"]
    assert run(scored / "data", scored / "predicted", *options) == 0
    out = capsys.readouterr().out
    (drawn,) = (tmp_path / "pictures").iterdir()
    assert f"picture: {drawn}" in out and f"report: {tmp_path / 'r.html'}" in out
    images = check((tmp_path / "r.html").read_text()).all("img")
    panels = [base64.b64decode(image["src"].split(",")[1]) for image in images]
    assert panels == picture.read_panels(drawn)[1]


def test_json_beside_a_report_names_no_temporary_picture(scored, tmp_path, capsys):
    options = ["--allow-missing", "--json", "--report", tmp_path / "r.html"]
    assert run(scored / "data", scored / "predicted", *options) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--report", "{tmp}"], "a folder; name the file to write"),
        (["--run", "{tmp}"], "so it needs --report"),
        (["--run", "{tmp}", "--report", "{tmp}/r.html"], "no learning curves"),
    ],
)
def test_what_cannot_be_reported_is_said_first(scored, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(evaluate, "evaluate_predictions", None)
    assert run(scored / "data", scored / "predicted", *(option.format(tmp=tmp_path) for option in options)) == 2
    assert message in capsys.readouterr().err


def test_a_report_needs_matplotlib(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--allow-missing", "--report", tmp_path / "r.html"]
    assert run(scored / "data", scored / "predicted", *options) == 2
    assert "pip install 'kdmos[train]'" in capsys.readouterr().err and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "program, expected",
    [
        (Path(report.__file__).parent / "__main__.py", "kdmos evaluate 'a b'"),
        ("/usr/bin/kdmos", "kdmos evaluate 'a b'"),
        (Path(report.__file__).parent / "evaluate.py", "python -m kdmos.evaluate evaluate 'a b'"),
    ],
)
def test_the_command_line(monkeypatch, program, expected):
    monkeypatch.setattr(sys, "argv", [str(program), "evaluate", "a b"])
    assert report.command_line() == expected


# --- in a browser

MEASURE = """<script>
const box = (element) => element.getBoundingClientRect();
document.title = JSON.stringify({
  window: window.innerWidth,
  page: document.documentElement.scrollWidth,
  images: [...document.images].map((image) => [image.naturalWidth, box(image).right]),
  tables: [...document.querySelectorAll(".scroll")].map((scroll) => [box(scroll).right, scroll.scrollWidth]),
  dark: getComputedStyle(document.body).backgroundColor,
});
</script>"""


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"no browser to show a report in ({', '.join(names)})")


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light")])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(chromium, page_of_a_run, tmp_path, width, scheme):
    copy = tmp_path / "report.html"
    # An iframe, because a browser may refuse so narrow a window.
    inner = page_of_a_run.read_text().replace("</body>", MEASURE + "</body>")
    (tmp_path / "inner.html").write_text(inner)
    copy.write_text(
        f'<body style="margin:0"><iframe src="inner.html" style="border:0;width:{width}px;height:800px"></iframe>'
        "<script>onload = () => { document.title = frames[0].document.title; };</script>"
    )
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    command += [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["window"] == width and seen["page"] <= width
    assert len(seen["images"]) == 6
    assert all(natural > 0 and right <= width for natural, right in seen["images"])
    assert seen["tables"] and all(right <= width for right, _ in seen["tables"])
    if width == 390:  # wider than the phone, and scrolled inside its own box
        assert max(wide for _, wide in seen["tables"]) > width
    assert seen["dark"] == ("rgb(13, 17, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
