"""The policy together with its critic, for algorithms that learn a value of every state (ppo)."""
import copy
import os

import torch
from safetensors.torch import load_file
from torch import nn

from data.errors import UserError
from data.pack import Batch
from model import lora
from model.build import build_policy
from model.load import is_adapter
from model.policy import Policy
from model.reward_model import saved_head

CRITIC = "critic.safetensors"                # of a checkpoint of a policy with a critic: its trained weights


class ActorCritic(Policy):
    """A policy, and a critic: a linear head on a trunk of its own, or on the policy's. `policy(batch)` is that of any policy;
    `policy(batch, temperature, values=True)` -> log-probs (N,) and values (N,), fp32: V of the state before each trained token.

    One module, so that under `torchrun` it is the FSDP root of both, with one optimizer and one gradient norm."""

    def __init__(self, policy: Policy, head: torch.Tensor, trunk: Policy | None = None):
        super().__init__(policy.lm, policy.precision, policy.share_prompt)
        self.critic_trunk = trunk                          # None: the policy's
        self.critic_head = nn.Linear(head.shape[1], 1, bias=False, device=policy.device)
        self.critic_head.weight.data.copy_(head)

    def forward(self, batch: Batch, temperature: float = 1.0, values: bool = False):
        states, head = self.states(batch)
        logps = self.logps(states, head, batch.target, temperature)
        if not values:
            return logps
        if self.critic_trunk is not None:
            states = self.critic_trunk.hidden(batch, input_ids=batch.tokens[None]).index_select(0, batch.source)       # (N, D)
        return logps, self.critic_head(states.float())[:, 0]


def build_actor_critic(policy: Policy, common, tokenizer, share_trunk: bool, reward_model: str | None, start: str | None,
                       notice) -> ActorCritic:
    """`policy` and its critic. Trunk and head of the critic are those of the `reward_model` at a path; without one its trunk is the
    start model's and its head is 0. With `share_trunk` its trunk is the policy's and its head is 0. A run that goes on from the
    checkpoint `start` has what that holds of the critic."""
    trunk, head = None, torch.zeros(1, policy.lm.config.get_text_config().hidden_size)
    if share_trunk:
        origin = "the policy's trunk under a head of 0"
    elif reward_model:
        trunk, head = value_trunk(policy, reward_model, common, tokenizer), saved_head(reward_model, notice)
        origin = f"the reward model {reward_model}"
    else:
        trunk, origin = value_trunk(policy, common.model, common, tokenizer), "the start model's trunk under a head of 0"
    model = ActorCritic(policy, head, trunk)
    if start:
        saved = load_file(os.path.join(start, CRITIC))
        wanted = {name for name, parameter in model.named_parameters() if name.startswith("critic_") and parameter.requires_grad}
        if model.load_state_dict(saved, strict=False).unexpected_keys or not wanted <= saved.keys():
            raise UserError(f"{os.path.join(start, CRITIC)} is the critic of another model; fix: start a new run")
    else:
        notice(f"critic: {origin}")
    return model


def value_trunk(policy: Policy, path: str, common, tokenizer) -> Policy:
    """The trunk, without a head, of the model at `path`. Where the policy has an adapter, this has one too: its own, else a fresh one."""
    lm = build_policy(path, tokenizer, common, frozen=True, trains_adapter=is_adapter(common.model)).lm
    adapter = lora.settings(policy.lm)
    if adapter and not lora.settings(lm):
        lora.attach(lm, copy.deepcopy(adapter), common.seed)
    return Policy(lm.base_model, policy.precision, policy.share_prompt)
