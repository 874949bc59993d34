"""`benchmark/figure.py`: the drawing of made runs, read back as XML."""
import json
from xml.etree import ElementTree

import pytest

from benchmark import figure

SVG = "{http://www.w3.org/2000/svg}"


def write_run(folder, values, metric="reward"):
    """A run with held-out values {update: value}, and training rows between them."""
    folder.mkdir()
    lines = []
    for update, value in values.items():
        lines.append(json.dumps({"step": update, "split": "eval", metric: value}))
        lines.append(json.dumps({"step": update + 1, "split": "train", metric: 0.123}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def corners(element):
    found = []
    for corner in element.get("points").split():
        x, y = corner.split(",")
        found.append((float(x), float(y)))
    return found


def drawn(capsys, *words):
    figure.main([str(word) for word in words])
    return ElementTree.fromstring(capsys.readouterr().out)


def test_mean_and_band_of_two_seeds(tmp_path, capsys):
    """Update 8 is missing in one run, so it is left out. Heights are shares of the plot between 0 and 1."""
    first = write_run(tmp_path / "a", {0: 0.2, 4: 0.6, 8: 0.9})
    second = write_run(tmp_path / "b", {0: 0.4, 4: 1.0})
    root = drawn(capsys, f"grpo & <co>={first},{second}", "--title", "奖励")
    line, = root.iter(f"{SVG}polyline")
    (left, start), (right, end) = corners(line)
    bottom = figure.HEIGHT - figure.BOTTOM
    tall = bottom - figure.TOP
    assert (start, end) == pytest.approx((bottom - 0.3 * tall, bottom - 0.8 * tall), abs=0.06)
    assert (left, right) == pytest.approx((figure.LEFT, figure.WIDTH - figure.RIGHT), abs=0.06)
    band, = root.iter(f"{SVG}polygon")
    heights = [y for _, y in corners(band)]
    assert heights == pytest.approx([bottom - share * tall for share in (0.4, 1.0, 0.6, 0.2)], abs=0.06)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "grpo & <co>" in texts and "奖励" in texts
    root = drawn(capsys, f"one={first}", "--split", "train")      # 0.123 after each evaluation
    line, = root.iter(f"{SVG}polyline")
    assert [y for _, y in corners(line)] == pytest.approx([bottom - 0.123 * tall] * 3, abs=0.06)
    assert [text for text in texts if text.endswith("%")] == ["0%", "25%", "50%", "75%", "100%"]


def test_lines_have_colours_and_other_numbers_an_axis_of_their_own(tmp_path, capsys):
    low = write_run(tmp_path / "low", {0: -1.1, 20: 0.5})
    high = write_run(tmp_path / "high", {0: -1.0, 20: 3.7})
    root = drawn(capsys, f"low={low}", f"high={high}")
    colors = {line.get("stroke") for line in root.iter(f"{SVG}polyline")}
    assert len(colors) == 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "-2" in texts and "4" in texts and "20" in texts
    assert texts.index("high") < texts.index("low")      # as they end
    for element in root.iter():
        for name in ("x", "cx", "x1", "x2"):
            assert 0 <= float(element.get(name, 0)) <= figure.WIDTH


@pytest.mark.parametrize("words, message", [
    (["grpo={run}-none"], "metrics.jsonl is not there; fix: name runs"),
    (["grpo={run}", "--metric", "nothing"], "has no nothing of the split eval; fix: "),
])
def test_refused(words, message, tmp_path):
    run = write_run(tmp_path / "run", {0: 0.1})
    with pytest.raises(SystemExit, match=message):
        figure.main([word.format(run=run) for word in words])
