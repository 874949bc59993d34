"""rollout_engine: http://host:port. A stand-in server speaks vLLM's protocol, loads the weights that it is
given and draws with the own sampler; the real `vllm serve`, where it is installed, is compared with the
training forward."""
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SAMPLED,
    byte_tokenizer,
    config_of,
    metrics,
    prompt_rows,
    random_lm,
    refused,
    run_train,
    train_here,
    write_config,
    write_jsonl,
)
from test_engine_exact import PLAIN
from transformers import AutoTokenizer

import evaluate
import sample as sample_program
from data.errors import RunError, UserError
from data.pack import Example, Response
from data.tokenise import stop_ids
from engine import vllm_server
from engine.config import load_config
from engine.importance import other_engine
from engine.options import Sampling
from engine.vllm_server import VllmServer
from model.build import build_policy
from model.keys import ModelKeys
from model.sampler import sample

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
# what vLLM 0.32 takes from generation_config.json where a request does not say it, but for max_tokens
MODELS_OWN = dict(repetition_penalty=1, presence_penalty=0, frequency_penalty=0, min_p=0, top_k=0, top_p=1)
GREEDY = dict(temperature=0.0, max_completion_length=12)


class StandIn(ThreadingHTTPServer):
    """What of `vllm serve` is used. `weights`: the directory it loaded last; `asked`: the requests for
    completions; `faults`: {path: what happens at the next requests there, in order}; `refuses`: {path:
    (status, message)}."""
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokenizer = byte_tokenizer()
        self.load(folder)
        self.lock = threading.Lock()
        self.asked, self.faults, self.refuses, self.model = [], {}, {}, None
        self.device, self.mode, self.longest = "cuda", "processed_logprobs", 256
        self.instance, self.success, self.key, self.processes = "a", True, None, 1

    def load(self, directory):
        self.policy = build_policy(str(directory), self.tokenizer, ModelKeys(max_length=128))

    def answer(self, path, body):
        if path == "/v1/models":
            return {"data": [self.model or {"id": "served", "max_model_len": self.longest}]}
        if path == "/server_info?config_format=json":
            return {"vllm_config": {
                "model_config": {"logprobs_mode": self.mode},
                "device_config": {"device": self.device},
                "parallel_config": {"_api_process_count": self.processes},
                "instance_id": self.instance,
            }}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": self.success}
        assert path == "/v1/completions" and body["model"] == "served"
        assert body["return_token_ids"] and body["logprobs"] == 0
        assert body["include_stop_str_in_output"] and body["ignore_eos"] and not body["skip_special_tokens"]
        assert body["stop_token_ids"] == stop_ids(self.tokenizer)
        for name, neutral in MODELS_OWN.items():
            assert body[name] == neutral
        return {"choices": self.choices(body)[::-1]}      # in any order

    def choices(self, body):
        settings = SimpleNamespace(
            temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"],
            max_completion_length=body["max_tokens"], rollout_batch_size=64,
            stop_strings=lambda: body["stop"])
        prompt = np.array(body["prompt"], np.int32)
        with self.lock:
            self.asked.append(body)
            keys = [(body["seed"] or 0,)]
            group, = sample(self.policy, self.tokenizer, [prompt], keys, body["n"], settings)
        found = []
        for index, completion in enumerate(group):
            found.append({
                "index": index, "token_ids": completion.tokens.tolist(),
                "logprobs": {"token_logprobs": completion.logps.tolist()},
                "finish_reason": "stop" if completion.finished else "length"})
        return found


class Handler(BaseHTTPRequestHandler):
    def do_GET(self, body=None):
        server = self.server
        fault = server.faults.get(self.path, [])
        what = fault.pop(0) if fault else None
        if what == "restart":
            server.instance += "a"
        if what in ("cut", "restart"):
            self.close_connection = True
            return                                        # the connection ends without an answer
        status, answer = 200, None
        if what == "busy":
            status, answer = 503, "<html>"
        elif server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            status, answer = 401, {"error": "Unauthorized"}
        elif self.path in server.refuses:
            status, message = server.refuses[self.path]
            answer = {"error": {"message": message}}
        else:
            answer = server.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        assert self.headers["Content-Type"] == "application/json"
        self.do_GET(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A start model with a tied head whose completions do end, another one, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("model", "other")):
        lm = random_lm(config_of(tie_word_embeddings=seed == 0), seed)
        lm.lm_head.weight.data[258] *= 3
        lm.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "prompts.jsonl", prompt_rows(8))
    return folder


@pytest.fixture
def server(files):
    """It starts with another model than the run's."""
    server = StandIn(files / "other")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def policy(files):
    policy = build_policy(str(files / "model"), byte_tokenizer(), ModelKeys(max_length=128))
    with torch.no_grad():
        for parameter in policy.parameters():
            generator = torch.Generator().manual_seed(1)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * parameter.std() * noise
    return policy


@pytest.fixture
def no_sleep(monkeypatch):
    waits = []
    monkeypatch.setattr(vllm_server.time, "sleep", waits.append)
    return waits


def client(server, tmp_path, policy=None):
    policy = policy or server.policy
    return VllmServer(server.url, policy, server.tokenizer, str(tmp_path), 64)


def given(count=5):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 256, length).astype(np.int32) for length in range(3, 3 + count)]
    return prompts, [(3, i) for i in range(count)]


def settings_of(**values):
    limit = values.pop("max_completion_length", 12)
    settings = Sampling(reward="", max_completion_length=limit, stop=values.pop("stop", None))
    settings.temperature = values.pop("temperature", 1.0)
    return settings


def same(groups, others):
    for group, other in zip(groups, others, strict=True):
        for mine, theirs in zip(group, other, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.finished == theirs.finished
            assert mine.tokens.dtype == theirs.tokens.dtype and mine.logps.dtype == theirs.logps.dtype
            np.testing.assert_allclose(mine.logps, theirs.logps, rtol=0, atol=2e-5)
    return True


# ---- what is drawn -------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [None, "Q, j, 7, k, p"])
def test_greedy_completions_are_the_own_samplers(server, policy, tmp_path, stop):
    """With the weights that were handed over, not those the server began with."""
    prompts, keys = given()
    settings = settings_of(**GREEDY, stop=stop)
    told = []
    found = client(server, tmp_path).sample(
        policy, server.tokenizer, prompts, keys, 1, settings, lambda *counts: told.append(counts))
    own = sample(policy, server.tokenizer, prompts, keys, 1, settings)
    assert same(found, own) and told == [(i, 5) for i in range(1, 6)]
    assert not list(tmp_path.rglob("*.safetensors"))           # what was handed over is removed


def test_log_probs_are_those_of_the_training_forward(server, policy, tmp_path):
    prompts, keys = given()
    settings = settings_of(temperature=0.8)
    groups = client(server, tmp_path).sample(policy, server.tokenizer, prompts, keys, 3, settings)
    for prompt, group in zip(prompts, groups):
        responses = [Response.all_trained(completion.tokens) for completion in group]
        with torch.no_grad():
            logps = policy(policy.collate([Example(prompt, responses, "", {})]), 0.8)
        found = torch.from_numpy(np.concatenate([completion.logps for completion in group]))
        assert len(group) == 3
        torch.testing.assert_close(found, logps, rtol=0, atol=5e-5)


def test_seeds_depend_on_the_key_alone(server, policy, tmp_path):
    """A prompt draws the same in another batch; a server on a CPU gets no seed."""
    engine = client(server, tmp_path)
    prompts, keys = given()
    whole = engine.sample(policy, server.tokenizer, prompts, keys, 2, settings_of())
    part = engine.sample(policy, server.tokenizer, prompts[3:], keys[3:], 2, settings_of())
    assert same(whole[3:], part)
    assert len({request["seed"] for request in server.asked}) == 5
    server.device = "cpu"
    engine = client(server, tmp_path)
    server.asked.clear()
    engine.draw(policy, server.tokenizer, prompts, keys, 2, settings_of())
    assert {request["seed"] for request in server.asked} == {None}


def test_weights_in_bf16_are_rounded_before_they_are_written(server, policy, tmp_path):
    policy.precision = "bf16"
    client(server, tmp_path).hand_over(policy)
    theirs = server.policy.lm.state_dict()
    for name, weight in policy.lm.state_dict().items():
        assert torch.equal(theirs[name], weight.to(torch.bfloat16).float())


# ---- what is refused, and what goes wrong --------------------------------------------------------------

@pytest.mark.parametrize("changes, fault", [
    ({"refuses": {"/v1/models": (404, "no")}}, r"no vLLM answers at .*\(no\); fix: start it there"),
    ({"refuses": {"/server_info?config_format=json": (404, "Not Found")}},
     "takes no weights .*; fix: start it with VLLM_SERVER_DEV"),
    ({"model": {"id": "served"}}, r"no vLLM answers at .*max_model_len.*; fix: start it there"),
    ({"mode": "raw_logprobs"}, "are raw_logprobs, .*; fix: start it with --logprobs-mode processed_logprobs"),
    ({"processes": 2}, "answers from 2 processes, .*; fix: start it with --api-server-count 1"),
    ({"longest": 63}, "takes 63 tokens, .* 64; fix: start it with --max-model-len 64"),
])
def test_a_server_that_cannot_serve(server, tmp_path, changes, fault):
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=f"^rollout_engine: .*{fault}") as caught:
        client(server, tmp_path)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RunError)


@pytest.mark.parametrize("changes, fault", [
    ({"num_hidden_layers": 3}, "whose num_hidden_layers is 3, and that of the run's model is 2"),
    ({"hidden_size": 16}, "whose hidden_size is 16, and that of the run's model is 32"),
    ({"initializer_range": 0.1}, None), (None, None)])
def test_another_model_is_served(server, policy, tmp_path, changes, fault):
    """Where its files are seen; None: they are on the server's machine only."""
    if changes:
        config_of(**changes).save_pretrained(tmp_path / "theirs")
    server.model = {"id": "served", "max_model_len": 128, "root": str(tmp_path / "theirs")}
    if fault:
        assert fault in refused(client, server, tmp_path, policy)
    else:
        client(server, tmp_path, policy)


def test_a_server_with_a_key(server, policy, tmp_path, monkeypatch):
    """It has the name under which vLLM itself takes it from the environment."""
    server.key = "secret"
    fault = (f"rollout_engine: {server.url}/v1/models asks for the key of the server; fix: give it in the "
             "environment, VLLM_API_KEY=…")
    assert refused(client, server, tmp_path) == fault
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert refused(client, server, tmp_path) == fault
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine = client(server, tmp_path)
    engine.hand_over(policy)
    group, = engine.draw(policy, server.tokenizer, [np.array([81], np.int32)], [(0,)], 2, settings_of())
    assert len(group) == 2


def test_nobody_answers(tmp_path):
    says = r"^rollout_engine: no vLLM answers at http://127.0.0.1:9 \(.*refused.*\); fix: start it"
    with pytest.raises(UserError, match=says):
        VllmServer("http://127.0.0.1:9", None, byte_tokenizer(), str(tmp_path), 64)


@pytest.mark.parametrize("value, accepted", [
    ("vllm", True), ("http://host:8000", True), ("https://host", True), ("http://10.0.0.1:1/", True),
    ("vlm", False), ("host:8000", False), ("http://host:8000/v1", False), ("http://host:port", False),
    ("http://:80", False)])
def test_addresses(files, tmp_path, monkeypatch, value, accepted):
    monkeypatch.setattr("engine.options.find_spec", lambda name: name)
    path = write_config(tmp_path / "run.yml", algorithm="grpo", reward="r1_zero", model=files / "model",
                        data=files / "prompts.jsonl", rollout_engine=value)
    if accepted:
        assert load_config([path]).config.rollout_engine == value
    else:
        error = refused(load_config, [path])
        assert error.startswith("rollout_engine (") and "fix: give vllm or http://host:port" in error


@pytest.mark.parametrize("keys, fix", [
    ({"top_k": 3}, "top_p=1 and top_k=0"), ({"lora_r": 4}, "remove lora_r")])
def test_what_a_server_cannot_do_is_refused(files, tmp_path, keys, fix):
    path = write_config(tmp_path / "run.yml", algorithm="grpo", reward="r1_zero", model=files / "model",
                        data=files / "prompts.jsonl", rollout_engine="http://host:1", **keys)
    error = refused(load_config, [path])
    assert "rollout_engine" in error and f"fix: {fix}" in error


def test_an_adapter_is_refused():
    policy = SimpleNamespace(lm=SimpleNamespace(peft_config={}))
    settings = Sampling(reward="", rollout_engine="http://host:1")
    error = refused(other_engine, policy, None, settings, 64, 0, "")
    assert "is an adapter; fix: give a merged model" in error


@pytest.mark.parametrize("path, fault", [
    ("/collective_rpc",
     "cannot load the weights in .* \\(.*size mismatch\\); fix: serve the model of this run"),
    ("/v1/completions", "draws no completions \\(.*size mismatch\\); fix: look at its log, start it again")])
def test_what_the_server_says_is_told(server, policy, tmp_path, path, fault):
    engine = client(server, tmp_path)
    server.refuses[path] = 500, "size mismatch\nsee above"
    with pytest.raises(RunError, match=fault) as caught:
        engine.sample(policy, server.tokenizer, *given(), 1, settings_of())
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.safetensors"))


def test_an_older_vllm_tells_its_settings_as_text(server, tmp_path, monkeypatch):
    known = server.answer

    def older(path, body):
        return {"vllm_config": "mode"} if "info" in path else known(path, body)

    monkeypatch.setattr(server, "answer", older)
    error = refused(client, server, tmp_path)
    assert "does not tell how it was started; fix: install vLLM 0.32 or newer there" in error


def test_an_older_vllm_gives_no_token_ids(server, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "choices", lambda body: [{"index": 0, "text": "a"}])
    says = "gives no token ids with their log-probs; fix: install vLLM 0.32 or newer there"
    with pytest.raises(RunError, match=says):
        client(server, tmp_path).sample(policy, server.tokenizer, *given(), 1, settings_of())


def test_another_program_uses_the_server(server, policy, tmp_path, no_sleep):
    server.success = False
    with pytest.raises(RunError, match="requests of another program.*; fix: let one run use it at a time"):
        client(server, tmp_path).hand_over(policy)
    assert len(no_sleep) == 10


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"])
@pytest.mark.parametrize("kind", ["cut", "busy"])
def test_a_request_that_is_cut_off_is_sent_again(server, policy, tmp_path, no_sleep, path, kind):
    engine = client(server, tmp_path)
    prompts, keys = given()
    whole = engine.sample(policy, server.tokenizer, prompts, keys, 2, settings_of())
    server.faults[path] = [kind] * 3
    assert same(engine.sample(policy, server.tokenizer, prompts, keys, 2, settings_of()), whole)
    assert server.faults[path] == [] and len(no_sleep) == 3


def test_a_server_that_stays_away_ends_the_run(server, policy, tmp_path, no_sleep):
    engine = client(server, tmp_path)
    server.faults["/collective_rpc"] = ["cut"] * 9
    says = "does not answer any more .*; fix: start it again, and then this run, which goes on"
    with pytest.raises(RunError, match=says):
        engine.hand_over(policy)
    assert no_sleep == [1, 2, 4, 8]


def test_a_server_that_was_started_anew_has_not_the_weights(server, policy, tmp_path, no_sleep):
    engine = client(server, tmp_path)
    server.faults["/v1/completions"] = ["restart"]
    says = "was started anew and has not the weights of this run; fix: start the run again"
    with pytest.raises(RunError, match=says):
        engine.sample(policy, server.tokenizer, *given(1), 1, settings_of())


# ---- runs ----------------------------------------------------------------------------------------------

def keys_of_run(server, files, **values):
    return PLAIN | SAMPLED | dict(
        algorithm="grpo", model=files / "model", data=files / "prompts.jsonl", rollout_engine=server.url,
        num_generations=4, batch_size=4, eval_every=1000, max_steps=3, micro_batch_tokens=200,
        lr=1e-2) | values


def test_every_rollout_is_drawn_with_the_weights_of_then(server, files, tmp_path):
    train_here(write_config(tmp_path / "run.yml", **keys_of_run(server, files, output=tmp_path / "run")))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3 and len(server.asked) == 3 * 4
    for row in rows:
        assert row["sampling/sampling_logp_difference/mean"] < 1e-5
        for name in "mean", "min", "max":
            assert row[f"sampling/importance_ratio/{name}"] == pytest.approx(1, abs=1e-4)
    assert not list((tmp_path / "run").glob(".*"))


def test_two_processes_are_one(server, files, tmp_path):
    """Sharded weights are gathered, each rank asks for its share, and extremes are those of both."""
    found = []
    for processes in 1, 2:
        output = tmp_path / f"run-{processes}"
        keys = keys_of_run(server, files, output=output)
        done = run_train([write_config(tmp_path / f"{processes}.yml", **keys)], processes)
        assert done.returncode == 0, done.stderr
        found.append(metrics(output))
    one, two = found
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_evaluate_and_sample(server, files, tmp_path):
    """Greedy completions are those of the own sampler, and several drawn ones do come."""
    words = [str(files / "model"), f"data={files / 'prompts.jsonl'}", f"reward={SAMPLED['reward']}",
             "max_completion_length=10"]
    texts = []
    for name, more in ("own", []), ("server", [f"rollout_engine={server.url}"]):
        evaluate.main([*words, *more, "temperature=0", f"output={tmp_path / name}"])
        lines = (tmp_path / name / "prompts_eval_results.jsonl").read_text()
        texts.append(lines)
    assert texts[0] == texts[1] and len(server.asked) == 4 + 8      # four are compared before
    try:
        sample_program.main([*words, "n=4", f"rollout_engine={server.url}", f"output={tmp_path / 's'}"])
    except RunError as error:                             # no completion of these may end by itself
        assert "no completion is kept" in str(error)
    rows = [json.loads(line) for line in (tmp_path / "s" / "samples_results.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and len({row["generation"] for row in rows}) > 8


# ---- the real one --------------------------------------------------------------------------------------

TINY = ROOT / "example" / "tiny" / "model"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The address of `vllm serve`. Its command looks for a package that is named vllm; that of the CPU build
    is not."""
    folder = tmp_path_factory.mktemp("serve")
    port = 8000 + os.getpid() % 1000
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY),
               "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256",
               "--logprobs-mode", "processed_logprobs", "--enforce-eager", "--dtype", "float32",
               "--gpu-memory-utilization", "0.3"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@needs_vllm
def test_the_real_server(real, tmp_path):
    """Before and after the weights have moved: the log-probs are those of the training forward, and greedy
    completions the own sampler's."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    policy = build_policy(str(TINY), tokenizer, ModelKeys(max_length=256))
    engine = VllmServer(real, policy, tokenizer, str(tmp_path), 256)
    texts = [f"Leo has {i} apples, Max has 56. How many more has Leo?" for i in range(60, 65)]
    # whole characters: vLLM's text of a completion may begin with those that the prompt leaves open
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
    _, keys = given()
    for update in 0.0, 0.1:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += update * parameter.std() * torch.randn_like(parameter)
        settings = settings_of(temperature=0.8, max_completion_length=20)
        groups = engine.sample(policy, tokenizer, prompts, keys, 4, settings)
        for prompt, group in zip(prompts, groups):
            responses = [Response.all_trained(completion.tokens) for completion in group]
            with torch.no_grad():
                logps = policy(policy.collate([Example(prompt, responses, "", {})]), 0.8)
            found = torch.from_numpy(np.concatenate([completion.logps for completion in group]))
            torch.testing.assert_close(found, logps, rtol=0, atol=5e-5)
        for stop in None, "7, e, a":
            settings = settings_of(**GREEDY, stop=stop)
            found = engine.draw(policy, tokenizer, prompts, keys, 1, settings)
            for (mine,), (theirs,) in zip(found, sample(policy, tokenizer, prompts, keys, 1, settings)):
                assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.finished == theirs.finished
