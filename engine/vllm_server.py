"""Completions drawn by a running `vllm serve`, so that they take other GPUs than the training.

Before each rollout the weights are written to a directory that the server sees under the same path, and it
loads them from there (`/collective_rpc`, which vLLM offers with VLLM_SERVER_DEV_MODE=1). Prompts go to it as
token ids, a request each, and token ids and their log-probs come back.
"""
import http.client
import json
import os
import secrets
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from data.errors import RunError, UserError
from data.tokenise import stop_ids
from engine.checkpoint import in_dtype
from engine.ranks import PATIENCE, distributed, from_main
from engine.shares import deal, saved_tensors, share_of, write_by_all
from model.build import reshard
from model.completions import Completion
from model.load import first_line
from model.state import inside_lm, save_pretrained
from model.vllm import OtherEngine

API_KEY = "VLLM_API_KEY"               # the variable from which vLLM takes it, too
INFO = "/server_info?config_format=json"
COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
NEWER = "install vLLM 0.32 or newer there"
AGAIN = "start it again, and then this run, which goes on from its last checkpoint"
SIZES = "model_type", "vocab_size", "hidden_size", "num_hidden_layers"
FOLDER = ".weights-for-vllm"            # in the run's directory, while weights are handed over
# else those of the model's generation_config.json
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
AT_ONCE = 256                          # requests of a process in flight; vLLM queues what it cannot compute
ATTEMPTS = 5                           # at a request, 1, 2, 4 and 8 seconds apart
CLOSED = 502, 503, 504                 # what a proxy says while the server behind it cannot be reached
START = 10                             # seconds that the first question may take
REMAINING = 10                         # seconds in which the server ends what nobody waits for any more


class Cut(RuntimeError):
    """A request that was not answered, which may be sent once more."""


class Refused(RuntimeError):
    """What the server says it cannot do."""


class VllmServer(OtherEngine):
    """The server at `url`. `output`: the directory of the run, in which the weights are handed over;
    `max_length`: tokens of the longest prompt and its completion. UserError where nobody answers, or vLLM was
    started without what is needed here."""

    def __init__(self, url: str, policy, tokenizer, output: str, max_length: int):
        self.url = url.rstrip("/")
        self.folder = os.path.join(os.path.abspath(output), FOLDER)
        self.stop_ids = stop_ids(tokenizer)
        try:
            served, *_ = answer(self.url + "/v1/models", timeout=START)["data"]
            self.model, longest = served["id"], served["max_model_len"]
        except (Cut, Refused, KeyError, TypeError, ValueError) as error:
            raise UserError(f"rollout_engine: no vLLM answers at {self.url} ({first_line(error)}); "
                            f"fix: start it there ({COMMAND}), or correct the address") from error
        if longest < max_length:
            raise UserError(f"rollout_engine: the vLLM at {self.url} takes {longest} tokens, and prompt and "
                            f"completion may have {max_length}; fix: start it with --max-model-len "
                            f"{max_length}, or lower max_length")
        self.check_model(served.get("root", self.model), policy.lm.config.get_text_config())
        settings = self.checked_settings()
        self.instance = settings["instance_id"]                      # another one after a restart
        self.is_on_gpu = settings["device_config"]["device"] != "cpu"

    def check_model(self, root: str, ours) -> None:
        """UserError where the server has another model than that with the configuration `ours`. Its files
        must be seen here, too; else loading the weights shows it, which vLLM does not survive."""
        try:
            theirs = AutoConfig.from_pretrained(root, local_files_only=True).get_text_config()
        except (OSError, ValueError):
            return
        for key in SIZES:
            served, wanted = getattr(theirs, key, None), getattr(ours, key, None)
            if served != wanted:
                raise UserError(f"rollout_engine: the vLLM at {self.url} serves {root}, whose {key} is "
                                f"{served}, and that of the run's model is {wanted}; fix: serve the model of "
                                "this run there")

    def checked_settings(self) -> dict:
        """How the server was started. UserError where it takes no weights, its log-probs are not those at the
        sampling temperature, or it is several API processes."""
        try:
            settings = answer(self.url + INFO, timeout=START)["vllm_config"]
            mode = settings["model_config"]["logprobs_mode"]
            processes = settings["parallel_config"].get("_api_process_count", 1)
        except (Cut, Refused) as error:
            raise UserError(f"rollout_engine: the vLLM at {self.url} takes no weights ({first_line(error)}); "
                            f"fix: start it with {COMMAND}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"rollout_engine: the vLLM at {self.url} does not tell how it was started; "
                            f"fix: {NEWER}") from error
        if mode != "processed_logprobs":
            raise UserError(f"rollout_engine: the log-probs of the vLLM at {self.url} are {mode}, not those "
                            "at the sampling temperature; fix: start it with --logprobs-mode "
                            "processed_logprobs")
        if processes > 1:                      # each of them has another instance_id
            raise UserError(f"rollout_engine: the vLLM at {self.url} answers from {processes} processes, of "
                            "which a restart could not be told; fix: start it with --api-server-count 1")
        return settings

    # ---- the weights ---------------------------------------------------------------------------------

    def hand_over(self, policy) -> None:
        """Give the server the policy's weights, on a disk that both see, and let it drop what it has cached
        under the old ones. All ranks call this, and rank 0 speaks to the server."""
        rank, world = distributed()
        reshard(policy)
        weights = inside_lm(share_of(saved_tensors(policy), deal(policy, world)))
        if policy.precision == "bf16":
            weights = in_dtype(policy.lm, weights, torch.bfloat16)
        # a new name: the cache of a network's disk has nothing under it
        directory = os.path.join(self.folder, from_main(secrets.token_hex, 4))

        def write(temporary):
            if weights:
                save_pretrained(policy.lm, weights, temporary)
            tied = {} if self.is_on_gpu else second_names(weights)
            if tied:                                   # the CPU build packs such a head only if it is named
                save_file(tied, os.path.join(temporary, "tied.safetensors"))

        try:
            write_by_all(directory, write)
            from_main(self.load, directory)
        finally:
            if rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, directory: str) -> None:
        try:
            self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": directory}})
        except Refused as error:
            raise RunError(f"the vLLM at {self.url}, which serves {self.model}, cannot load the weights in "
                           f"{directory} ({first_line(error)}); fix: serve the model of this run, on a "
                           "machine that sees output under the same path, and start it again") from error
        for _ in range(REMAINING):
            said = self.ask("/reset_prefix_cache", {})
            if not said or said["success"]:        # earlier versions say nothing
                return
            time.sleep(1)
        raise RunError(f"the vLLM at {self.url} is computing requests of another program, which would get "
                       "the weights of this run; fix: let one run use it at a time")

    # ---- the completions -----------------------------------------------------------------------------

    def draw(self, policy, tokenizer, prompts, keys, copies, sampling, report=None) -> list:
        requests = []
        for prompt, key in zip(prompts, keys):
            request = self.request(key, copies, sampling)
            named = {"model": self.model, "prompt": prompt.tolist(), "return_token_ids": True}
            requests.append(request | named | NEUTRAL)
        found = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for group in pool.map(self.complete, requests):
                found.append(group)
                if report:
                    report(len(found) * copies, len(prompts) * copies)
        return found

    def complete(self, request: dict) -> list[Completion]:
        """The completions of one prompt."""
        try:
            choices = self.ask("/v1/completions", request)["choices"]
            return list(map(completion_of, sorted(choices, key=lambda choice: choice["index"])))
        except Refused as error:
            raise RunError(f"the vLLM at {self.url} draws no completions ({first_line(error)}); fix: look at "
                           f"its log, {AGAIN}") from error
        except (KeyError, TypeError) as error:
            raise RunError(f"the vLLM at {self.url} gives no token ids with their log-probs; "
                           f"fix: {NEWER}") from error

    # ---- requests ------------------------------------------------------------------------------------

    def ask(self, path: str, body: dict):
        """The server's answer to a POST. A request that is cut off is sent again, if the server still has the
        weights that it got; RunError where it has not, or does not come back."""
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    self.check_instance()
                return answer(self.url + path, body)
            except Cut as error:
                reason = first_line(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(2 ** attempt)
        raise RunError(f"the vLLM at {self.url} does not answer any more ({reason}); fix: {AGAIN}")

    def check_instance(self) -> None:
        if answer(self.url + INFO)["vllm_config"]["instance_id"] != self.instance:
            raise RunError(f"the vLLM at {self.url} was started anew and has not the weights of this run; "
                           "fix: start the run again, which goes on from its last checkpoint")


def answer(url: str, body: dict | None = None, timeout: float = PATIENCE.total_seconds()):
    """What a server says to a POST, or without a body to a GET, read as JSON; None where it says nothing. A
    server with a key (`vllm serve --api-key`) gets the one in the environment."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(API_KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UserError(f"rollout_engine: {url} asks for the key of the server; fix: give it in the "
                            f"environment, {API_KEY}=…") from error
        kind = Cut if error.code in CLOSED else Refused
        raise kind(reason_in(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Cut(str(getattr(error, "reason", error))) from error
    return json.loads(text) if text else None


def reason_in(error: urllib.error.HTTPError) -> str:
    """The message in an answer that says why not, else its status."""
    try:
        return json.loads(error.read())["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


def second_names(weights: dict) -> dict:
    """Copies of the weights that have another name before, such as a head that is the embedding."""
    found = {}
    seen = set()
    for name, tensor in weights.items():
        if id(tensor) in seen:
            found[name] = tensor.clone()
        seen.add(id(tensor))
    return found


def completion_of(choice: dict) -> Completion:
    tokens = np.array(choice["token_ids"], np.int32)
    logps = np.array(choice["logprobs"]["token_logprobs"], np.float32)
    return Completion(tokens, logps, choice["finish_reason"] == "stop")
