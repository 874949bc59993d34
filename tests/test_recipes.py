"""example/recipes/: each file makes two updates with the model and the rows exchanged for tiny ones."""
import itertools
import os
import re
import subprocess

import pytest
import yaml
from helpers import OF_KIND, ROOT, metrics, pair_rows, tiny_model, train_here, write_jsonl

KINDS = {"sft": "responses", "dpo": "pairs", "apo": "pairs", "grpo": "prompts"}
RECIPES = sorted((ROOT / "example" / "recipes").glob("*.yml"))
CHAINS = [
    ("zephyr-7b-beta-sft", "zephyr-7b-beta-dpo"),
    ("gpt2-nl-pretrain", "gpt2-nl-sft", "gpt2-nl-dpo"),
    ("constitutional-ai-sft", "constitutional-ai-dpo"),
    ("smollm3-sft", "smollm3-apo"),
    ("starchat2-15b-sft", "starchat2-15b-dpo"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=16384)


def keys_of(name):
    return yaml.safe_load((ROOT / "example" / "recipes" / f"{name}.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_two_updates(path, model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    keys = keys_of(path.stem)
    rows = OF_KIND[KINDS[keys["algorithm"]]](8)
    if "pretrain" in path.stem:
        rows = [{"text": "Een zin in het Nederlands. " * (i + 1)} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = [f"model={model}", f"data={data}", "eval_fraction=0", f"output={tmp_path}/run", "batch_size=4",
             "epochs=1", "max_steps=2", "save_every=null", "eval_data=null"]
    if keys["algorithm"] == "grpo":
        reward = f"{ROOT}/tests/some_rewards.py:varied"      # a random model is never right
        words += [f"reward={reward}", "max_completion_length=10", "num_generations=4", "sample_every=null"]
    train_here(path, *words)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0])
def test_a_chain_starts_where_the_one_before_ends(chain):
    for before, after in zip(chain, chain[1:]):
        assert keys_of(after)["model"] == f"runs/{before}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_number_says_whose_it_is(path):
    """Beside each number of a recipe that has a source; the commands name files that exist."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?:train.py|bash) (example/recipes/\S+)", text):
        assert (ROOT / name).exists()
    assert f"example/recipes/{path.stem}." in text
    if "All numbers here are ours" in text:
        return
    assert "arXiv" in text or "recipes/" in text
    for line in text.splitlines():
        if re.match(r" *\w+: [\d.e-]+( |$)", line):
            assert "ours" in line or "the source's" in line, line


def test_the_scan_trains_every_loss_and_compares(model, tmp_path):
    """Two losses on tiny pairs, and one page; then the commands of two losses and two values of beta, which
    `echo` prints."""
    data = write_jsonl(tmp_path / "rows.jsonl", pair_rows(4))
    output = tmp_path / "scan"
    words = [f"model={model}", f"data={data}", "eval_data=null", "batch_size=4", "max_steps=1"]

    def scan(**settings):
        settings |= {"LOSSES": "dpo ipo", "OUTPUT": str(output)}
        done = subprocess.run(["bash", "example/recipes/preference-scan.sh", *words], cwd=ROOT, check=True,
                              env=os.environ | settings, capture_output=True, text=True)
        return done.stdout.splitlines()

    scan(BETAS="0.5")
    found = sorted(path.name for path in output.glob("[!.]*"))
    assert found == ["dpo-0.5", "ipo-0.5", "report.html"]
    for name in found[:-1]:
        config = yaml.safe_load((output / name / "config.yaml").read_text())
        assert f"{config['algorithm']}-{config['beta']}" == name
    *commands, _ = scan(BETAS="0.1 0.5", TRAIN="echo train.py")
    expected = []
    for loss, beta in itertools.product(("dpo", "ipo"), ("0.1", "0.5")):
        own = [f"algorithm={loss}", f"beta={beta}", f"output={output}/{loss}-{beta}"]
        expected.append(["train.py", "example/recipes/preference-scan.yml", *own, *words])
    assert [command.split() for command in commands] == expected
