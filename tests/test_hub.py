"""The real-model configurations, unchanged, against a hub cache laid out for their exact names: the loading code is the real one.
And the datasets with short names, on rows with the columns they are published with."""
import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter
from helpers import ROOT, byte_tokenizer, metrics, tiny_model

from data.dataset import build_dataset
from data.errors import UserError
from data.hub import hub_rows
from data.scored import html_to_text


def hub_model(home, name, **config):
    """Lay a tiny model out as the hub's cache holds it: snapshots/<commit>, refs/main."""
    folder, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    tiny_model(folder / "snapshots" / commit, **config)


def hub_dataset(home, name, splits, config="default"):
    """Lay a dataset out as `datasets` keeps what it has loaded from the hub."""
    owner, short = name.split("/")
    folder = home / "datasets" / f"{owner}___{short}" / config / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    features, infos = Dataset.from_list(next(iter(splits.values()))).features, SplitDict(dataset_name=short)
    for split, rows in splits.items():
        with ArrowWriter(features=features, path=str(folder / f"{short}-{split}.arrow")) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        infos.add(SplitInfo(split, num_examples=len(rows), dataset_name=short))
    DatasetInfo(features=features, splits=infos, config_name=config, dataset_name=short, version="0.0.0").write_to_directory(folder)


def transcript(i, reply):
    return f"\n\nHuman: What is {i} and {i}?\n\nAssistant: Why do you ask?\n\nHuman: I wonder.\n\nAssistant: {reply}"


PROGRAM = """
import sys
import train
from data.errors import UserError
for argv in sys.argv[1:]:
    try:
        train.main(argv.split())
    except UserError as error:
        print(f"error: {error}", flush=True)
"""


def train_offline(home, argvs):
    """train.py for each of these texts of arguments, with the hub cache `home`, which a process reads when it
    starts. In one process, since importing everything takes longer than training. -> CompletedProcess; a
    UserError is a line of its stdout."""
    environment = {
        **os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", PROGRAM, *argvs]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_real_configuration_runs_two_updates(tmp_path):
    """All of them unchanged but for max_steps (and the length of rollouts: a random model never stops by
    itself)."""
    hh = [{"chosen": transcript(i, f"It is {2 * i}."), "rejected": transcript(i, "No idea!")} for i in range(420)]
    user, reply = ({"role": role, "content": "Hello"} for role in ("user", "assistant"))
    chats = [{"prompt": "Hello", "prompt_id": str(i), "messages": [user | {"content": f"Hi {i}"}, reply, user, reply]}
             for i in range(600)]
    preferences = [{"prompt": f"Say {i}", "prompt_id": str(i), "chosen": [user | {"content": f"Say {i}"}, reply | {"content": str(i)}],
                    "rejected": [user | {"content": f"Say {i}"}, reply], "messages": [user, reply], "score_chosen": 8.0,
                    "score_rejected": 3.0} for i in range(80)]
    texts = [{"text": text} for text in [" = Heading = \n", ""] + [f" Some text , number {i} . \n" for i in range(1300)]]
    hub_dataset(tmp_path, "Anthropic/hh-rlhf", {"train": hh, "test": hh[:4]})
    hub_dataset(tmp_path, "HuggingFaceH4/ultrachat_200k", {"train_sft": chats})
    hub_dataset(tmp_path, "HuggingFaceH4/ultrafeedback_binarized", {"train_prefs": preferences, "test_prefs": preferences[:5]})
    hub_dataset(tmp_path, "Salesforce/wikitext", {"train": texts}, config="wikitext-103-raw-v1")
    problems = [{"question": f"Ann has {i} eggs and buys {i} more. How many?",
                 "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(4)]
    hub_dataset(tmp_path, "openai/gsm8k", {"train": problems, "test": problems[:1]}, config="main")
    for name in ("0.5B-Instruct", "0.5B", "1.5B", "7B", "7B-Instruct"):
        hub_model(tmp_path, f"Qwen/Qwen2.5-{name}", max_position_embeddings=4096)
    names = {path.stem for path in (ROOT / "example").glob("qwen2.5-*.yml")} - {"qwen2.5-dpo-qlora"}             # needs CUDA
    runs = {"qwen2.5-7b-dpo": f"model={tmp_path / 'qwen2.5-7b-sft'}", "qwen2.5-ppo": f"reward={tmp_path / 'qwen2.5-rm'}"}
    names = sorted(names, key=runs.__contains__)                                 # the last ones start from earlier runs
    argvs = []
    for name in names:
        path = ROOT / "example" / f"{name}.yml"
        short = "max_completion_length=16" if "max_completion_length" in path.read_text() else ""
        argvs.append(f"{path} max_steps=2 output={tmp_path / name} {short} {runs.get(name, '')}")
    done = train_offline(tmp_path, argvs)
    assert done.returncode == 0 and "error: " not in done.stdout, done.stdout + done.stderr
    for name in names:
        assert [row["step"] for row in metrics(tmp_path / name)] == [1, 2], name
        assert (tmp_path / name / "final" / "manifest.json").exists(), name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub cache with one model and hh, and runs/NAME of configurations that are unchanged, or take the test
    split to evaluate, or name what is nowhere; errors.txt has the lines of the latter two."""
    home = tmp_path_factory.mktemp("home")
    rows = [{"chosen": transcript(i, f"It is {2 * i}."), "rejected": transcript(i, "No idea!")} for i in range(71)]
    hub_model(home, "Qwen/Qwen2.5-0.5B-Instruct", max_position_embeddings=2048)
    hub_dataset(home, "Anthropic/hh-rlhf", {"train": rows, "test": rows[:4]})
    model = tiny_model(home / "model")
    cases = {
        "dpo": "dpo.yml",
        "sft": "sft.yml",
        "split": f"dpo.yml model={model} max_length=256 eval_fraction=0 eval_data=hh:test max_steps=1",
        "no-data": "dpo.yml data=HuggingFaceH4/ultrafeedback_binarized",
        "no-model": "dpo.yml model=Qwen/none",
    }
    argvs = [f"example/qwen2.5-{words} output={home / 'runs' / name}" for name, words in cases.items()]
    done = train_offline(home, argvs)
    assert done.returncode == 0, done.stderr
    (home / "errors.txt").write_text(done.stdout)
    return home


def data_report(home, name):
    return json.loads((home / "runs" / name / "run.json").read_text())["data"]


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_real_configuration_from_the_hub_cache(home, algorithm):
    report, run = data_report(home, algorithm), home / "runs" / algorithm
    assert (report["train"]["source"], report["train"]["used"], report["eval"]["used"]) == ("Anthropic/hh-rlhf", 70, 1)
    assert [row["step"] for row in metrics(run)] == [1, 2]                       # 70 rows, 64 per update
    assert metrics(run, "eval")[-1]["step"] == 2 and len((run / "samples.jsonl").read_text().splitlines()) == 1


def test_test_split_as_evaluation_data(home):
    report = data_report(home, "split")
    assert (report["eval"]["source"], report["train"]["used"], report["eval"]["used"]) == ("hh:test", 71, 4)


def test_name_that_is_nowhere(home):
    lines = (home / "errors.txt").read_text().splitlines()
    no_data, no_model = [line for line in lines if line.startswith("error: ")]
    cause = "the hub is not asked, since HF_HUB_OFFLINE is set"
    assert no_data.startswith(f"error: {cause}, and 'HuggingFaceH4/ultrafeedback_binarized' is neither")
    assert "Qwen/none" in no_model


# ---- shp and se ----

@pytest.fixture
def published(monkeypatch):
    """-> a function: let load_dataset give these rows; the list of its calls."""
    def publish(rows):
        calls = []
        monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: calls.append((*names, options)) or rows)
        return calls
    return publish


def shp_row(history, score_a, score_b, labels=None, **values):
    return {"post_id": "p", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": history, "c_root_id_A": "a",
            "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": score_a, "score_B": score_b,
            "human_ref_A": f"A{score_a}", "human_ref_B": f"B{score_b}", "labels": int(score_a > score_b) if labels is None else labels,
            "seconds_difference": 1.0, "score_ratio": 2.0} | values


def rows_and_reasons(name, **options):
    rows = list(hub_rows(name, **options))
    return ([(where.rpartition(":")[2], row) for where, row in rows if not isinstance(row, str)],
            [(where.rpartition(":")[2], row) for where, row in rows if isinstance(row, str)])


def test_shp(published):
    calls = published([shp_row("x", 8, 4), shp_row("x", 4, 9), shp_row("y", 7, 4), shp_row("y", 0, 4), shp_row("y", -3, -1)])
    rows, reasons = rows_and_reasons("shp")
    user = [{"role": "user", "content": "x"}]
    assert rows == [("1", {"prompt": user, "chosen": "A8", "rejected": "B4"}), ("2", {"prompt": user, "chosen": "B9", "rejected": "A4"})]
    assert reasons == [("3", "scores closer than a factor of 2"), ("4", "a score of 0 or less"), ("5", "a score of 0 or less")]
    rows, _ = rows_and_reasons("shp/askculinary:test", chat=False)
    assert rows[0][1] == {"prompt": "\n\nHuman: x\n\nAssistant:", "chosen": " A8", "rejected": " B4"}
    rows, reasons = rows_and_reasons("shp", kind="responses")                  # the best response, once per prompt
    assert rows == [("2", {"prompt": user, "response": "B9"}), ("3", {"prompt": [{"role": "user", "content": "y"}], "response": "A7"})]
    assert {reason for _, reason in reasons} == {"another response to this prompt has a higher score"} and len(reasons) == 3
    assert calls[:2] == [("stanfordnlp/SHP", {"split": "train"}), ("stanfordnlp/SHP", "askculinary", {"split": "test"})]


def test_shp_trusts_its_labels_and_caps_the_pairs_of_a_prompt(published):
    published([shp_row("x", 8, 4, labels=0)])
    assert rows_and_reasons("shp")[0][0][1]["chosen"] == "B4"
    published([shp_row("x", 2 * i, i) for i in range(1, 10)] + [shp_row("y", 4, 2)])
    rows, reasons = rows_and_reasons("shp", seed=1)
    assert len(rows) == 6 and rows[-1][0] == "10" and [reason for _, reason in reasons] == ["more than 5 pairs of one prompt"] * 4
    assert rows_and_reasons("shp", seed=1)[0] == rows and any(rows_and_reasons("shp", seed=seed)[0] != rows for seed in (2, 3))
    for bad in {"history": None}, {"labels": 2}, {"score_A": None}:
        published([shp_row("x", 8, 4), shp_row("x", 8, 4) | bad])
        with pytest.raises(UserError, match="not a row of SHP .*stanfordnlp/SHP:train:2; fix: "):
            list(hub_rows("shp"))


def se_row(number, *scores):
    answers = [{"answer_id": i, "author": "x", "author_id": 1, "author_profile": "https://x", "pm_score": score, "selected": i == 0,
                "text": f"<p>answer <em>{i}</em></p>"} for i, score in enumerate(scores)]
    return {"qid": number, "question": f"<p>Why {number}?</p>", "answers": answers, "date": "2012/05/15", "metadata": ["https://x"]}


def test_se(published):
    rows = [se_row(i, *scores) for i, scores in enumerate([(1, 3, 1), (2,), (), (5, 5)])]
    published(rows)
    pairs, reasons = rows_and_reasons("se")
    prompt = [{"role": "user", "content": "Why 0?"}]
    assert pairs == [("1", {"prompt": prompt, "chosen": "answer 1", "rejected": f"answer {i}"}) for i in (0, 2)]
    assert reasons == [("1", "answers with equal scores"), ("2", "too few answers"), ("3", "too few answers"),
                       ("4", "answers with equal scores")]
    pairs, reasons = rows_and_reasons("se", kind="responses", chat=False)
    assert [row["response"] for _, row in pairs] == [" answer 1", " answer 0", " answer 0"]
    assert pairs[0][1]["prompt"] == "\n\nHuman: Why 0?\n\nAssistant:" and reasons == [("3", "too few answers")]
    published([se_row(0, *range(7))])
    pairs, reasons = rows_and_reasons("se", seed=3)
    assert len(pairs) == 5 and len(reasons) == 7 * 6 // 2 - 5 and rows_and_reasons("se", seed=3)[0] == pairs
    assert all(row["chosen"] > row["rejected"] for _, row in pairs)            # "answer 6" > "answer 5"
    published([se_row(0, 1, 2) | {"question": "<img src=x>"}])
    assert rows_and_reasons("se")[1] == [("1", "no text in the HTML")]
    published([{"question": "x", "answers": [{"text": "y"}]}])
    with pytest.raises(UserError, match="not a row of stack-exchange-preferences .*preferences:train:1; fix: "):
        list(hub_rows("se"))


def test_test_questions_of_se_are_never_trained(published):
    calls = published([se_row(i, 2, 1) for i in range(4000)])
    train, test = ({row["prompt"][0]["content"] for _, row in rows_and_reasons(name)[0]} for name in ("se", "se:test"))
    assert not train & test and len(train) + len(test) == 4000 and 15 <= len(test) <= 70
    assert [call[-1]["split"] for call in calls] == ["train", "train"]
    rows_and_reasons("se:train[:10%]")
    assert calls[-1] == ("HuggingFaceH4/stack-exchange-preferences", {"split": "train[:10%]"})


@pytest.mark.parametrize("name", ["shp", "se"])
def test_examples_of_scored_datasets(published, name):
    published([shp_row("x" * 3, 8, 4), shp_row("y", 7, 4)] if name == "shp" else [se_row(1, 3, 1, 1)])
    counts = {"pairs": 1, "labelled": 2, "responses": 2} if name == "shp" else {"pairs": 2, "labelled": 4, "responses": 1}
    for kind, used in counts.items():
        dataset = build_dataset(name, kind, byte_tokenizer(), 200)
        assert (dataset.report["source"], dataset.report["used"]) == (name, used)
    tokenizer = byte_tokenizer(chat_template=False)
    example = build_dataset(name, "pairs", tokenizer, 200).examples[0]
    assert tokenizer.decode(example.prompt) == f"\n\nHuman: {'xxx' if name == 'shp' else 'Why 1?'}\n\nAssistant:"
    assert tokenizer.decode(example.responses[0].tokens).startswith(" ")


@pytest.mark.parametrize("html, text", [
    ("<p>Use <em>this</em>, a <a href='x'>link</a> and <code>f(x)</code>.</p>\n\n<p>Then<br>that &lt;b&gt; &amp; more</p>",
     "Use this, a link and f(x).\n\nThen\nthat <b> & more"),
    ("<p>So:</p><pre><code>if a:\n    b  = 1\n</code></pre><p>done</p>", "So:\n\n<code>if a:\n    b  = 1\n</code>\n\ndone"),
    ("<ul>\n<li>one</li>\n<li><p>two</p></li>\n</ul>\n<ol><li>a</li><li>b<ul><li>c</li></ul></li></ol>",
     "- one\n- two\n\n1. a\n2. b\n  - c"),
    ("bare <b>text</b>\n<blockquote><p>quoted</p></blockquote><h2>Title</h2>end", "bare text\n\nquoted\n\nTitle\n\nend"),
    ("<table><tr><td>1</td><td>2</td></tr></table><p>unclosed <b>tag", "1 2\n\nunclosed tag"),
    ("<p> \n</p><hr><img src='x' alt='y'>", ""),
    ("a < b, 中文 😀 &#128512;", "a < b, 中文 😀 😀"),
])
def test_html_to_text(html, text):
    assert html_to_text(html) == text
