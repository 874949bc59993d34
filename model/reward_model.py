"""A reward model: a causal LM's trunk under a linear head that scores responses."""
import os

import torch
from safetensors.torch import load_file
from torch import nn

from data.errors import UserError
from data.pack import Batch
from model.load import check_finite, first_line
from model.policy import Policy

VALUE_HEAD = "value_head.safetensors"        # beside a reward model's trunk, with these two: (1, D) and (1,)

HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"


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
    """A causal LM's trunk under a linear head without bias: `reward_model(batch)` -> (S,) fp32, a score per response.

    The score is read at the response's last token, by position, so a pad token equal to eos cannot move it."""

    def __init__(self, policy: Policy, head: torch.Tensor):
        super().__init__(policy.lm, policy.precision, policy.share_prompt)
        self.value_head = nn.Linear(head.shape[1], 1, bias=False, device=policy.device)
        self.value_head.weight.data.copy_(head)

    def forward(self, batch: Batch):
        hidden = self.hidden(batch, input_ids=batch.tokens[None]).index_select(0, batch.last)      # (S, D)
        return self.value_head(hidden.float())[:, 0]


def is_reward_model(path: str) -> bool:
    return os.path.exists(os.path.join(path, VALUE_HEAD))


def build_reward_model(policy: Policy, path: str, seed: int, notice=print) -> RewardModel:
    """The head saved at `path`, else a fresh one from N(0, 1 / (D + 1)), on the trunk of `policy`."""
    if is_reward_model(path):
        return RewardModel(policy, saved_head(path, notice))
    size = policy.lm.config.get_text_config().hidden_size
    return RewardModel(policy, torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) / (size + 1) ** 0.5)
