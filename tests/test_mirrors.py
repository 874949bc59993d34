"""Where huggingface.co does not answer: models of ModelScope, and a mirror that HF_ENDPOINT names."""
import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from helpers import ROOT, assert_same_weights, metrics, pair_rows, tiny_model, train_here, write_jsonl
from safetensors.torch import load_file

from data.errors import UserError
from engine.checkpoint import model_path
from engine.loop import Engine
from model import modelscope
from model.load import check_name
from rewards.functions import is_model

NAME = "modelscope:Qwen/Qwen2.5-0.5B-Instruct"


class Package:
    """What stands in for the package modelscope: a hub with one model, and a cache. Its calls."""

    def __init__(self, folder):
        self.folder = folder
        self.is_online = True
        self.cached = set()
        self.calls = []

    def snapshot_download(self, model_id, revision=None, cache_dir=None, local_files_only=False):
        self.calls.append((model_id, local_files_only))
        if local_files_only or not self.is_online:
            if not local_files_only or model_id not in self.cached:
                raise ConnectionError("[E1020] no route\nmore")
        elif f"modelscope:{model_id}" != NAME:
            raise ValueError(f"[E3020] {model_id} does not exist")
        self.cached.add(model_id)
        return str(self.folder)


@pytest.fixture
def package(tmp_path, monkeypatch):
    package = Package(Path(tiny_model(tmp_path / "cache")))
    module = types.ModuleType("modelscope")
    module.snapshot_download = package.snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    monkeypatch.setattr(modelscope, "directories", {})
    return package


def train(tmp_path, name, output, *words):
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    given = [f"model={name}", f"data={data}", f"output={tmp_path / output}", "eval_data=null"]
    given += ["batch_size=4", "max_steps=2", "epochs=2", *words]
    train_here(ROOT / "example" / "tiny-dpo.yml", *given)
    return tmp_path / output


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def stop_after_an_update(engine):
    """As after a SIGTERM in update 1."""
    if engine.step and engine.step.index == 1:
        engine.signals.number = signal.SIGTERM
    return engine.signals.number


def test_a_run_is_that_of_the_directory_and_records_the_name(package, tmp_path, capsys):
    """The same numbers and weights; config.yaml, the opening line and the card have the name, and the card
    the licence of the downloaded files. A process downloads it once."""
    (tmp_path / "cache" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    run = train(tmp_path, NAME, "named", f"reference={NAME}")
    other = train(tmp_path, tmp_path / "cache", "directory")
    assert metrics(run) == metrics(other)
    assert_same_weights(weights(run), weights(other))
    assert f"model: {NAME}\n" in (run / "config.yaml").read_text()
    assert f" of {NAME} on 4 examples" in (run / "events.log").read_text()
    card = (run / "final" / "README.md").read_text()
    assert f"# {NAME}, trained with dpo" in card and "license: apache-2.0\n" in card
    assert "base_model: Qwen/Qwen2.5-0.5B-Instruct\n" in card and str(tmp_path / "cache") not in card
    capsys.readouterr()
    train(tmp_path, NAME, "named", f"reference={NAME}")
    assert "is finished already" in capsys.readouterr().err
    assert package.calls == [("Qwen/Qwen2.5-0.5B-Instruct", False)]


def test_an_unfinished_run_goes_on(package, tmp_path, monkeypatch):
    """In a new process, which asks ModelScope again; but not after the files in the cache have changed."""
    words = ["save_every=1", f"reference={NAME}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Engine, "stop_requested", stop_after_an_update)
        train(tmp_path, NAME, "run", *words)
    config = package.folder / "config.json"
    before = config.read_text()
    config.write_text(before.replace("\n", "\n\n"))
    modelscope.directories.clear()
    with pytest.raises(UserError, match="config.json has changed since the run in .* started"):
        train(tmp_path, NAME, "run", *words)
    config.write_text(before)
    modelscope.directories.clear()
    run = train(tmp_path, NAME, "run", *words)
    whole = train(tmp_path, NAME, "whole", *words)
    assert "resumed from" in (run / "events.log").read_text()
    assert_same_weights(weights(run), weights(whole))
    assert len(package.calls) == 3


def test_the_cache_is_used_where_the_network_is_not_there(package, capsys):
    notices = []
    package.is_online = False
    with pytest.raises(UserError) as refused:
        model_path(NAME, notices.append)
    assert str(refused.value) == (
        f"model: ModelScope does not give {NAME} ([E1020] no route), and it is not in the cache; "
        "fix: correct the name, or connect to the network")
    package.cached.add(NAME.partition(":")[2])
    assert model_path(NAME, notices.append) == str(package.folder)
    assert notices == [f"{NAME}: ModelScope cannot be asked ([E1020] no route); "
                       "the cache is used as it is"]


@pytest.mark.parametrize("key", ["model", "reference", "reward"])
@pytest.mark.parametrize("name", ["modelscope:", "modelscope:Qwen", "modelscope:a/b/c", "modelscope:a/../b"])
def test_malformed_names(package, name, key):
    with pytest.raises(UserError) as refused:
        check_name(name, key)
    assert str(refused.value) == f"{key}: {name} does not name a model; fix: write modelscope:owner/name"
    assert package.calls == []


def test_a_name_that_is_not_there(package):
    says = r"does not give modelscope:a/b \(\[E3020\] a/b does not exist\), and it is "
    with pytest.raises(UserError, match=says):
        model_path("modelscope:a/b", print)


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    for key in ("model", "reference"):
        with pytest.raises(UserError) as refused:
            check_name(NAME, key)
        assert str(refused.value).startswith(
            f"{key}: {NAME} needs the package modelscope, which cannot be imported (")
        assert str(refused.value).endswith("); fix: pip install modelscope")


def test_a_reward_model_of_modelscope(package):
    assert is_model(NAME) and not is_model("modelscope:Qwen")


WITH_PACKAGE = """
import sys
from engine.checkpoint import model_path
from data.errors import UserError
for name in sys.argv[1:]:
    try:
        print(model_path(name, print))
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not importlib.util.find_spec("modelscope"), reason="pip install modelscope")
def test_the_package_itself_reads_its_cache(tmp_path):
    """The real package, whose hub does not answer: a model that lies in MODELSCOPE_CACHE is found, another
    one is not, and nothing but our lines is printed."""
    folder = tmp_path / "models" / "a" / "b___5"      # where the package puts a/b.5, in all its versions
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    environment = {**os.environ, "MODELSCOPE_CACHE": str(tmp_path), "MODELSCOPE_API_MAX_RETRIES": "1",
                   "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WITH_PACKAGE, "modelscope:a/b.5", "modelscope:a/c"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    told, found, missing = done.stdout.splitlines()
    assert "; the cache is used as it is" in told and found == str(folder) and done.stderr == ""
    assert missing.startswith("model: ModelScope does not give modelscope:a/c (")


# ---- HF_ENDPOINT -----------------------------------------------------------------------------------------

WITH_ENDPOINT = """
import sys
from data.errors import UserError
from data.hub import hub_rows, why_unreachable
from model.load import load_lm, load_tokenizer
print(why_unreachable("us/tiny", "model"))
load_tokenizer("us/tiny")
print(load_lm("us/tiny").config.model_type)
for call in (lambda: load_tokenizer("us/none"), lambda: list(hub_rows("us/rows"))):
    try:
        call()
    except UserError as error:
        print(error)
"""


class Mirror(http.server.SimpleHTTPRequestHandler):
    """A hub whose only repository is the model us/tiny, with the server's files."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.removeprefix(f"/us/tiny/resolve/{self.server.commit}/")
        name = name.removeprefix("/us/tiny/resolve/main/")
        if self.path in ("/api/models/us/tiny", "/api/models/us/tiny/revision/main"):
            found = {"_id": "1", "id": "us/tiny", "modelId": "us/tiny", "sha": self.server.commit,
                     "siblings": []}
            return self.reply(200, json.dumps(found).encode())
        if (self.server.folder / name).is_file():
            return self.reply(200, (self.server.folder / name).read_bytes(), name)
        code = "EntryNotFound" if "/us/tiny/" in self.path else "RepoNotFound"
        self.reply(404, b"{}", error=code)

    def reply(self, status, body, name="", error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", self.server.commit)
        if name:
            self.send_header("ETag", f'"{name}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def mirror(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.folder = Path(tiny_model(tmp_path / "files"))
    server.commit = "1" * 40
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def with_endpoint(tmp_path, port, program):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_mirror_is_asked_in_the_place_of_the_hub(mirror, tmp_path):
    """For models, their files and datasets; what it does not have is said to be missing."""
    reason, kind, no_model, no_rows = with_endpoint(tmp_path, mirror.server_port, WITH_ENDPOINT)
    assert (reason, kind) == ("None", "qwen2")
    assert no_model.startswith("model: no tokenizer can be loaded from us/none (")
    assert no_rows.startswith("'us/rows' is neither an existing file nor a dataset that the hub gives us (")
    assert {"/api/models/us/tiny", "/api/models/us/none", "/api/datasets/us/rows"} <= set(mirror.asked)
    assert any(path.endswith("/model.safetensors") for path in mirror.asked)


def test_a_mirror_that_does_not_answer_is_named(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))       # nobody listens there
        port = held.getsockname()[1]
        program = "from data.hub import why_unreachable\nprint(why_unreachable('us/tiny', 'model'))"
        line, = with_endpoint(tmp_path, port, program)
    assert line.startswith(f"no network: http://127.0.0.1:{port} does not answer (")
