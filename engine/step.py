"""One optimizer update as an algorithm sees it."""
import torch

from data.errors import RunError
from engine.contract import check_losses, check_metrics, parts_of
from engine.ranks import on_any_rank, sum_over_ranks


def with_gradient(examples: list) -> list:
    """The examples that an update computes: those that have a gradient, or one without, for the metrics."""
    return [example for example in examples if example.has_gradient] or examples[:1]


class Step:
    """One optimizer update: an iterable of this rank's micro-batches.

    Its counts are those of the whole update, over all micro-batches and ranks, known before the first
    forward, so that `losses.sum() / step.num_examples` is an exact mean. Step 0 has no micro-batches:
    there the start model is evaluated, before anything is trained."""

    def __init__(self, engine, index: int, examples: list):
        self.engine, self.index, self.examples = engine, index, examples
        self.num_examples = len(examples)
        # at least 1: some mini-batches of a small last rollout may be empty
        self.num_responses = max(1, sum(len(example.responses) for example in examples))
        self.num_tokens = max(1, sum(example.num_trained for example in examples))
        self.computed = with_gradient(examples)
        self.micro_batches = engine.deal(self.computed) if index else []
        self.totals = {"train": {}, "eval": {}}      # split -> (metric, which part) -> [sum, count]
        self.losses = []                             # per micro-batch: its summed loss and its examples
        self.split = "train"                         # what the micro-batch in work belongs to
        self.is_logged = False                       # whether the loss of the micro-batch in work is logged
        self.num_yielded = 0                         # micro-batches that the algorithm got
        self.is_clipped = self.is_made = False       # whether clip_gradients and optimizer.step were called

    @property
    def num_chosen_tokens(self) -> int:
        """The trained tokens of the first responses; in a pair that is the chosen one."""
        return sum(example.responses[0].num_trained for example in self.examples)

    def __iter__(self):
        engine = self.engine
        for i, examples in enumerate(self.micro_batches):
            if engine.policy.dropouts:               # every random draw is a function of its place in the run
                place = (engine.config.seed, self.index, engine.rank, i)
                torch.manual_seed(hash(place) % 2 ** 31)
            if self.num_yielded == 0:
                engine.optimizer.check_cleared()
            self.num_yielded += 1
            self.start_micro_batch("train")
            yield engine.policy.collate(examples)

    def start_micro_batch(self, split: str) -> None:
        self.split, self.is_logged = split, False

    def log(self, losses, metrics: dict, split: str = "train") -> None:
        """Add one micro-batch: `losses` and every metric are unreduced tensors (n,), or a metric is a Python
        number. Each is averaged over all its entries in the update, or in the evaluation. A tuple of
        tensors stands for the sum of their averages. A second call for the same micro-batch adds its
        metrics, but no loss."""
        parts = parts_of(losses)
        check_losses(parts)
        check_metrics(metrics)
        if split != self.split:
            raise RunError(f"step.log got split={split!r} within the micro-batches of {self.split!r}; "
                           f"fix: write step.log(losses, metrics, split={self.split!r})")
        if not self.is_logged:
            self.is_logged = True
            self.add({"loss": losses}, split)
            if split == "train":
                total = sum(part.detach().sum() for part in parts)
                place = (self.num_yielded - 1) % len(self.micro_batches)
                self.losses.append((total, self.micro_batches[place]))
        self.add(metrics, split)

    def add(self, metrics: dict, split: str = "train") -> None:
        for name, values in metrics.items():
            for i, part in enumerate(parts_of(values)):
                part = torch.as_tensor(part, device=self.engine.policy.device).detach()
                total = self.totals[split].setdefault((name, i), [0.0, 0])
                total[0] = total[0] + part.sum(dtype=torch.float64)
                total[1] += part.numel()

    def averages(self, split: str) -> dict:
        """Metric -> mean over all ranks, whichever of them has entries; without those that have none
        anywhere, such as the rewards of a class that is not in the update."""
        device = self.engine.policy.device
        known = self.totals[split]
        keys = on_any_rank(list(known), device)
        nothing = [torch.zeros((), dtype=torch.float64, device=device), 0]
        totals, counts = [], []
        for key in keys:
            total, count = known.get(key, nothing)
            totals.append(total)
            counts.append(float(count))
        totals = torch.stack(totals).tolist() if totals else []        # one copy from a GPU
        sums = sum_over_ranks(totals + counts, device)
        means = {}
        for (name, _), total, count in zip(keys, sums, sums[len(keys):]):
            means.setdefault(name, []).append(total / count if count else None)
        return {name: sum(parts) for name, parts in means.items() if None not in parts}
