"""One optimizer update as an algorithm sees it."""
import torch

from data.errors import RunError
from engine.ranks import sum_over_ranks


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
        # one at least, for the metrics
        self.computed = [example for example in examples if example.has_gradient] or examples[:1]
        self.micro_batches = engine.deal(self.computed) if index else []
        self.totals = {"train": {}, "eval": {}}      # split -> metric -> a [sum, count] per part
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
        """Add one micro-batch: `losses` and every metric are unreduced tensors (a metric may be one
        number). Each is averaged over all its entries in the update, or in the evaluation. A tuple of
        tensors stands for the sum of their averages. A second call for the same micro-batch adds its
        metrics, but no loss."""
        parts = losses if isinstance(losses, tuple) else (losses,)
        if any(part.ndim == 0 for part in parts):
            raise RunError("step.log got a loss that is one number already, so its mean over micro-batches "
                           "would be wrong; fix: pass the losses per example, response or token, without "
                           "sum() or mean()")
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

    def check_logged(self) -> None:
        """RunError where a micro-batch of the update was not logged."""
        count = len(self.micro_batches)
        missing = count - len(self.losses)
        if missing > 0:
            raise RunError(f"{missing} of the {count} micro-batches of update {self.index} have no loss; "
                           "fix: add the line step.log(losses, metrics) after backward(), for every batch")

    def add(self, metrics: dict, split: str = "train") -> None:
        for name, values in metrics.items():
            totals = self.totals[split].setdefault(name, {})
            parts = values if isinstance(values, tuple) else (values,)
            for i, part in enumerate(parts):
                part = torch.as_tensor(part, device=self.engine.policy.device).detach()
                total = totals.setdefault(i, [0.0, 0])
                total[0] = total[0] + part.sum(dtype=torch.float64)
                total[1] += part.numel()

    def averages(self, split: str) -> dict:
        """Metric -> mean over all ranks; without those that had no entry anywhere, such as the rewards of a
        class that is not in the update."""
        totals, counts = [], []
        for parts in self.totals[split].values():
            for total, count in parts.values():
                totals.append(total)
                counts.append(float(count))
        device = self.engine.policy.device
        totals = torch.stack(totals).tolist() if totals else []        # one copy from a GPU
        sums = sum_over_ranks(totals + counts, device)
        pairs = iter(zip(sums[:len(totals)], sums[len(totals):]))
        averages = {}
        for name, parts in self.totals[split].items():
            means = []
            for _ in parts:
                total, count = next(pairs)
                means.append(total / count if count else None)
            if None not in means:
                averages[name] = sum(means)
        return averages
