"""What a policy with a critic says of a rollout, for ppo."""
import torch

from engine.first_pass import in_first_pass
from engine.rollout import PerPrompt, Rollout


def logps_and_values(engine, rollout: Rollout) -> tuple[PerPrompt, PerPrompt]:
    """Per prompt the log-probs, and the values, of its completions' tokens, in one forward."""
    temperature = engine.online.config.temperature

    def pairs(batch):
        both = engine.policy(batch, temperature, values=True)
        return torch.stack(both, 1).flatten()

    logps, values = [], []
    for numbers in in_first_pass(engine.online, rollout, pairs, width=2):
        # contiguous, as after a resume: a sum over every other number is rounded in another order
        both = numbers.view(-1, 2).T.contiguous()
        logps.append(both[0])
        values.append(both[1])
    return logps, values
