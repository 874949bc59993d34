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


def load(directory, adapter=None):
    """The model in eval mode, by the class that its checkpoint names; with a peft adapter that can be
    trained."""
    model_class = class_named_by(directory)
    options = {"dtype": torch.float32}
    try:
        lm = model_class.from_pretrained(directory, attn_implementation="eager", **options)
    except (ValueError, ImportError):           # it has no attention
        lm = model_class.from_pretrained(directory, **options)
    if getattr(lm.config, "alibi", False):
        # Falcon's eager attention adds ALiBi to the scores and, with the mask, which holds it, once more
        lm = model_class.from_pretrained(directory, attn_implementation="sdpa", **options)
    if adapter:
        lm = PeftModel.from_pretrained(lm, adapter, is_trainable=True)
    return lm.eval()


class Texts:
    """Rows as token ids: prompt, and response with the end token."""

    def __init__(self, directory):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pair(self, row: dict, name: str = "response") -> tuple:
        prompt = self.ids(row["prompt"])
        response = self.ids(row[name])
        response.append(self.tokenizer.eos_token_id)
        return prompt, response

    def completion(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def logps(lm, prompt, response) -> torch.Tensor:
    """(L,) log-probs of the response's tokens."""
    ids = torch.tensor([[*prompt, *response]])
    mask = torch.ones_like(ids)
    output = lm(input_ids=ids, attention_mask=mask, use_cache=False)
    logits = output.logits[0].float()
    assert len(logits) == ids.shape[1], "the class gives no logits of the prompt"
    start = len(prompt)
    predicted = logits[start - 1:-1].log_softmax(-1)
    targets = ids[0, start:, None]
    return predicted.gather(1, targets)[:, 0]


def states(lm, prompt, response) -> torch.Tensor:
    """(T, D) last hidden states of prompt and response."""
    ids = torch.tensor([[*prompt, *response]])
    mask = torch.ones_like(ids)
    trunk = trunk_of(lm)
    output = trunk(input_ids=ids, attention_mask=mask, use_cache=False)
    return output[0][0].float()


def trunk_of(lm):
    """The model without its head."""
    if lm.base_model is not lm:
        return lm.base_model
    if hasattr(lm, "model"):                    # Llama 4
        return lm.model
    return trunk_of(lm.language_model)


def norm(loss, *owners) -> float:
    """The norm of a loss's gradient over the parameters of models and tensors."""
    parameters = []
    for owner in owners:
        is_tensor = isinstance(owner, torch.Tensor)
        parameters += [owner] if is_tensor else owner.parameters()
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    total = torch.tensor(0.0)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            total += gradient.double().square().sum()
    return float(total.sqrt())


# ---- losses ----------------------------------------------------------------------------------------------

def sft_loss(lm, texts, rows) -> torch.Tensor:
    """The mean over all tokens of all responses."""
    pairs = [texts.pair(row) for row in rows]
    found = [logps(lm, *pair) for pair in pairs]
    return -torch.cat(found).mean()


def router_loss(lm, texts, rows) -> torch.Tensor | None:
    """The mean of the auxiliary losses that the class gives for single rows; None where it gives none."""
    losses = []
    for row in rows:
        prompt, response = texts.pair(row)
        ids = torch.tensor([prompt + response])
        mask = torch.ones_like(ids)
        output = lm(input_ids=ids, attention_mask=mask, output_router_logits=True)
        auxiliary = output.get("aux_loss")
        if auxiliary is None:
            return None
        losses.append(auxiliary)
    return torch.stack(losses).mean()


def pair_logps(lm, texts, rows) -> list[torch.Tensor]:
    """Summed log-probs (B,) of the chosen and of the rejected responses."""
    sides = []
    for name in ("chosen", "rejected"):
        pairs = [texts.pair(row, name) for row in rows]
        sums = [logps(lm, *pair).sum() for pair in pairs]
        sides.append(torch.stack(sums))
    return sides


def pair_scores(lm, head, texts, rows) -> list[torch.Tensor]:
    """A reward model's scores (B,) of the chosen and of the rejected responses."""
    sides = []
    for name in ("chosen", "rejected"):
        pairs = [texts.pair(row, name) for row in rows]
        scores = [score(lm, head, *pair) for pair in pairs]
        sides.append(torch.stack(scores))
    return sides


def dpo_loss(chosen_ratios, rejected_ratios, beta) -> torch.Tensor:
    """Two (B,): log-probs less those of the reference."""
    margins = chosen_ratios - rejected_ratios
    return -F.logsigmoid(beta * margins).mean()


def value_head(directory) -> torch.Tensor:
    """(D,), with a gradient."""
    tensors = load_file(Path(directory) / "value_head.safetensors")
    return tensors["v_head.summary.weight"][0].float().requires_grad_()


def score(lm, head, prompt, response) -> torch.Tensor:
    """At the last token."""
    return states(lm, prompt, response)[-1] @ head


def values(lm, head, prompt, response) -> torch.Tensor:
    """(L,) a critic's values of the states before the response's tokens."""
    found = states(lm, prompt, response)
    return found[len(prompt) - 1:-1] @ head


def group_advantages(rewards: list[float], size: int) -> list[float]:
    """GRPO's, of rewards in groups of `size`."""
    advantages = []
    together = torch.tensor(rewards, dtype=torch.float64)
    for group in together.split(size):
        centered = group - group.mean()
        scale = group.std() + 1e-4
        advantages += (centered / scale).tolist()
    return advantages


def grpo_loss(lm, rollout, advantages, old_logps, epsilon, beta):
    """-> (loss, mean of k3 over the tokens). The model that sampled is the reference too."""
    losses, all_kl = [], []
    for row, advantage, old in zip(rollout, advantages, old_logps):
        new = logps(lm, *row)
        ratios = (new - old).exp()
        clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
        kl = 1 / ratios - (old - new) - 1
        gains = torch.min(ratios * advantage, clipped * advantage)
        losses.append((beta * kl - gains).mean())
        all_kl.append(kl)
    loss = torch.stack(losses).mean()
    kl = torch.cat(all_kl).mean()
    return loss, kl


def advantages_and_returns(scores, values, lam):
    """Two (N,), the first whitened, of completions with a score at their end and no KL yet."""
    all_advantages, all_returns = [], []
    for score_of_row, row in zip(scores, values):
        old_values = row.detach().double()
        advantages = gae(score_of_row, old_values, lam)
        all_advantages.append(advantages)
        all_returns.append(advantages + old_values)
    advantages = torch.cat(all_advantages)
    whitened = (advantages - advantages.mean()) / advantages.std()
    return whitened, torch.cat(all_returns)


def gae(final_reward, values, lam) -> torch.Tensor:
    """(L,) by the sum that defines it, with gamma 1."""
    length = len(values)
    deltas = -values
    deltas[:-1] += values[1:]
    deltas[-1] += final_reward
    advantages = torch.zeros_like(values)
    for t in range(length):
        weights = lam ** torch.arange(length - t)
        advantages[t] = weights.double() @ deltas[t:]
    return advantages


# ---- what a run has written ------------------------------------------------------------------------------

def metrics(run, split="train") -> dict[int, dict]:
    """{step: row}"""
    found = {}
    file = Path(run) / "metrics.jsonl"
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if row["split"] == split:
            found[row["step"]] = row
    return found


def checkpoint(run) -> Path:
    """That of update 1."""
    return Path(run) / "checkpoints" / "step-000001"


def stored_rollout(run, texts, rows):
    """-> ([(prompt, completion)] as token ids, the tensors) of the rollout in the checkpoint of update 1."""
    tensors = load_file(checkpoint(run) / "rollout.safetensors")
    prompts = []
    for row, size in zip(tensors["rows"], tensors["groups"]):
        prompt = texts.ids(rows[row]["prompt"])
        prompts += [prompt] * size
    lengths = tensors["lengths"].tolist()
    parts = tensors["tokens"].split(lengths)
    completions = [part.tolist() for part in parts]
    return list(zip(prompts, completions)), tensors
