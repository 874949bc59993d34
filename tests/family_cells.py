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
            if not abs(ours - value) <= TOLERANCE * max(abs(value), SMALL):
                self.wrong.append(f"{name} of step {step} {ours:.6g} not {value:.6g}")

    def tokens(self, stored: dict, expected: dict) -> None:
        """Tensors of a stored rollout against those of the same names, a number per token."""
        for name, values in expected.items():
            ours = stored[f"extras/{name}"]
            difference = float((ours - values.detach()).abs().max())
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
    if not adapter:
        found.metrics(ours[1], {"grad_norm": own.norm(loss, start)})

    second = own.load(model, first) if adapter else own.load(first)
    loss = own.sft_loss(second, texts, rows[4:8])
    found.metrics(ours[2], {"loss": loss, "grad_norm": own.norm(loss, second)})
    if adapter:
        tensors = load_file(folder / run / "final" / "adapter_model.safetensors")
        others = [name for name in tensors if is_other_part(name)]
        if others:
            found.wrong.append(f"the adapter has {len(others)} tensors such as {others[0]}")
    return found.cell


def is_other_part(name: str) -> bool:
    """Whether a weight belongs to what reads pictures or sound."""
    return any(word in name for word in OTHER_PARTS)


def reload_cell(folder, rows) -> str:
    """`final/` in its own class: its keys, its loss of the held-out rows, and the weights it must not move."""
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
        if is_other_part(name) and not torch.equal(weight, start[name]):
            found.wrong.append(f"{name} was changed")
    loss = own.sft_loss(own.load(final), own.Texts(model), rows)
    found.metrics(own.metrics(folder / "sft", "eval")[2], {"loss": loss})
    return found.cell


def dpo_cell(folder, run, rows, model="model") -> str:
    found = Comparison()
    texts = own.Texts(folder / model)
    ours = own.metrics(folder / run)
    start = own.load(folder / model)
    chosen, rejected = own.pair_logps(start, texts, rows[:4])
    loss = own.dpo_loss(chosen - chosen.detach(), rejected - rejected.detach(), BETA)
    found.metrics(ours[1], {
        "loss": loss,
        "grad_norm": own.norm(loss, start),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    })
    second = own.load(own.checkpoint(folder / run))
    with torch.no_grad():
        chosen, rejected = own.pair_logps(second, texts, rows[4:8])
        reference_chosen, reference_rejected = own.pair_logps(start, texts, rows[4:8])
    loss = own.dpo_loss(chosen - reference_chosen, rejected - reference_rejected, BETA)
    found.metrics(ours[2], {"loss": loss})
    return found.cell


def dpo_tied_cell(folder, run, rows) -> str:
    return dpo_cell(folder, run, rows, "tied")


def rm_cell(folder, run, rows) -> str:
    """Update 2, whose start is known: the trunk and the head in the checkpoint of update 1."""
    found = Comparison()
    first = own.checkpoint(folder / run)
    lm, head = own.load(first), own.value_head(first)
    chosen, rejected = own.pair_scores(lm, head, own.Texts(first), rows[4:8])
    loss = -F.logsigmoid(chosen - rejected).mean()
    found.metrics(own.metrics(folder / run)[2], {
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
    found.tokens(stored, {"sampler_logps": together, "old_logps": together})

    second = own.load(own.checkpoint(folder / run))
    loss, kl = own.grpo_loss(second, rollout, advantages, old_logps, EPSILON, KL)
    found.metrics(ours[2], {"loss": loss, "kl": kl})
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
    lm, critic = own.load(folder / "model"), own.load(reward_model)
    head = own.value_head(reward_model)

    scores, all_logps, all_values, all_advantages, all_returns = [], [], [], [], []
    for prompt, completion in rollout:
        logps = own.logps(lm, prompt, completion)
        score = own.score(critic, head, prompt, completion).detach()
        values = own.values(critic, head, prompt, completion)
        advantages, returns = own.advantages_and_returns(score, values.detach().double(), LAM)
        scores.append(score)
        all_logps.append(logps)
        all_values.append(values)
        all_advantages.append(advantages)
        all_returns.append(returns)
    logps, values = torch.cat(all_logps), torch.cat(all_values)
    advantages = torch.cat(all_advantages)
    advantages = (advantages - advantages.mean()) / advantages.std()
    ratios = (logps - logps.detach()).exp()
    value_losses = (values - torch.cat(all_returns)) ** 2 / 2
    loss = (VF_COEF * value_losses - ratios * advantages).mean()

    found.metrics(ours, {
        "objective/scores": torch.stack(scores).mean(),
        "loss/value_avg": value_losses.mean(),
        "grad_norm": own.norm(loss, lm, critic, head),
    })
    found.tokens(stored, {"old_logps": logps, "reference_logps": logps, "old_values": values})
    return found.cell


def ranks_cell(folder, one, two) -> str:
    """A run on two processes reports what the run `one` reports."""
    found = Comparison()
    ours = own.metrics(folder / two)
    for step, row in own.metrics(folder / one).items():
        names = {"loss", "grad_norm", "reward"} & row.keys()
        found.metrics(ours[step], {name: row[name] for name in names})
    return found.cell


def bf16_cell(folder, together, single) -> str:
    """The loss of update 1 is that of rows which are alone in their micro-batch, but for bf16's rounding."""
    ours = own.metrics(folder / together)[1]["loss"]
    alone = own.metrics(folder / single)[1]["loss"]
    if abs(ours - alone) <= BF16_TOLERANCE:
        return "ok"
    return f"WRONG loss {ours:.6g}, of rows that are alone {alone:.6g}"
