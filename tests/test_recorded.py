"""When the steps of sampling are recorded on a GPU, which is not here: what PyTorch does with graphs and
their pool stands in for it."""
import contextlib
import gc
import types
import warnings

import numpy as np
import pytest
import torch
from helpers import byte_tokenizer, config_of, random_lm

from engine.options import Sampling
from model.cache import tokens_in_memory
from model.decoding import Decoding
from model.policy import Policy
from model.recorded import Recorded
from model.sampler import sample


class Gpu:
    """PyTorch's rule for a pool: the first graph makes it, and no graph joins it once no other is in it. A
    graph cannot hold what waits for the GPU, and a capture that fails stays under way."""

    def __init__(self):
        self.mode = 0
        self.graphs = 0
        self.was_used = self.is_capturing = False

    def wait(self):
        if self.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    def set_mode(self, mode):
        self.mode = mode


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()

    class Graph:
        replays = 0

        def capture_begin(self, pool):
            if gpu.was_used and not gpu.graphs:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            gpu.was_used = gpu.is_capturing = True
            gpu.graphs += 1

        def capture_end(self):
            gpu.is_capturing = False

        def replay(self):
            self.replays += 1

        def __del__(self):
            gpu.graphs -= 1

    stand_ins = dict(
        graph_pool_handle=object, synchronize=lambda: None, CUDAGraph=Graph, Stream=object,
        stream=contextlib.nullcontext, get_sync_debug_mode=lambda: gpu.mode, set_sync_debug_mode=gpu.set_mode)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return gpu


def test_a_step_is_recorded_anew_whenever_its_tensors_are_others(gpu):
    """The first call is an ordinary one, the second is recorded, and it and the third are replayed."""
    recorded = Recorded(is_wanted=True)
    calls = []
    for times in range(1, 5):
        for _ in range(3):
            recorded(lambda: calls.append(1))
        assert len(calls) == 2 * times and recorded.graph.replays == 2 and gpu.graphs == 1
        recorded.forget()
        recorded.forget()
        assert recorded.graph is None
    del recorded
    assert gpu.graphs == 0


def test_a_step_that_waits_is_never_recorded(gpu):
    """One that waits the first time only is recorded later."""
    calls = []

    def step(waits):
        calls.append(waits)
        if waits:
            gpu.wait()

    recorded = Recorded(is_wanted=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            recorded(lambda: step(True))
    assert len(calls) == 5 and recorded.graph is None and not gpu.was_used
    assert told == [] and gpu.mode == 0
    for _ in range(3):
        recorded(lambda: step(False))
    assert recorded.graph.replays == 2


def test_where_no_step_is_recorded_each_is_called():
    calls = []
    recorded = Recorded(is_wanted=False)
    for _ in range(3):
        recorded(lambda: calls.append(1))
    assert len(calls) == 3


def test_keys_and_values_are_gone_with_the_rollout():
    """Without the cyclic collector, which may come late."""
    policy = Policy(random_lm(config_of()))
    sampling = Sampling(reward="", max_completion_length=4)
    prompts = [np.arange(3, dtype=np.int32)]
    gc.collect()
    gc.disable()
    try:
        sample(policy, byte_tokenizer(), prompts, [(0,)], 2, sampling)
        alive = [found for found in gc.get_objects() if isinstance(found, Decoding)]
    finally:
        gc.enable()
    assert alive == []


def test_memory_that_pytorch_keeps_for_itself_is_free(monkeypatch):
    """Half of what is free: 1,000 bytes on the device, and of the 5,000 that PyTorch has 3,000."""
    memory = dict(mem_get_info=(1000, 9000), memory_reserved=5000, memory_allocated=2000)
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    config = config_of(num_hidden_layers=2, **heads)
    lm = types.SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    per_token = 2 * 2 * 1 * 6 * 2      # layers x keys and values x heads x their width x bytes
    assert tokens_in_memory(lm) == (1000 + 3000) // 2 // per_token
