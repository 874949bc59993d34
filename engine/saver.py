"""What a run writes beside its metrics: samples, checkpoints and the final model."""
import shutil

import torch

from data.errors import RunError, UserError
from data.pack import Example
from data.tokenise import stop_ids
from engine import checkpoint
from engine.options import Generation
from engine.ranks import from_main, sum_over_ranks
from engine.rollout import with_completions
from model import lora
from model.build import reshard
from model.classifier import save_classifier, why_no_classifier
from model.load import base_of, generation_settings, is_finite
from model.reward_model import RewardModel
from model.sampler import sample

SAMPLES, SAMPLE_LENGTH = 4, 128      # completions in samples.jsonl at a time, and their tokens


class Saver:
    """Writes the checkpoints and the final model of an engine."""

    def __init__(self, engine):
        self.engine = engine

    # ---- before the first update ---------------------------------------------------------------------

    def try_saving(self) -> None:
        """Before the first update: write everything but the weights once, so that no run can end with
        nothing. All that is saved gets the template's stop tokens."""
        engine = self.engine
        engine.policy.lm.generation_config.eos_token_id = stop_ids(engine.tokenizer)
        from_main(self.write_trial)

    def write_trial(self) -> None:
        engine, lm, merge = self.engine, self.engine.policy.lm, self.engine.config.merge
        _, changed = generation_settings(base_of(engine.start or engine.config.model))
        if changed:
            engine.notice(changed)
        reason = why_no_classifier(lm, merge)
        if isinstance(engine.policy, RewardModel) and reason:
            engine.notice(f"classifier/ will not be written: {reason}")
        outline = checkpoint.outline(engine.policy)

        def write(temporary):
            checkpoint.write_checkpoint(temporary, lm, engine.tokenizer, outline, {}, {"step": 0}, {})

        checkpoint.write_sealed(engine.run.path("checkpoint"), write, trial=True)
        final = self.write_final(outline, trial=True)
        moments = 2 * checkpoint.num_bytes(checkpoint.trained(engine.policy))
        self.check_disk(checkpoint.num_bytes(outline) + moments, final)

    def check_disk(self, one: int, final: int) -> None:
        """Warn if the disk has no room for checkpoints of `one` bytes each and `final` bytes at the end."""
        config, directory = self.engine.config, self.engine.run.directory
        planned = self.engine.plan.total // config.save_every if config.save_every else 0
        at_once = max(1, min(planned, config.keep + 1))       # the oldest goes when the newest is there
        missing = max(1, at_once - len(checkpoint.checkpoints(directory)))
        free = shutil.disk_usage(directory).free
        if free < missing * one + final:
            free, one, final = (f"{size / 1e9:.3g} GB" for size in (free, one, final))
            self.engine.notice(f"warning: the disk of {directory} has {free} left, but {missing} "
                               f"checkpoints of {one} and {final} at the end do not fit; "
                               "fix: free disk space, or lower keep")

    # ---- checkpoints ---------------------------------------------------------------------------------

    def save(self, update: int, is_left: bool = False) -> None:
        """Write a checkpoint after an update. `is_left`: the algorithm has left its rollout, or its run."""
        engine = self.engine
        if not engine.optimizer.state:      # nothing is trained yet, and a new start makes the same
            return
        from_main(engine.run.check_there)
        self.check_weights(update)
        directory = engine.run.path("checkpoints", f"step-{update:06d}")
        trainer, stored = {"step": update}, {}
        if engine.online:
            position, stored = engine.online.state(update, is_left)
            trainer |= position
        remembered = {}
        for name, tensors in engine.remembered.items():
            for key, tensor in tensors.items():
                remembered[f"{name}/{key}"] = tensor
        checkpoint.save_checkpoint(
            directory, engine.policy, engine.tokenizer, engine.optimizer, trainer, stored, remembered)
        if engine.rank == 0:
            engine.run.replace(saved=directory)
            checkpoint.clean(engine.run.directory, keep=engine.config.keep)

    def last_checkpoint(self) -> str:
        saved = checkpoint.checkpoints(self.engine.run.directory)
        return saved[-1] if saved else "none"

    def check_weights(self, update: int) -> None:
        """Stop the run, on all ranks, before anything is written, if a trained weight, a moment of it or the
        policy's answer to a row is not finite: a loss would show it one update later."""
        policy = self.engine.policy
        reshard(policy)
        tensors = {}
        for name, parameter in checkpoint.trained(policy).items():
            tensors[name] = parameter
            for key, value in self.engine.optimizer.state.get(parameter, {}).items():
                tensors[f"{key} of {name}"] = value
        faults = [float(not is_finite(checkpoint.local_part(tensor))) for tensor in tensors.values()]
        counts = sum_over_ranks(faults, policy.device)
        bad = [name for name, count in zip(tensors, counts) if count]
        if not bad:
            bad = self.wrong_answer()
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise RunError(f"not finite after update {update}: {bad[0]}{more}; it was not saved; "
                           f"last checkpoint: {self.last_checkpoint()}; fix: lower lr")

    @torch.no_grad()
    def wrong_answer(self) -> list[str]:
        """A row of the last update to which the policy's answer is not finite; [] if there is none."""
        policy, step = self.engine.policy, self.engine.step
        if step is None or not step.examples:
            return []
        example = min(step.examples, key=Example.size)
        answer = policy(policy.collate([example]))
        reshard(policy)
        return [] if answer.isfinite().all() else [f"the policy's answer to {example.where}"]

    # ---- the final model -----------------------------------------------------------------------------

    def save_final(self) -> None:
        """`final/`, loadable by name; for a reward model also `classifier/`, for
        AutoModelForSequenceClassification."""
        engine = self.engine
        from_main(engine.run.check_there)
        self.check_weights(engine.last)
        weights = checkpoint.model_state(engine.policy)
        try:
            from_main(self.write_final, weights)
        except UserError:
            if engine.config.merge:
                engine.save(engine.last)          # the merge may have failed: at least the adapter is kept
            raise

    def write_final(self, weights: dict, trial: bool = False) -> int:
        """Write, or try, what a run ends with, on rank 0; the number of bytes of its weights."""
        engine, lm = self.engine, self.engine.policy.lm
        if engine.config.merge:
            lm, weights = lora.merged(lm, weights)
        if engine.config.save_dtype == "bf16":
            weights = checkpoint.in_dtype(weights, torch.bfloat16)

        def write(name, save):
            def fill(temporary):
                save(lm, engine.tokenizer, weights, temporary)

            path = engine.run.path(name)
            aside = None if trial else checkpoint.set_aside(path)
            if aside:
                engine.notice(f"what was changed in {path} is kept in {aside}")
            checkpoint.write_sealed(path, fill, trial)

        copies = 1
        if isinstance(engine.policy, RewardModel) and not why_no_classifier(lm):
            write("classifier", save_classifier)
            copies = 2
        if engine.config.merge or not trial:            # else a trial has written the same as a checkpoint
            write("final", checkpoint.save_model)       # last: it marks the run as finished
        if not trial:
            engine.run.replace()
            engine.run.finish()
        return copies * checkpoint.num_bytes(weights)

    # ---- samples -------------------------------------------------------------------------------------

    def write_samples(self, update: int) -> None:
        """Append SAMPLES prompts and completions to samples.jsonl; those of a rollout with their reward."""
        engine, decode = self.engine, self.engine.tokenizer.decode
        examples = engine.online.rollout.examples if engine.online else self.sampled(update)
        for example in examples[:SAMPLES]:
            completion = decode(example.responses[0].tokens)
            row = {"step": update, "prompt": decode(example.prompt), "completion": completion}
            if "rewards" in example.extras:
                row["reward"] = float(example.extras["rewards"][0])
            engine.run.append("samples.jsonl", row)

    def sampled(self, update: int) -> list[Example]:
        """The first held-out (else training) prompts with one completion each, at temperature 1 and keyed by
        (seed, update). All ranks generate the same, so that sharded forwards stay in step."""
        engine = self.engine
        examples = (engine.eval_set or engine.train_set)[:SAMPLES]
        sampling = Generation(max_completion_length=SAMPLE_LENGTH)
        prompts = [example.prompt for example in examples]
        keys = [(engine.config.seed, update, number) for number in range(len(examples))]
        found = sample(engine.policy, engine.tokenizer, prompts, keys, 1, sampling)
        return [with_completions(example, completions) for example, completions in zip(examples, found)]
