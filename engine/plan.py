"""The plan of a run: which rows each update trains on, and at which learning rate. Pure functions of the
keys."""
import math

from data.packing import order


class Plan:
    """The updates 1 to `total` of a run over `num_rows` rows.

    `batch_size` rows are drawn at a time. Each draw is used for `updates_per_draw` updates: for one offline,
    online for all updates that are made from a rollout."""

    def __init__(self, config, num_rows: int, updates_per_draw: int = 1):
        self.config, self.num_rows = config, num_rows
        self.updates_per_draw = updates_per_draw
        self.draws_per_epoch = math.ceil(num_rows / config.batch_size)
        updates_per_epoch = self.draws_per_epoch * updates_per_draw
        self.total = config.max_steps or math.ceil(config.epochs * updates_per_epoch)
        self.eval_every = config.eval_every or max(1, self.total // 10)
        self.epoch, self.order = None, None           # of the epoch that was asked for last

    def rows(self, draw: int) -> list[int]:
        """The rows of draw `draw` (from 1): a function of the seed and nothing else. The last draw of an
        epoch may be smaller."""
        config = self.config
        epoch, position = divmod(draw - 1, self.draws_per_epoch)
        if epoch != self.epoch:
            self.order = order(self.num_rows, config.seed, epoch, config.shuffle)
            self.epoch = epoch
        start = position * config.batch_size
        return self.order[start:start + config.batch_size].tolist()

    def all_rows(self) -> list[list[int]]:
        """The rows of every update of an offline run."""
        return [self.rows(update) for update in range(1, self.total + 1)]

    def epochs_after(self, update: int) -> float:
        return round(update / self.draws_per_epoch / self.updates_per_draw, 4)

    def learning_rate(self, update: int) -> float:
        """lr * min(1, k / warmup) for update k, then the schedule; never 0."""
        config = self.config
        warmup = round(config.warmup * self.total) if config.warmup < 1 else round(config.warmup)
        if update <= warmup:
            return config.lr * update / warmup
        progress = (update - 1 - warmup) / max(1, self.total - warmup)
        if config.schedule == "linear":
            return config.lr * (1 - progress)
        if config.schedule == "cosine":
            return config.lr * (0.5 * (1 + math.cos(math.pi * progress)))
        return config.lr * 1.0
