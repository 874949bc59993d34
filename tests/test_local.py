"""Own data: directories, globs, what the package datasets wrote, separators, and columns with other names."""
import gzip
import json
import subprocess
import sys

import pytest
from helpers import ROOT, byte_tokenizer, refused, write_jsonl

from data.dataset import build_dataset, is_local
from data.formats import parse
from data.local import local_data
from engine.config import as_yaml, load_config
from engine.prepared import digest_of_source

TOKENIZER = byte_tokenizer()
DPO = "example/tiny-dpo.yml"


def pairs(name, count):
    return [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


def prompts(source, kind="pairs", **options):
    """(the prompts read, the Dataset)."""
    found = build_dataset(source, kind, TOKENIZER, 1000, **options)
    return [TOKENIZER.decode(example.prompt) for example in found.examples], found


def named(name, count):
    return [f"{name}{i}" for i in range(count)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parts(here):
    """Three files, one of them below and gzipped, beside things that are no data."""
    folder = here / "parts"
    (folder / "more" / ".git").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", pairs("b", 3))
    (folder / "a.csv").write_text("prompt,chosen,rejected\na0,good,bad\na1,good,bad\n")
    lines = [json.dumps(row) + "\n" for row in pairs("c", 4)]
    (folder / "more" / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "README.md").write_text("a text")
    write_jsonl(folder / ".hidden.jsonl", pairs("h", 1))
    write_jsonl(folder / "more" / ".git" / "x.jsonl", pairs("g", 1))
    return folder


# ---- directories and globs

def test_a_directory_is_read_whole(parts):
    read, found = prompts("parts")
    assert read == named("a", 2) + named("b", 3) + named("c", 4)
    assert found.notices[:2] == ["parts: 3 files: a.csv 2 rows, b.jsonl 3 rows, c.jsonl.gz 4 rows",
                                 "parts: no data files, not read: README.md"]
    assert (found.report["read"], found.report["source"]) == (9, "parts")
    assert found.examples[3].where == "parts/b.jsonl:2"


def test_links_to_directories_are_followed(parts):
    """One in the directory or outside it, as a glob follows them; none to a directory around it, and neither
    of two that lead to one another."""
    outside = parts.parent / "outside"
    outside.mkdir()
    write_jsonl(outside / "d.jsonl", pairs("d", 2))
    (parts / "far").symlink_to(outside)
    (parts / "more" / "up").symlink_to(parts)
    (outside / "back").symlink_to(parts)
    (parts / "root").symlink_to(parts.parent)
    (parts / "gone").symlink_to(parts / "nowhere")
    (parts / "itself").symlink_to(parts / "itself")
    read, _ = prompts("parts")
    assert read == named("a", 2) + named("b", 3) + named("d", 2) + named("c", 4)
    assert prompts("parts/*/d.jsonl")[0] == named("d", 2)


def test_a_glob_is_read_whole(parts):
    read, found = prompts("parts/[ab].*")
    assert read == named("a", 2) + named("b", 3)
    assert found.notices[0] == "parts/[ab].*: 2 files: a.csv 2 rows, b.jsonl 3 rows"
    assert prompts("parts/**/*.gz")[0] == named("c", 4)
    assert "no file matches parts/*.parquet" in refused(prompts, "parts/*.parquet")
    write_jsonl(parts / "[ab].jsonl", pairs("own", 1))
    assert prompts("parts/[ab].jsonl")[0] == ["own0"]      # the file of this name


def test_a_slice_of_a_hub_dataset_is_no_glob(here):
    assert not is_local("owner/name:train[:10%]") and not is_local("hh/harmless-base:test[5:]")
    assert is_local("parts/*.jsonl") and is_local("more/x[1].jsonl")


def test_many_files_are_counted_in_one_line(here):
    for i in range(25):
        write_jsonl(here / "many" / f"{i:02}.jsonl", pairs("x", 2)) if i else (here / "many").mkdir()
    _, found = prompts("many")
    assert found.notices[0].startswith("many: 24 files: 01.jsonl 2 rows, ")
    assert found.notices[0].endswith("20.jsonl 2 rows, 4 others 8 rows")


def test_a_bad_row_names_its_file(parts):
    (parts / "b.jsonl").write_text('{"prompt": "b0", "chosen": "good", "rejected": "bad"}\n{"prompt": \n')
    assert "parts/b.jsonl:2" in refused(prompts, "parts")
    (parts / "b.jsonl").write_text("")
    assert "empty, no rows in parts/b.jsonl" in refused(prompts, "parts")


@pytest.mark.parametrize("files, reads, left_out", [
    (["train.jsonl", "test.jsonl"], ["train"], ["test"]),
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
      "data/validation-00000-of-00001.jsonl"],
     ["train-00000-of-00002", "train-00001-of-00002"], ["validation-00000-of-00001"]),
    (["train/a.jsonl", "dev/b.jsonl"], ["a"], ["b"]),
    (["one.jsonl", "two.jsonl", "eval_set.jsonl"], ["one", "two"], ["eval_set"]),
    (["one.jsonl", "train.jsonl"], ["one", "train"], []),
    (["test-a.jsonl", "test-b.jsonl"], ["test-a", "test-b"], []),
    (["latest.jsonl", "contest.jsonl"], ["contest", "latest"], []),
])
def test_held_out_files_are_named_and_not_read(files, reads, left_out, here):
    for name in files:
        path = here / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, pairs(path.stem, 1))
    read, found = prompts("d")
    assert read == [f"{name}0" for name in reads]
    told = [line for line in found.notices if "held-out files are not read" in line]
    assert len(told) == bool(left_out)
    for line in told:
        assert f"not read: {', '.join(f'{name}.jsonl' for name in left_out)}; d:" in line


def test_a_split_of_a_directory(here):
    for name in ("train", "test", "valid"):
        write_jsonl(here / f"{name}.jsonl", pairs(name, 2))
    assert prompts(".:test")[0] == named("test", 2)
    assert prompts(".:validation")[0] == prompts(".:dev")[0] == named("valid", 2)
    assert prompts(".:train")[0] == named("train", 2)
    assert ". has test, train, validation, not extra" in refused(prompts, ".:extra")
    (here / "train.jsonl").unlink()
    assert "has test, validation, not train" in refused(prompts, ".")
    (here / "none").mkdir()
    assert "none is a directory without data files" in refused(prompts, "none")


def test_what_a_stored_digest_covers(parts):
    """A changed row, a new file and another name of a file, in any of the forms."""
    known = set()
    for change in (lambda: None,
                   lambda: write_jsonl(parts / "b.jsonl", pairs("z", 3)),
                   lambda: write_jsonl(parts / "more" / "d.jsonl", pairs("d", 1)),
                   lambda: (parts / "b.jsonl").rename(parts / "bb.jsonl")):
        change()
        assert digest_of_source("parts") == digest_of_source("parts")
        known.add(digest_of_source("parts"))
        assert local_data("parts").digest() == prompts("parts")[1].report["sha256"]
    assert len(known) == 4


# ---- what the package datasets writes and reads

def test_what_save_to_disk_wrote(here):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(pairs("s", 5))
    rows.save_to_disk("one")
    datasets.DatasetDict(train=rows, test=rows.select([3, 1])).save_to_disk("several")
    datasets.DatasetDict(test=rows.select([4])).save_to_disk("only")
    assert prompts("one")[0] == prompts("several")[0] == prompts("several:train")[0] == named("s", 5)
    read, found = prompts("several:test")
    assert read == ["s3", "s1"] and found.examples[1].where == "several:test:row 2"
    assert prompts("only")[0] == ["s4"]
    assert "several holds train, test, not dev" in refused(prompts, "several:dev")
    assert "one holds no splits, not test" in refused(prompts, "one:test")
    assert len({digest_of_source(name) for name in ("one", "several", "several:test")}) == 3
    (here / "one" / "state.json").write_text("{}")
    assert "the package datasets cannot read one (" in refused(prompts, "one")


README = """---
license: mit
configs:
- config_name: algebra
  data_files:
  - split: train
    path: data/a-*
  - split: test
    path: data/b-*
- config_name: logic
  data_files:
  - split: train
    path: data/c-*
---
# A dataset
"""


def test_a_clone_of_a_hub_dataset(here, monkeypatch):
    """Its README.md says which files are a split of which subset; names of files do not."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    (here / "clone" / "data").mkdir(parents=True)
    (here / "clone" / "README.md").write_text(README)
    for letter, count in (("a", 3), ("b", 2), ("c", 1)):
        write_jsonl(here / "clone" / "data" / f"{letter}-0.jsonl", pairs(letter, count))
    options = {"cache_dir": str(here / "cache")}
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: load(*args, **named, **options))
    assert prompts("clone/algebra")[0] == named("a", 3)
    assert prompts("clone/algebra:test")[0] == named("b", 2)
    assert prompts("clone/logic")[0] == named("c", 1)
    assert "clone has the subsets algebra, logic; fix: name one: clone/algebra" in refused(prompts, "clone")
    assert "cannot read clone/logic:test" in refused(prompts, "clone/logic:test")
    readme = README.replace("algebra", "default")
    (here / "clone" / "README.md").write_text(readme)
    assert prompts("clone")[0] == named("a", 3) and prompts("clone/logic")[0] == named("c", 1)


# ---- separators

@pytest.mark.parametrize("name, text", [
    ("x.csv", "prompt;chosen;rejected\n1,5?;a,b;c\n\"q;r\";\"x;y\";z\n"),
    ("x.tsv", "prompt\tchosen\trejected\n1,5?\ta,b\tc\nq;r\tx;y\tz\n"),
    ("x.csv", "\n\nprompt\tchosen\trejected\n1,5?\ta,b\tc\nq;r\tx;y\tz\n"),
    ("x.csv", "prompt,chosen,rejected\n\"1,5?\",\"a,b\",c\nq;r,x;y,z\n"),
])
def test_separators(name, text, here):
    (here / name).write_text(text)
    found = build_dataset(name, "pairs", TOKENIZER, 1000).examples
    texts = []
    for example in found:
        responses = []
        for response in example.responses:
            responses.append(TOKENIZER.decode(response.tokens, skip_special_tokens=True))
        texts.append([TOKENIZER.decode(example.prompt), *responses])
    assert texts == [["1,5?", "a,b", "c"], ["q;r", "x;y", "z"]]
    first = text.count("\n") - 1
    assert [example.where for example in found] == [f"{name}:{first}", f"{name}:{first + 1}"]


def test_numbers_and_labels_in_tsv(here):
    """All is text there, as in CSV."""
    (here / "x.tsv").write_text("prompt\tresponse\tlabel\tweight\nq\ta\ttrue\t0.5\nr\tb\tfalse\t2\n")
    found = build_dataset("x.tsv", "labelled", TOKENIZER, 1000).examples
    assert [bool(example.extras["label"]) for example in found] == [True, False]


# ---- columns

@pytest.mark.parametrize("kind, columns, fix", [
    ("pairs", ["Question", "good_answer", "bad_answer"],
     "{prompt: Question, chosen: good_answer, rejected: bad_answer}"),
    ("pairs", ["user_query", "winner", "loser"], "{prompt: user_query, chosen: winner, rejected: loser}"),
    ("pairs", ["prompt", "betterAnswer", "worseAnswer"], "{chosen: betterAnswer, rejected: worseAnswer}"),
    ("responses", ["ask", "output"], "{prompt: ask, response: output}"),
    ("responses", ["User Question", "Target", "id"], "{prompt: User Question, response: Target}"),
    ("labelled", ["query", "reply", "thumbs_up"], "{prompt: query, response: reply, label: thumbs_up}"),
    ("prompts", ["task", "tests"], "{prompt: task}"),
    ("pairs", ["prompt", "answer_a", "answer_b"], None),
    ("pairs", ["question_en", "question_de", "good", "bad"], None),
    ("responses", ["a", "b"], None),
    ("responses", ["correct", "incorrect"], None),
])
def test_an_unknown_shape_proposes_the_mapping(kind, columns, fix):
    """And what is proposed is a shape of that kind."""
    row = {name: "text" for name in columns}
    said = refused(parse, row, "x.csv:2", kind)
    assert f"found {', '.join(columns)}" in said
    assert (f'fix: write "columns={fix}" if that is meant' in said) == (fix is not None)
    assert ("columns={our name: the file's}" in said) == (fix is None)
    if fix:
        config = load_config([str(ROOT / DPO), f"columns={fix}"]).common
        renamed = {ours: "text" for ours in config.columns} | {name: "text" for name in columns}
        renamed["label"] = True
        renamed["rejected"] = "other"
        assert not isinstance(parse(renamed, "x.jsonl:2", kind), str)


def test_columns_in_yaml_and_on_the_command_line(here):
    text = "{prompt: Question, chosen: good answer, rejected: '1'}"
    expected = {"prompt": "Question", "chosen": "good answer", "rejected": "1"}
    config = (ROOT / DPO).read_text() + f"columns: {text}\n"
    (here / "x.yml").write_text(config)
    run = load_config(["x.yml"])
    assert run.common.columns == load_config([str(ROOT / DPO), f"columns={text}"]).common.columns == expected
    assert load_config(["x.yml", "columns=null"]).common.columns is None
    (here / "again.yml").write_text(as_yaml(run.common, run.config))
    assert load_config(["again.yml"]).common == run.common
    for bad in ("columns=Question", "columns={prompt: [a]}", "columns={prompt: }", "columns=[a, b]"):
        said = refused(load_config, ["x.yml", bad])
        assert "fix: give our names and the file's, such as {prompt: Question" in said


def test_a_source_s_own_columns_come_first(here):
    from types import SimpleNamespace

    from data.dataset import load_datasets
    own = [{"q": "own", "good": "a", "bad": "b"}]
    write_jsonl(here / "own.jsonl", own)
    write_jsonl(here / "other.jsonl", [{"Question": "other", "chosen": "a", "rejected": "b"}])
    write_jsonl(here / "ours.jsonl", pairs("ours", 1))
    data = [{"path": "own.jsonl", "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            {"path": "other.jsonl"}]
    common = SimpleNamespace(
        data=data, eval_data="ours.jsonl", eval_fraction=0, seed=0, max_length=100, truncate="none",
        hh="messages", system_prompt=None, columns={"prompt": "Question"})
    said = refused(load_datasets, common, "pairs", TOKENIZER, lambda text: None)
    assert "no column 'Question' in ours.jsonl:1" in said
    common.eval_data = [{"path": "ours.jsonl", "columns": {}}]
    train, held_out, _ = load_datasets(common, "pairs", TOKENIZER, lambda text: None)
    assert [TOKENIZER.decode(example.prompt) for example in train] == ["own", "other"]
    assert TOKENIZER.decode(held_out[0].prompt) == "ours0"


def test_the_proposed_command_runs(here):
    """A file of a spreadsheet, from the error to the dry run, as a user types it; evaluate.py takes the same
    key."""
    (here / "mine.csv").write_text("Question;good_answer;bad_answer\n2+2?;4;5\n3+3?;6;7\n")
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / DPO), f"model={ROOT}/example/tiny/model",
               "data=mine.csv", "eval_data=null", "--dry-run"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 2
    fix = first.stderr.partition('write "')[2].partition('"')[0]
    assert fix == "columns={prompt: Question, chosen: good_answer, rejected: bad_answer}"
    second = subprocess.run([*command, fix], capture_output=True, text=True)
    assert second.returncode == 0 and "mine.csv: 2 rows read, 2 examples used" in second.stdout
    program, model = ROOT / "evaluate.py", ROOT / "example" / "tiny" / "model"
    evaluated = [sys.executable, str(program), str(model), "data=mine.csv", fix]
    third = subprocess.run(evaluated, capture_output=True, text=True)
    assert third.returncode == 0 and "accuracy" in third.stdout
