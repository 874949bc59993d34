"""README.md of `final/`: the hub can read it, its numbers are those of the run, and a resumed run writes the
same one."""
import hashlib
import json

import pytest
import yaml
from helpers import ROWS, pair_rows, sft_rows, tiny_model, train_here, write_config, write_jsonl

from engine.card import front_matter

CARD = "---\nlicense: apache-2.0\nbase_model: some/origin\ntags: [x]\n---\n\n# A model\n"


@pytest.fixture
def train(tmp_path):
    """train(algorithm, key=value, ...) -> (front matter, text) of the card of a run of two updates."""
    model = tiny_model(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD)

    def train(algorithm, **values):
        data = write_jsonl(tmp_path / "rows.jsonl", ROWS[algorithm](10))
        held_out = write_jsonl(tmp_path / "held-out.jsonl", ROWS[algorithm](4))
        keys = dict(algorithm=algorithm, model=model, data=data, eval_data=held_out, output=tmp_path / "run",
                    batch_size=5, max_length=200, lr=1e-3, save_every="null", eval_every=2)
        train_here(write_config(tmp_path / "run.yml", **keys | values))
        return read(tmp_path / "run" / "final" / "README.md")
    return train


def read(path):
    text = path.read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    assert text.startswith("---\n")
    return yaml.safe_load(head), body


@pytest.mark.parametrize("algorithm, keys, library, tags", [
    ("dpo", {}, "transformers", []),
    ("sft", {"lora_r": 2}, "peft", ["lora"]),
    ("sft", {"lora_r": 2, "merge": "true"}, "transformers", []),
    ("rm", {}, "transformers", ["reward-model"]),
    ("rm", {"lora_r": 2}, "peft", ["lora", "reward-model"]),
])
def test_every_kind_of_model_has_a_card(train, algorithm, keys, library, tags):
    head, _ = train(algorithm, **keys)
    assert head["library_name"] == library
    assert head["tags"] == ["minimal-llm-alignment", algorithm, *tags]
    assert head["license"] == "apache-2.0" and head["base_model"] == "some/origin"
    assert ("pipeline_tag" in head) == (algorithm != "rm")


def test_the_hub_takes_the_front_matter(train, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    train("dpo")
    card = hub.ModelCard.load(tmp_path / "run" / "final" / "README.md")
    assert card.data.base_model == "some/origin" and card.data.license == "apache-2.0"


def test_numbers_and_digests_are_those_of_the_files(train, tmp_path):
    _, text = train("dpo")
    for name in ("rows.jsonl", "held-out.jsonl"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in text
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "eval"]
    assert [row["step"] for row in held_out] == [0, 2]
    cells, = [line for line in text.splitlines() if line.startswith("| loss |")]
    shown = [float(cell) for cell in cells.split("|")[2:4]]
    assert shown == pytest.approx([row["loss"] for row in held_out], rel=1e-3)
    assert str(tmp_path / "run") not in text


def test_a_resumed_run_writes_the_same_card(train, tmp_path):
    """From the checkpoint after the first update, once final/ is gone."""
    train("dpo", save_every=1)
    final = tmp_path / "run" / "final"
    whole = (final / "README.md").read_bytes()
    for path in (final / "README.md", final / "model.safetensors"):
        path.unlink()
    final.rename(tmp_path / "elsewhere")
    train_here(str(tmp_path / "run.yml"), f"resume={tmp_path}/run/checkpoints/step-000001")
    assert (final / "README.md").read_bytes() == whole


def test_what_a_run_trains_further_keeps_its_origin(train, tmp_path):
    train("sft")
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(10))
    keys = dict(algorithm="dpo", model=tmp_path / "run", data=data, output=tmp_path / "second", batch_size=5,
                max_length=200, save_every="null", max_steps=1)
    train_here(write_config(tmp_path / "second.yml", **keys))
    head, _ = read(tmp_path / "second" / "final" / "README.md")
    assert head["base_model"] == "some/origin" and head["license"] == "apache-2.0"


@pytest.mark.parametrize("text", [
    "", "---\n", "---\n: [\n---\n", "---\n- a\n---\n", "x\n---\nlicense: y\n---\n", "---\nlicense: 3\n"])
def test_a_card_of_any_form_is_no_error(train, tmp_path, text):
    (tmp_path / "model" / "README.md").write_text(text)
    assert front_matter(str(tmp_path / "model")) == {}
    head, _ = train("sft", data=write_jsonl(tmp_path / "own.jsonl", sft_rows(10)))
    assert "license" not in head and "base_model" not in head


def test_secrets_stay_out(train):
    _, text = train("sft", system_prompt="hf_abcdefghijklmnopqrstuv")
    assert "hf_abc" not in text


@pytest.mark.parametrize("base", ["no such:name", "a/b/c", "modelscope:a/b", "x" * 5000])
def test_what_is_no_hub_name_has_no_front_matter(base):
    assert front_matter(base) == {}
