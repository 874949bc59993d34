"""The real-model configurations, unchanged, against a hub cache laid out for their exact names: the loading code is the real one."""
import json

import pytest
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from helpers import metrics, run_train, tiny_model


def hub_model(home, name, **config):
    """Lay a tiny model out as the hub's cache holds it: snapshots/<commit>, refs/main."""
    folder, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    tiny_model(folder / "snapshots" / commit, **config)


def hub_dataset(home, name, splits):
    """Lay a dataset of string columns out as `datasets` keeps what it has loaded from the hub."""
    owner, short = name.split("/")
    folder = home / "datasets" / f"{owner}___{short}" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    features, infos = Features({column: Value("string") for column in next(iter(splits.values()))[0]}), SplitDict(dataset_name=short)
    for split, rows in splits.items():
        with ArrowWriter(features=features, path=str(folder / f"{short}-{split}.arrow")) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        infos.add(SplitInfo(split, num_examples=len(rows), dataset_name=short))
    DatasetInfo(features=features, splits=infos, config_name="default", dataset_name=short, version="0.0.0").write_to_directory(folder)


def transcript(i, reply):
    return f"\n\nHuman: What is {i} and {i}?\n\nAssistant: Why do you ask?\n\nHuman: I wonder.\n\nAssistant: {reply}"


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_real_configuration_from_the_hub_cache(tmp_path, algorithm):
    rows = [{"chosen": transcript(i, f"It is {2 * i}."), "rejected": transcript(i, "No idea!")} for i in range(71)]
    hub_model(tmp_path, "Qwen/Qwen2.5-0.5B-Instruct", max_position_embeddings=2048)
    hub_dataset(tmp_path, "Anthropic/hh-rlhf", {"train": rows, "test": rows[:4]})
    run = tmp_path / "run"
    done = run_train([f"example/qwen2.5-{algorithm}.yml", f"output={run}"], HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "run.json").read_text())["data"]
    assert (report["train"]["source"], report["train"]["used"], report["eval"]["used"]) == ("Anthropic/hh-rlhf", 70, 1)
    assert [row["step"] for row in metrics(run)] == [1, 2]                       # 70 rows, 64 per update
    assert metrics(run, "eval")[-1]["step"] == 2 and len((run / "samples.jsonl").read_text().splitlines()) == 1


def test_test_split_as_evaluation_data(tmp_path):
    rows = [{"chosen": transcript(i, f"It is {2 * i}."), "rejected": transcript(i, "No idea!")} for i in range(9)]
    hub_dataset(tmp_path, "Anthropic/hh-rlhf", {"train": rows[:5], "test": rows[5:]})
    done = run_train(["example/qwen2.5-dpo.yml", f"model={tiny_model(tmp_path / 'model')}", "max_length=256", f"output={tmp_path / 'run'}",
                      "eval_fraction=0", "eval_data=Anthropic/hh-rlhf:test"], HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (report["eval"]["source"], report["train"]["used"], report["eval"]["used"]) == ("Anthropic/hh-rlhf:test", 5, 4)


def test_name_that_is_nowhere(tmp_path):
    hub_model(tmp_path, "Qwen/Qwen2.5-0.5B-Instruct")
    done = run_train(["example/qwen2.5-dpo.yml", f"output={tmp_path / 'run'}"], HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: 'Anthropic/hh-rlhf' is neither")
    done = run_train(["example/qwen2.5-dpo.yml", f"output={tmp_path / 'run'}", "model=Qwen/none"],
                     HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "Qwen/none" in done.stderr and "Traceback" not in done.stderr
