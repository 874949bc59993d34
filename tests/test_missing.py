"""What is not there: local paths are answered without the hub, and a hub that cannot be reached is named as
the cause, at once."""
import os
import socket

import huggingface_hub
import pytest
import robust_helpers as child
from helpers import pair_rows, tiny_model, train_here
from test_hub import hub_dataset, hub_model

import evaluate
import sample
from data.errors import UserError
from data.hub import hub_rows, why_unreachable
from model.load import check_name, check_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(tmp_path, model, monkeypatch):
    child.project(tmp_path, "dpo", model, max_steps=1)
    for name in ("one", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words, says", [
    ("model=./nothing", "model: there is no directory ./nothing; fix: correct the path"),
    ("model=runs/nothing", "model: there is no directory runs/nothing (runs holds one, other); fix"),
    ("model=/nowhere/nothing", "model: there is no directory /nowhere/nothing"),
    ("model=some/where/nothing", "no directory some/where/nothing"),
    ("model=../nothing", "no directory ../nothing"),
    ("model=data.jsonl", "data.jsonl is a file, not a directory with a model"),
    ("model=pairs.parquet", "no file pairs.parquet"),
    ("model=weights.safetensors", "no file weights.safetensors"),
    ("model=smollm2.gguf", "model: there is no file smollm2.gguf; fix: correct the path"),
    ("reference=./nothing", "reference: there is no directory ./nothing"),
    ("reference=runs/oter", "(runs holds one, other)"),
    ("reference=./nothing --dry-run", "reference: there is no directory ./nothing"),
    ("data=./nothing", "no file nothing"),
    ("data=runs/nothing", "no file runs/nothing"),
    ("data=../some/nothing", "no file ../some/nothing"),
    ("data=nothing.jsonl", "no file nothing.jsonl"),
    ("eval_data=./nothing", "no file nothing"),
    ("algorithm=grpo reward=./nothing.py:f max_completion_length=8", "nothing.py in reward does not exist"),
    ("algorithm=grpo reward=runs/nothing max_completion_length=8", "'runs/nothing' in reward is neither"),
])
def test_local_paths_do_not_ask_the_hub(words, says, project, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("an address is looked up")
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as caught:
        train_here("config.yml", *words.split())
    assert says in str(caught.value) and "; fix: " in str(caught.value)


def cut_network():
    """In the child: every look-up of an address fails, and is counted in asked.txt."""
    def getaddrinfo(*arguments, **options):
        with open("asked.txt", "a") as file:
            file.write("asked\n")
        raise socket.gaierror(-2, "Name or service not known")
    socket.getaddrinfo = getaddrinfo
    import datasets
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


@pytest.mark.parametrize("words, says", [
    ("model=nobody/nothing", "model: no network: https://huggingface.co does not answer ("),
    ("reference=nobody/nothing", "reference: no network: https://huggingface.co does not answer ("),
    ("data=nobody/nothing", "no network: https://huggingface.co does not answer ("),
])
def test_no_network_is_the_first_cause(words, says, project, tmp_path):
    """One line, without the hub client's retries, which wait for half a minute in all."""
    result = child.train(tmp_path, words, patch=cut_network)
    *before, line = result.err.splitlines()
    assert result.code == 2 and line.startswith(f"error: {says}") and "in its cache; fix: " in line
    assert "Retrying" not in result.err and "Traceback" not in result.err
    assert len((tmp_path / "asked.txt").read_text().splitlines()) <= 2


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """In this process, with a cache below tmp_path; what it changes for good is put back."""
    def fail(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_without_network_the_cache_is_used(no_network, tmp_path):
    hub_model(tmp_path, "owner/model")
    hub_dataset(tmp_path, "owner/pairs", {"train": pair_rows(3)})
    check_name("owner/model")
    assert [row["prompt"] for _, row in hub_rows("owner/pairs")] == [row["prompt"] for row in pair_rows(3)]
    assert huggingface_hub.constants.HF_HUB_OFFLINE      # and nothing else is asked for in this process
    with pytest.raises(UserError, match="reference: the hub is not asked, .*, and owner/other is neither"):
        check_name("owner/other", "reference")


def test_a_hub_that_answers_is_left_to_loading(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    for error in (None, huggingface_hub.errors.RepositoryNotFoundError("404", response=response)):
        def repo_info(self, repo, *, repo_type, timeout, error=error):
            assert (repo, repo_type) == ("owner/name", "model") and timeout <= 10
            if error:
                raise error
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
        assert why_unreachable("owner/name", "model") is None
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "01-ai/Yi-6B", "a-b/c_d.e"])
def test_names_of_the_hub_are_no_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_path(name)


@pytest.mark.parametrize("program, words", [
    (evaluate, "./nothing --data d.jsonl --n 1"),
    (evaluate, "--model ./nothing --data=d.jsonl --temperature 1 n=1"),
    (sample, "./nothing --data d.jsonl --reward gsm8k --n 2 --max-completion-length 5"),
])
def test_evaluate_and_sample(program, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no directory ./nothing"):
        program.main(words.split())
    assert os.listdir(tmp_path) == []
