"""report.py: a page with what runs hold, and the same numbers as tables."""
import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from helpers import ROOT, pair_rows, tiny_model, train_here, write_config, write_jsonl

import report
from data.errors import UserError
from engine.chart import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, Curve, chart, thinned
from engine.intervals import wilson
from engine.report import groups_of, page, read_run, warnings_of, write_report

CHROMIUM = shutil.which("chromium")


def a_run(folder, seed=0, losses=(0.7, 0.5, 0.4), events=(), samples=(), held_out=(), **config):
    """A run's directory, made by hand; `losses` of updates 1, 2, ..."""
    folder.mkdir(parents=True)
    values = {"algorithm": "dpo", "model": "base", "data": "pairs.jsonl", "seed": seed, "output": folder}
    values |= config
    (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    started = {"command": "python train.py x.yml", "machine": {"cores": 2, "gpu": None}, "world_size": 1,
               "versions": {"torch": "2.13"}}
    started["data"] = {
        "train": {"source": "pairs.jsonl", "read": 12, "used": 10, "dropped": {"too long": 2}},
        "eval": {"source": "held.jsonl", "read": 50, "used": 50, "dropped": {}}}
    (folder / "run.json").write_text(json.dumps(started))
    rows = []
    for step, loss in enumerate(losses, 1):
        rows.append({"step": step, "split": "train", "epoch": 0.1, "loss": loss, "lr": 0.01})
    for step, metrics in held_out:
        rows.append({"step": step, "split": "eval", **metrics})
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", list(samples))
    (folder / "events.log").write_text("".join(f"2026-01-01 00:00:00 {line}\n" for line in events))
    return str(folder)


HELD_OUT = [(0, {"loss": 0.7, "rewards/accuracies": 0.5}), (3, {"loss": 0.45, "rewards/accuracies": 0.8})]


# ---- curves

def pixels(step, value, steps, values):
    """Where a point belongs, by the rule of three."""
    x = LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / (steps[1] - steps[0])
    y = TOP + (HEIGHT - TOP - BOTTOM) * (values[1] - value) / (values[1] - values[0])
    return x, y


def test_a_curve_stands_where_its_numbers_say():
    points = [(1, 2.0), (2, 4.0), (5, 3.0)]
    picture = ElementTree.fromstring(chart("loss", [Curve("a", "c0", points)]))
    line, = picture.iter("polyline")
    found = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    for (step, value), place in zip(points, found, strict=True):
        assert place == pytest.approx(pixels(step, value, (1, 5), (2.0, 4.0)), abs=0.05)
    assert line.findtext("title") == "a: 3 at step 5"
    texts = [text.text for text in picture.iter("text")]
    assert texts == ["2", "3", "4", "1", "5"]


def test_a_band_holds_the_lowest_and_highest_run():
    curve = Curve("a", "c1", [(0, 1.0), (2, 2.0)], [(0, 0.0, 3.0), (2, 1.0, 4.0)])
    picture = ElementTree.fromstring(chart("loss", [curve]))
    band, = picture.iter("polygon")
    found = [tuple(map(float, pair.split(","))) for pair in band.get("points").split()]
    corners = [(0, 3.0), (2, 4.0), (2, 1.0), (0, 0.0)]
    for (step, value), place in zip(corners, found, strict=True):
        assert place == pytest.approx(pixels(step, value, (0, 2), (0.0, 4.0)), abs=0.05)


@pytest.mark.parametrize("count", [1, 2, MOST_POINTS, MOST_POINTS + 1, 12_345])
def test_long_curves_are_means_of_neighbours(count):
    points = [(step, float(step % 7)) for step in range(count)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS + 1 and found[-1] == points[-1]
    if count <= MOST_POINTS:
        assert found == points
    else:
        size = -(-count // MOST_POINTS)
        first = points[:size]
        assert found[0] == (sum(step for step, _ in first) / size, sum(value for _, value in first) / size)


def test_one_point_and_one_value_are_drawn():
    for points in ([(3, 5.0)], [(1, 0.0), (2, 0.0)]):
        picture = ElementTree.fromstring(chart("x", [Curve("a", "c0", points)]))
        assert len(list(picture.iter("polyline"))) == 1


# ---- the page

def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    paths = [a_run(tmp_path / f"a{seed}", seed, stop='["x"]') for seed in (0, 1)]
    paths.append(a_run(tmp_path / "b", beta=0.5, stop='["x"]'))
    runs = [read_run(path) for path in paths]
    assert [[run.name for run in group] for group in groups_of(runs)] == [["a0", "a1"], ["b"]]
    html = page(runs)
    assert "a0 (mean of seeds 0, 1)" in html and "polygon" in html
    assert re.search("<tr><th>beta</th><td>-</td><td>-</td><td>0.5</td></tr>", html)


def test_the_page_holds_the_numbers_and_escapes_the_texts(tmp_path):
    samples = [{"step": 2, "prompt": "old", "completion": "old", "reward": 0.0},
               {"step": 3, "prompt": "<b>2+2?", "completion": "<script>alert(1)</script>", "reward": 0.25}]
    run = read_run(a_run(tmp_path / "a&b", samples=samples, held_out=HELD_OUT))
    html = page([run])
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "&lt;b&gt;2+2?" in html
    assert "<b>0.25</b>" in html and ">old<" not in html and "a&amp;b" in html
    low, high = wilson(0.8, 50)
    assert f"0.8 ({low:.3f} to {high:.3f}) at step 3" in html
    assert "0.7 at step 0" in html and "-0.25" in html
    assert "12 read, 10 used; 2 dropped: too long" in html
    assert "python train.py x.yml" in html and "torch 2.13" in html
    assert "Constant: lr 0.01." in html
    assert "http" not in html.replace("http-equiv", "")      # nothing is asked of a server


@pytest.mark.parametrize("values, says", [
    (dict(events=["warning: rows were dropped"]), "rows were dropped"),
    (dict(held_out=[(0, {"loss": 0.7}), (1, {"loss": 0.4}), (2, {"loss": 0.6})]),
     "The held-out loss was lowest at step 1 (0.4) and is 0.6 at the end"),
])
def test_what_is_worth_a_look(tmp_path, values, says):
    found = warnings_of(read_run(a_run(tmp_path / "a", **values)))
    assert len(found) == 1 and found[0].startswith(says)
    assert warnings_of(read_run(a_run(tmp_path / "b", held_out=HELD_OUT))) == []


@pytest.mark.parametrize("metric, values, says", [
    ("grad_norm", [0.0] * 3, "The gradient is 0 in every update"),
    ("frac_reward_zero_std", [0.1] * 18 + [0.9] * 2, "more than half of the groups have equal rewards"),
    ("completions/clipped_ratio", [0.0] * 18 + [0.5] * 2, "50% of the completions are truncated"),
    ("kl", [0.01] * 20 + [3.0] * 20, "The KL to the reference grew more than fivefold"),
])
def test_numbers_that_run_away(tmp_path, metric, values, says):
    path = a_run(tmp_path / "a")
    rows = []
    for step, value in enumerate(values, 1):
        rows.append({"step": step, "split": "train", "loss": 1.0, metric: value})
    write_jsonl(tmp_path / "a" / "metrics.jsonl", rows)
    found = warnings_of(read_run(path))
    assert len(found) == 1 and says in found[0]


def test_texts_may_hold_any_end_of_a_line(tmp_path):
    path = a_run(tmp_path / "a")
    rows = [{"step": 1, "prompt": "p", "completion": f"a{end}b"} for end in "\u2028\u2029\x85"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a" / "samples.jsonl").write_text(text, encoding="utf-8")
    assert read_run(path).samples == rows


def test_a_run_that_was_killed_while_it_wrote(tmp_path):
    path = a_run(tmp_path / "a", held_out=[(2, {"loss": None, "kl": 1.0})])
    with open(f"{path}/metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": 4, "spl')
    (tmp_path / "a" / "run.json").write_text('{"ver')
    run = read_run(path)
    assert len(run.train) == 3 and run.values("eval", "loss") == [] and run.values("eval", "kl") == [(2, 1.0)]
    assert "<h1>a</h1>" in page([run])


# ---- the command

def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = a_run(tmp_path / "a", held_out=HELD_OUT), a_run(tmp_path / "b", held_out=HELD_OUT, beta=0.3)
    report.main([a, b])
    assert (tmp_path / "report.html").read_text() == page([read_run(a), read_run(b)])
    report.main([a, "output=other.html"])
    assert (tmp_path / "other.html").exists()
    capsys.readouterr()
    report.main([a, b, "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["| key | a | b |", "|---|---|---|", "| beta | - | 0.3 |", ""]
    assert "| loss | a | 0.7 at step 0 | 0.45 at step 3 | -0.25 |" in lines


@pytest.mark.parametrize("words, says", [
    ([], "no run is named; fix: python report.py"), (["nothing"], "nothing is not a run; fix: "),
    (["empty"], "empty has logged nothing yet; fix: "),
    (["a", "output=no/x.html"], "no/x.html cannot be written"),
    (["a", "--pdf"], "--pdf is unknown; fix: ")])
def test_what_is_refused(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "a")
    a_run(tmp_path / "empty", losses=[])
    with pytest.raises(UserError, match=says):
        report.main(words)


def test_the_program_imports_no_torch():
    code = "import sys, report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- a real run

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    model = tiny_model(folder / "model")
    data = {"data": write_jsonl(folder / "pairs.jsonl", pair_rows(8)),
            "eval_data": write_jsonl(folder / "held.jsonl", pair_rows(4, 10))}
    train_here(write_config(folder / "x.yml", algorithm="dpo", model=model, **data, output=folder / "run",
                            max_steps=4, batch_size=2, max_length=200, eval_every=2, sample_every=2))
    return folder / "run"


def test_every_run_writes_its_own(real):
    html = (real / "report.html").read_text()
    run = read_run(str(real))
    assert html == page([run]) and "rewards/margins" in html
    loss = [value for _, value in run.values("train", "loss")]
    assert len(loss) == 4 and f"{loss[-1]:.4g} at step 4" in html


def test_a_report_that_cannot_be_written_stops_nothing(real, tmp_path):
    (real / "report.html").unlink()
    (real / "report.html").mkdir()
    assert write_report(str(real)) is None and write_report(str(tmp_path)) is None
    (real / "report.html").rmdir()


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("theme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(real, tmp_path, theme, width):
    """No message on its console, and nothing is wider than the window."""
    probe = ("<script>console.log('width ' + document.documentElement.scrollWidth + ' of ' + innerWidth)"
             "</script></body>")
    path = tmp_path / "page.html"
    path.write_text(page([read_run(str(real))]).replace("</body>", probe))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--hide-scrollbars", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900",
               f"--blink-settings=preferredColorScheme={theme}", f"--screenshot={tmp_path}/shot.png",
               path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message, = re.findall(r'CONSOLE.*?"(.*?)", source', done.stderr)
    needed, there = map(int, re.fullmatch(r"width (\d+) of (\d+)", message).groups())
    assert needed <= there == max(width, 500)                # no window of chromium is narrower
    assert (tmp_path / "shot.png").stat().st_size > 5_000
