"""What a run of train.py reported and saved, compared with the model's own class: a cell of the table."""
import family_reference as own
import torch
import torch.nn.functional as F
from family_models import class_named_by
from safetensors.torch import load_file

TOLERANCE = 1e-4
SMALL = 0.01                       # the error of a smaller number is relative to this
BF16_TOLERANCE = 1e-4              # of a loss that is a mean over 100 tokens
BETA = 0.5                         # of dpo
EPSILON = 0.2                      # of grpo
KL = 0.04                          # beta of grpo
GROUP = 4                          # completions per prompt
LAM = 0.95                         # of ppo
VF_COEF = 0.1
OTHER_PARTS = ("vision", "visual", "audio", "multi_modal_projector")
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class Comparison:
    """Collects what differs."""

    def __init__(self):
        self.wrong = []

    def metrics(self, row: dict, expected: dict) -> None:
        """A row of metrics.jsonl against numbers, or scalar tensors, by the same names."""
        step = row["step"]
        for name, value in expected.items():
            ours = row[name]
            value = float(torch.as_tensor(value).detach())
            limit = TOLERANCE * max(abs(value), SMALL)
            if not abs(ours - value) <= limit:
                self.wrong.append(f"{name} of step {step} {ours:.6g} not {value:.6g}")

    def tokens(self, stored: dict, expected: dict) -> None:
        """Tensors of a stored rollout against those of the same names, a number per token."""
        for name, values in expected.items():
            ours = stored[f"extras/{name}"]
            difference = (ours - values.detach()).abs().max()
            if not difference <= TOLERANCE:
                self.wrong.append(f"{name} of a token off by {difference:.2g}")

    @property
    def cell(self) -> str:
        return "WRONG " + ", ".join(self.wrong) if self.wrong else "ok"


def sft_cell(folder, run, rows, adapter=False) -> str:
    """Both updates; the second one starts from the checkpoint of the first."""
    found = Comparison()
    model, first = folder / "model", own.checkpoint(folder / run)
    texts = own.Texts(model)
    ours = own.metrics(folder / run)

    start = own.load(model)
    loss = own.sft_loss(start, texts, rows[:4])
    found.metrics(ours[1], {"loss": loss})
    if adapter:
        second = own.load(model, first)
    else:
        norm = own.norm(loss, start)
        found.metrics(ours[1], {"grad_norm": norm})
        second = own.load(first)

    loss = own.sft_loss(second, texts, rows[4:8])
    found.metrics(ours[2], {
        "loss": loss,
        "grad_norm": own.norm(loss, second),
    })
    if adapter:
        tensors = load_file(folder / run / "final" / "adapter_model.safetensors")
        others = [name for name in tensors if is_other_part(name)]
        if others:
            found.wrong.append(f"the adapter has {len(others)} tensors such as {others[0]}")
    return found.cell


def router_cell(folder, run, rows) -> str:
    """Update 1 with the auxiliary loss of the class itself, of one row at a time, at a weight of 1."""
    found = Comparison()
    texts = own.Texts(folder / "model")
    lm = own.load(folder / "model")
    auxiliary = own.router_loss(lm, texts, rows[:4])
    if auxiliary is None:
        return "-"
    loss = own.sft_loss(lm, texts, rows[:4])
    ours = own.metrics(folder / run)
    found.metrics(ours[1], {
        "loss": loss,
        "aux_loss": auxiliary,
        "grad_norm": own.norm(loss + auxiliary, lm),
    })
    return found.cell


def is_other_part(name: str) -> bool:
    """Whether a weight belongs to what reads pictures or sound."""
    return any(word in name for word in OTHER_PARTS)


def reload_cell(folder, rows) -> str:
    """`final/` in its own class: keys, loss of the held-out rows, and weights that training must not move."""
    found = Comparison()
    model, final = folder / "model", folder / "sft" / "final"
    model_class = class_named_by(final)
    if model_class is not class_named_by(model):
        found.wrong.append(f"final/ is a {model_class.__name__}")
    lm, info = model_class.from_pretrained(final, output_loading_info=True)
    for name in KEYS:
        if info.get(name):
            found.wrong.append(f"{name} {sorted(info[name])[:3]}")

    start = own.load(model).state_dict()
    for name, weight in lm.state_dict().items():
        is_same = torch.equal(weight, start[name])
        if is_other_part(name) and not is_same:
            found.wrong.append(f"{name} was changed")

    texts = own.Texts(model)
    loss = own.sft_loss(own.load(final), texts, rows)
    evaluated = own.metrics(folder / "sft", "eval")
    found.metrics(evaluated[2], {"loss": loss})
    return found.cell


def dpo_cell(folder, run, rows, model="model") -> str:
    found = Comparison()
    texts = own.Texts(folder / model)
    ours = own.metrics(folder / run)
    start = own.load(folder / model)
    chosen, rejected = own.pair_logps(start, texts, rows[:4])
    ratios = chosen - chosen.detach()
    rejected_ratios = rejected - rejected.detach()
    loss = own.dpo_loss(ratios, rejected_ratios, BETA)
    found.metrics(ours[1], {
        "loss": loss,
        "grad_norm": own.norm(loss, start),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    })
    second = own.load(own.checkpoint(folder / run))
    later = rows[4:8]
    with torch.no_grad():
        chosen, rejected = own.pair_logps(second, texts, later)
        reference_chosen, reference_rejected = own.pair_logps(start, texts, later)
    ratios = chosen - reference_chosen
    rejected_ratios = rejected - reference_rejected
    loss = own.dpo_loss(ratios, rejected_ratios, BETA)
    found.metrics(ours[2], {"loss": loss})
    return found.cell


def dpo_tied_cell(folder, run, rows) -> str:
    return dpo_cell(folder, run, rows, "tied")


def rm_cell(folder, run, rows) -> str:
    """Update 2, whose start is known: the trunk and the head in the checkpoint of update 1."""
    found = Comparison()
    first = own.checkpoint(folder / run)
    texts = own.Texts(first)
    lm = own.load(first)
    head = own.value_head(first)
    chosen, rejected = own.pair_scores(lm, head, texts, rows[4:8])
    loss = -F.logsigmoid(chosen - rejected).mean()
    ours = own.metrics(folder / run)
    found.metrics(ours[2], {
        "loss": loss,
        "grad_norm": own.norm(loss, lm, head),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
    })
    return found.cell


def grpo_cell(folder, run, rows) -> str:
    """Both updates that are made from the first rollout."""
    found = Comparison()
    texts = own.Texts(folder / "model")
    ours = own.metrics(folder / run)
    rollout, stored = own.stored_rollout(folder / run, texts, rows)
    rewards = [varied(texts.completion(completion)) for _, completion in rollout]
    advantages = own.group_advantages(rewards, GROUP)

    start = own.load(folder / "model")
    old_logps = [own.logps(start, *row).detach() for row in rollout]
    loss, _ = own.grpo_loss(start, rollout, advantages, old_logps, EPSILON, KL)
    found.metrics(ours[1], {
        "reward": sum(rewards) / len(rewards),
        "grad_norm": own.norm(loss, start),
    })
    together = torch.cat(old_logps)
    found.tokens(stored, {
        "sampler_logps": together,
        "old_logps": together,
    })

    second = own.load(own.checkpoint(folder / run))
    loss, kl = own.grpo_loss(second, rollout, advantages, old_logps, EPSILON, KL)
    found.metrics(ours[2], {
        "loss": loss,
        "kl": kl,
    })
    return found.cell


def varied(text: str) -> float:
    """The reward of the runs; it differs within most groups."""
    return sum(map(ord, text)) % 7 / 3


def ppo_cell(folder, run, rows) -> str:
    """The first update. The reward model of the run rm scores, and the critic starts from it."""
    found = Comparison()
    texts = own.Texts(folder / "model")
    ours = own.metrics(folder / run)[1]
    rollout, stored = own.stored_rollout(folder / run, texts, rows)
    reward_model = folder / "rm" / "final"
    lm = own.load(folder / "model")
    critic = own.load(reward_model)
    head = own.value_head(reward_model)

    scores, all_logps, all_values = [], [], []
    for row in rollout:
        all_logps.append(own.logps(lm, *row))
        all_values.append(own.values(critic, head, *row))
        scores.append(own.score(critic, head, *row).detach())
    advantages, returns = own.advantages_and_returns(scores, all_values, LAM)
    logps = torch.cat(all_logps)
    values = torch.cat(all_values)
    ratios = (logps - logps.detach()).exp()
    value_losses = (values - returns) ** 2 / 2
    loss = (VF_COEF * value_losses - ratios * advantages).mean()

    found.metrics(ours, {
        "objective/scores": torch.stack(scores).mean(),
        "loss/value_avg": value_losses.mean(),
        "grad_norm": own.norm(loss, lm, critic, head),
    })
    found.tokens(stored, {
        "old_logps": logps,
        "reference_logps": logps,
        "old_values": values,
    })
    return found.cell


def ranks_cell(folder, one, two) -> str:
    """A run on two processes reports what the run `one` reports."""
    found = Comparison()
    ours = own.metrics(folder / two)
    theirs = own.metrics(folder / one)
    for step, row in theirs.items():
        for name in ("loss", "grad_norm", "reward"):
            if name in row:
                found.metrics(ours[step], {name: row[name]})
    return found.cell


def bf16_cell(folder, together, single) -> str:
    """The loss of update 1 is that of rows which are alone in their micro-batch, but for bf16's rounding."""
    ours = own.metrics(folder / together)[1]["loss"]
    alone = own.metrics(folder / single)[1]["loss"]
    if abs(ours - alone) <= BF16_TOLERANCE:
        return "ok"
    return f"WRONG loss {ours:.6g}, of rows that are alone {alone:.6g}"
