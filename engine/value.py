"""The policy together with its critic, for algorithms that learn a value of every state (ppo)."""
import copy
import os

import torch
from safetensors.torch import load_file
from torch import nn

from data.errors import UserError
from data.pack import Batch
from data.rewards import is_model, parts_of
from engine import checkpoint, lora
from engine.load import load_tokenizer
from engine.model import VALUE_HEAD, Policy, build_policy, is_reward_model, saved_head
from engine.ranks import from_main


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


def build_actor_critic(policy: Policy, common, config, tokenizer, start: str | None, notice) -> ActorCritic:
    """`policy` and its critic. Trunk and head of the critic are those of the reward model, where the reward is one; else its trunk is the
    start model's and its head is 0. With `share_value_trunk` its trunk is the policy's and its head is 0. A run that goes on from the
    checkpoint `start` has what that holds of the critic."""
    run = next(filter(is_model, parts_of(config.reward)), None)
    trunk, head = None, torch.zeros(1, policy.lm.config.get_text_config().hidden_size)
    if config.share_value_trunk:
        origin = "the policy's trunk under a head of 0"
    elif run:
        path = reward_model_path(run, tokenizer, notice)
        trunk, head = value_trunk(policy, path, common, tokenizer), saved_head(path, notice)
        origin = f"the reward model {run}"
    else:
        trunk, origin = value_trunk(policy, common.model, common, tokenizer), "the start model's trunk under a head of 0"
    model = ActorCritic(policy, head, trunk)
    if start:
        saved = load_file(os.path.join(start, checkpoint.CRITIC))
        wanted = {name for name, parameter in model.named_parameters() if name.startswith("critic_") and parameter.requires_grad}
        if model.load_state_dict(saved, strict=False).unexpected_keys or not wanted <= saved.keys():
            raise UserError(f"{os.path.join(start, checkpoint.CRITIC)} is the critic of another model; fix: start a new run")
    else:
        notice(f"critic: {origin}")
    return model


def value_trunk(policy: Policy, path: str, common, tokenizer) -> Policy:
    """The trunk, without a head, of the model at `path`. Where the policy has an adapter, this has one too: its own, else a fresh one."""
    lm, adapter = build_policy(common, tokenizer, path, frozen=True).lm, lora.settings(policy.lm)
    if adapter and not lora.settings(lm):
        lora.attach(lm, copy.deepcopy(adapter), common.seed)
    return Policy(lm.base_model, policy.precision, policy.share_prompt)


def reward_model_path(run: str, tokenizer, notice) -> str:
    """The directory with trunk and head of the run of `rm` that a reward names; UserError where it is none, or its tokenizer is not the
    policy's."""
    path = from_main(checkpoint.model_path, run, notice)
    if not is_reward_model(path):
        raise UserError(f"reward: {run} is not the run of a reward model ({VALUE_HEAD} is missing in {path}); "
                        "fix: pass a run of algorithm: rm")
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"reward: the reward model {run} has another tokenizer than the model; "
                        "fix: train it from a model with the same tokenizer")
    return path
