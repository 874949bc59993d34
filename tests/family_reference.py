"""What a model's own class says: one response per row, eager attention, full logits, fp32, and the losses of
the papers in the plainest form. Nothing here comes from the project."""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from family_models import class_named_by
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

VALUE_HEAD = "v_head.summary.weight"


def load(directory, adapter=None):
    """The model in eval mode, by the class that its checkpoint names; with a peft adapter that can be
    trained."""
    model_class = class_named_by(directory)
    try:
        lm = model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, ImportError):           # it has no attention
        lm = model_class.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        lm = PeftModel.from_pretrained(lm, adapter, is_trainable=True)
    return lm.eval()


def value_head(directory) -> torch.Tensor:
    """(1, D), with a gradient."""
    return load_file(Path(directory) / "value_head.safetensors")[VALUE_HEAD].float().requires_grad_()


class Texts:
    """Rows as token ids: prompt, and response with the end token."""

    def __init__(self, directory):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def prompt(self, row) -> list[int]:
        return self.tokenizer(row["prompt"], add_special_tokens=False).input_ids

    def response(self, row, name="response") -> list[int]:
        ids = self.tokenizer(row[name], add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def completion(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def logps(lm, prompt, response) -> torch.Tensor:
    """(L,) log-probs of the response's tokens."""
    ids = torch.tensor([[*prompt, *response]])
    logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    assert len(logits) == ids.shape[1], "the class gives no logits of the prompt"
    predicting = logits[len(prompt) - 1:-1]
    targets = ids[0, len(prompt):, None]
    return predicting.log_softmax(-1).gather(1, targets)[:, 0]


def states(lm, prompt, response) -> torch.Tensor:
    """(T, D) last hidden states of prompt and response."""
    ids = torch.tensor([[*prompt, *response]])
    trunk = lm.base_model if lm.base_model is not lm else lm.model
    return trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0][0].float()


def norm(loss, *owners) -> float:
    """The norm of a loss's gradient over the parameters of models and tensors."""
    parameters = []
    for owner in owners:
        parameters += [owner] if isinstance(owner, torch.Tensor) else list(owner.parameters())
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    squares = [parameter.grad.double().square().sum() for parameter in parameters if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def number(tensor) -> float:
    return float(tensor.detach())


# ---- losses ----------------------------------------------------------------------------------------------

def sft_loss(lm, texts, rows) -> torch.Tensor:
    """The mean over all tokens of all responses."""
    found = [logps(lm, texts.prompt(row), texts.response(row)) for row in rows]
    return -torch.cat(found).mean()


def pair_logps(lm, texts, rows) -> list[torch.Tensor]:
    """Summed log-probs (B,) of the chosen and of the rejected responses."""
    sides = []
    for side in ("chosen", "rejected"):
        sums = [logps(lm, texts.prompt(row), texts.response(row, side)).sum() for row in rows]
        sides.append(torch.stack(sums))
    return sides


def dpo_loss(policy, reference, beta) -> torch.Tensor:
    chosen, rejected = policy
    reference_chosen, reference_rejected = reference
    margins = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margins).mean()


def pair_scores(lm, head, texts, rows) -> list[torch.Tensor]:
    """A reward model's scores (B,) of the chosen and of the rejected responses: at their last tokens."""
    sides = []
    for side in ("chosen", "rejected"):
        scores = [score(lm, head, texts.prompt(row), texts.response(row, side)) for row in rows]
        sides.append(torch.stack(scores))
    return sides


def score(lm, head, prompt, response) -> torch.Tensor:
    return (states(lm, prompt, response)[-1] * head[0]).sum()


def values(lm, head, prompt, response) -> torch.Tensor:
    """(L,) a critic's values of the states before the response's tokens."""
    found = states(lm, prompt, response)
    return found[len(prompt) - 1:-1] @ head[0]


def group_advantages(rewards: list[float], size: int) -> list[float]:
    """GRPO's, of rewards in groups of `size`."""
    advantages = []
    for group in torch.tensor(rewards, dtype=torch.float64).split(size):
        advantages += ((group - group.mean()) / (group.std() + 1e-4)).tolist()
    return advantages


def grpo_loss(lm, rollout, advantages, start_logps, epsilon, beta):
    """-> (loss, mean of k3 over the tokens) of a rollout whose log-probs were `start_logps` at sampling, under
    the start model, which is the reference too."""
    losses, all_kl = [], []
    for (prompt, completion), advantage, old in zip(rollout, advantages, start_logps):
        new = logps(lm, prompt, completion)
        ratios = (new - old).exp()
        kl = (old - new).exp() - (old - new) - 1
        gains = torch.min(ratios * advantage, ratios.clamp(1 - epsilon, 1 + epsilon) * advantage)
        losses.append((beta * kl - gains).mean())
        all_kl.append(kl)
    return torch.stack(losses).mean(), torch.cat(all_kl).mean()


def returns_of(rewards, old_values, lam) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages (L,), returns (L,)) of one completion, by the sum that defines GAE with gamma 1."""
    following = torch.cat([old_values[1:], old_values.new_zeros(1)])
    deltas = rewards + following - old_values
    advantages = torch.zeros_like(deltas)
    for t in range(len(deltas)):
        powers = lam ** torch.arange(len(deltas) - t, dtype=torch.float64)
        advantages[t] = (powers * deltas[t:]).sum()
    return advantages, advantages + old_values


# ---- what a run has written ------------------------------------------------------------------------------

def metrics(run, split="train") -> dict[int, dict]:
    """{step: row}"""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["split"] == split}


def stored_rollout(run, texts, rows):
    """-> ([(prompt, completion)] as token ids, the tensors) of the rollout in the checkpoint of update 1."""
    tensors = load_file(Path(run) / "checkpoints" / "step-000001" / "rollout.safetensors")
    prompts = []
    for row, size in zip(tensors["rows"].tolist(), tensors["groups"].tolist()):
        prompts += [texts.prompt(rows[row])] * size
    completions = tensors["tokens"].split(tensors["lengths"].tolist())
    pairs = []
    for prompt, completion in zip(prompts, completions):
        pairs.append((prompt, completion.tolist()))
    return pairs, tensors
