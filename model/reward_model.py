"""A reward model: a causal LM's trunk under a linear head that scores responses."""
import os

import torch
from safetensors.torch import load_file
from torch import nn

from data.errors import UserError
from data.pack import Batch
from model.load import check_finite, first_line
from model.policy import Policy
from model.varlen import laid_out

VALUE_HEAD = "value_head.safetensors"        # beside a reward model's trunk, with these two tensors
HEAD_WEIGHT = "v_head.summary.weight"        # (1, D)
HEAD_BIAS = "v_head.summary.bias"            # (1,)


def saved_head(path: str, notice) -> torch.Tensor:
    """The head (1, D) of the reward model at `path`. Ours has no bias: a notice says that one is left out."""
    file = os.path.join(path, VALUE_HEAD)
    try:
        tensors = load_file(file)
    except Exception as error:  # noqa: BLE001  somebody else's file
        said = first_line(error)
        raise UserError(f"model: {file} cannot be loaded ({said}); fix: check the file") from error
    if HEAD_WEIGHT not in tensors:
        found = ", ".join(tensors) or "nothing"
        raise UserError(f"model: {file} holds {found}, not {HEAD_WEIGHT}; fix: pass a reward model")
    if HEAD_BIAS in tensors and tensors[HEAD_BIAS].any():
        bias = float(tensors[HEAD_BIAS])
        notice(f"{file}: its bias {bias:.4g}, the same for every response, is left out of the scores")
    check_finite([(VALUE_HEAD, tensors[HEAD_WEIGHT])], path)
    return tensors[HEAD_WEIGHT]


class RewardModel(Policy):
    """A causal LM's trunk under a linear head without bias: `reward_model(batch)` -> (S,) fp32, a score per
    response.

    The score is read at the response's last token, by position, so it does not depend on the pad token."""

    def __init__(self, policy: Policy, head: torch.Tensor):
        super().__init__(policy.lm, policy.precision, policy.form)
        self.is_compiled = policy.is_compiled
        self.value_head = linear_head(head, policy.device)

    token_logps = Policy.forward

    def forward(self, batch: Batch):
        batch = laid_out(batch, self)
        hidden = self.hidden(batch, input_ids=batch.tokens[None])      # (T, D)
        states = hidden.index_select(0, batch.last)                    # (S, D)
        return self.value_head(states.float())[:, 0]


def linear_head(weight: torch.Tensor, device) -> nn.Linear:
    """weight (1, D) -> a trainable head in fp32, D numbers to one"""
    head = nn.Linear(weight.shape[1], 1, bias=False, device=device)
    head.weight.data.copy_(weight)
    return head


def hidden_size(policy: Policy) -> int:
    """The width D of the last hidden states, which is not that of the layers in OPT-350M."""
    return policy.lm.get_output_embeddings().weight.shape[1]


def is_reward_model(path: str) -> bool:
    return os.path.exists(os.path.join(path, VALUE_HEAD))


def build_reward_model(policy: Policy, path: str, seed: int, notice=print) -> RewardModel:
    """The trunk of `policy` under the head saved at `path`, else under a fresh one from N(0, 1 / (D + 1))."""
    if is_reward_model(path):
        return RewardModel(policy, saved_head(path, notice))
    size = hidden_size(policy)
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, size, generator=generator) / (size + 1) ** 0.5
    return RewardModel(policy, head)
