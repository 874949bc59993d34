"""The policy together with its critic, for algorithms that learn a value of every state (ppo)."""
import copy
import os

import torch
from safetensors.torch import load_file

from data.errors import UserError
from data.pack import Batch
from model import lora
from model.classifier import saved_score
from model.form import Form, trunk_of
from model.policy import Policy
from model.reward_model import hidden_size, is_reward_model, linear_head, saved_head
from model.state import files_of
from model.varlen import laid_out

CRITIC = "critic.safetensors"      # in a checkpoint of a policy with a critic: the critic's trained weights


class ActorCritic(Policy):
    """A policy and a critic: a linear head on a trunk of its own, or on the policy's trunk.

    `policy(batch, ...)` returns what a Policy does. `policy(batch, ..., values=True)` adds, as the last
    one, the values (N,) in fp32: V of the state before each trained token.

    One module: under `torchrun` it is the FSDP root of both, with one optimizer and one gradient norm."""

    def __init__(self, policy: Policy, head: torch.Tensor, trunk: Policy | None = None):
        super().__init__(policy.lm, policy.precision, policy.form)
        self.is_compiled = policy.is_compiled
        self.critic_trunk = trunk              # None: the policy's
        self.critic_head = linear_head(head, policy.device)

    def use(self, form: Form) -> None:
        """Both compute in this form; a trunk with other layers has been checked by itself."""
        super().use(form)
        trunk = getattr(self, "critic_trunk", None)
        if trunk is not None and type(trunk.lm) is type(self.trunk):
            trunk.use(self.form)

    def forward(self, batch: Batch, temperature: float = 1.0, values: bool = False, entropy: bool = False):
        batch = laid_out(batch, self)
        states, head = self.states(batch)
        result = self.logps(states, head, batch.target, temperature, entropy)
        if not values:
            return result
        if self.critic_trunk is not None:
            batch = laid_out(batch, self.critic_trunk)
            hidden = self.critic_trunk.hidden(batch, input_ids=batch.tokens[None])        # (T, D)
            states = hidden.index_select(0, batch.source)                                 # (N, D)
        critic_values = self.critic_head(states.float())[:, 0]
        return (*result, critic_values) if entropy else (result, critic_values)


def build_actor_critic(policy: Policy, trunk: Policy | None, reward_model: str | None, start: str | None,
                       seed: int, notice) -> ActorCritic:
    """`policy` with a critic on `trunk`, or on the policy's own trunk where that is None. Where `trunk` is
    that of the reward model or classifier at a path, the critic's head is that model's; else it is 0. A run
    that continues from the checkpoint `start` loads the critic saved there.

    Where the policy has an adapter, so has the trunk: its own, else a fresh one, drawn from `seed`.
    Raises UserError where the checkpoint's critic is another model's."""
    head = torch.zeros(1, hidden_size(policy))
    if trunk is None:
        origin = "the policy's trunk under a head of 0"
    elif reward_model:
        origin = f"the reward model {reward_model}"
        is_own = is_reward_model(reward_model)
        head = saved_head(reward_model, notice) if is_own else saved_score(reward_model)
    else:
        origin = "the start model's trunk under a head of 0"
    if trunk is not None:
        trunk = headless(trunk, policy, seed)
    model = ActorCritic(policy, head, trunk)
    if start:
        load_critic(model, start)
    else:
        notice(f"critic: {origin}")
    return model


def headless(critic: Policy, policy: Policy, seed: int) -> Policy:
    """`critic` without its head, with the precision of `policy`, and with an adapter where that has one."""
    adapter = lora.settings(policy.lm)
    if adapter and not lora.settings(critic.lm):
        lora.attach(critic.lm, copy.deepcopy(adapter), seed)
    made = Policy(trunk_of(critic.lm), policy.precision, critic.form)
    made.is_compiled = critic.is_compiled
    return made


def load_critic(model: ActorCritic, start: str) -> None:
    """Load the critic of the checkpoint `start`."""
    trained = set()
    for name, parameter in model.named_parameters():
        if name.startswith("critic_") and parameter.requires_grad:
            trained.add(name)
    saved = {}
    for file in files_of(start, CRITIC):
        saved |= load_file(file)
    # where weights have the dtype of the start model's files, the saved ones take their place: see build.py
    is_taken = any(hasattr(weight, "kept_as") for weight in model.parameters())
    unexpected = model.load_state_dict(saved, strict=False, assign=is_taken).unexpected_keys
    if unexpected or not trained <= saved.keys():
        file = os.path.join(start, CRITIC)
        raise UserError(f"{file} is the critic of another model; fix: start a new run")
