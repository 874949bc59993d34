"""One optimizer update as an algorithm sees it."""
import torch

from engine.ranks import sum_over_ranks


class Step:
    """One optimizer update: an iterable (more than once) of this rank's micro-batches. Its counts are those of the whole
    update, over all micro-batches and ranks, known before the first forward, so that `losses.sum() / step.num_…` is an exact
    mean. Step 0 has no micro-batches: it is where the start model is evaluated."""

    def __init__(self, engine, index: int, examples: list):
        self.engine, self.index, self.examples = engine, index, examples
        self.num_examples = len(examples)
        # at least 1: of a small last rollout some mini-batches may be empty
        self.num_responses = max(1, sum(len(example.responses) for example in examples))
        self.num_tokens = max(1, sum(example.num_trained for example in examples))
        self.num_chosen_tokens = sum(int(example.responses[0].trained.sum()) for example in examples)      # of pairs
        self.micro_batches = engine.deal(examples) if index else []
        self.totals = {"train": {}, "eval": {}}          # split -> metric -> [sum, count] on the device
        self.losses = []                                 # per micro-batch: its loss sum and its examples, to name bad rows

    def __iter__(self):
        for i, examples in enumerate(self.micro_batches):
            self.engine.synchronize_gradients(i == len(self.micro_batches) - 1)
            if self.engine.policy.dropouts:                    # as every random draw a function of its place in the run
                torch.manual_seed(hash((self.engine.config.seed, self.index, self.engine.rank, i)) % 2 ** 31)
            yield self.engine.policy.collate(examples)

    def log(self, losses, metrics: dict, split: str = "train") -> None:
        """Add one micro-batch: `losses` and every metric are unreduced tensors (or one number); each is averaged over all its
        entries in the update (or the evaluation). A tuple of tensors stands for the sum of their averages."""
        self.add({"loss": losses, **metrics}, split)
        if split == "train":
            loss = sum(part.detach().sum() for part in (losses if isinstance(losses, tuple) else (losses,)))
            self.losses.append((loss, self.micro_batches[len(self.losses) % len(self.micro_batches)]))

    def add(self, metrics: dict, split: str = "train") -> None:
        for name, values in metrics.items():
            for i, part in enumerate(values if isinstance(values, tuple) else (values,)):
                part = torch.as_tensor(part, device=self.engine.policy.device).detach()
                total = self.totals[split].setdefault(name, {}).setdefault(i, [0.0, 0])
                total[0] = total[0] + part.sum(dtype=torch.float64)
                total[1] += part.numel()

    def averages(self, split: str) -> dict:
        """Metric -> mean over all ranks; without those that had no entry anywhere (such as rewards of a class not in the update)."""
        totals = self.totals[split]
        numbers = [float(number) for parts in totals.values() for total in parts.values() for number in total]
        sums, averages = iter(sum_over_ranks(numbers, self.engine.policy.device)), {}
        for name, parts in totals.items():
            pairs = [(next(sums), next(sums)) for _ in parts]
            if all(count for _, count in pairs):
                averages[name] = sum(total / count for total, count in pairs)
        return averages
