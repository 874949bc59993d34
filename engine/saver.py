"""What a run writes beside its metrics: samples, checkpoints and the final model."""
import os
import shutil

import torch

from data.errors import RunError, UserError
from data.pack import Example
from data.tokenise import stop_ids
from engine import background, checkpoint, ranks, sealed
from engine.card import model_card
from engine.options import Generation
from engine.ranks import from_main, sum_over_ranks
from engine.report import read_run
from engine.rollout import with_completions
from engine.shares import deal, local_part, saved_tensors, share_of, trained, write_by_all
from model import lora
from model.build import reshard
from model.classifier import save_classifier, why_no_classifier
from model.load import base_of, generation_settings, is_finite, lacks_processor
from model.reward_model import RewardModel
from model.sampler import sample
from model.state import num_bytes

SAMPLES, SAMPLE_LENGTH = 4, 128      # completions in samples.jsonl at a time, and their tokens


class Saver:
    """Writes the checkpoints and the final model of an engine."""

    def __init__(self, engine):
        self.engine = engine

    # ---- before the first update ---------------------------------------------------------------------

    def try_saving(self) -> None:
        """Before the first update: write everything but the weights once, so that no run can end with
        nothing. All that is saved gets the stop tokens of the run."""
        engine = self.engine
        engine.policy.lm.generation_config.eos_token_id = stop_ids(engine.tokenizer)
        from_main(self.write_trial)

    def write_trial(self) -> None:
        engine, lm, merge = self.engine, self.engine.policy.lm, self.engine.config.merge
        _, changed = generation_settings(base_of(engine.start or engine.config.model))
        if changed:
            engine.notice(changed)
        if lacks_processor(lm) and (merge or not lora.settings(lm)):
            engine.notice(f"{lm.name_or_path} has no processor files beside it, so none are saved: servers "
                          "can load final/ as a model of text only")
        reason = why_no_classifier(lm, merge)
        if isinstance(engine.policy, RewardModel) and reason:
            engine.notice(f"classifier/ will not be written: {reason}")
        outline = checkpoint.outline(engine.policy)
        one = num_bytes(outline)

        def write(temporary):
            checkpoint.write_checkpoint(temporary, lm, engine.tokenizer, outline, {}, {"step": 0}, {})

        def try_to(directory, fill):
            sealed.write_sealed(directory, fill, trial=True)

        try_to(engine.run.path("checkpoint"), write)
        if merge:
            lm, outline = lora.merged(lm, outline)
        weights = self.write_final(lm, outline, try_to, with_final=merge)
        moments = 2 * num_bytes(trained(engine.policy))
        self.check_disk(one + moments, weights)

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
        background.wait()                   # for the save before: there is never more than one copy
        from_main(engine.run.check_there)
        self.check_weights(update)
        # there all that is saved is a copy anyway
        is_copy = engine.world > 1 or engine.policy.device.type == "cuda"
        # a reward may change the working directory, while it is restored only in its own thread
        root = os.path.abspath(engine.run.directory) if is_copy else engine.run.directory
        directory = os.path.join(root, "checkpoints", f"step-{update:06d}")
        trainer, stored = {"step": update}, {}
        if engine.online:
            position, stored = engine.online.state(update, is_left)
            trainer |= position
        remembered = {}
        for name, tensors in engine.remembered.items():
            for key, tensor in tensors.items():
                remembered[f"{name}/{key}"] = tensor
        write = checkpoint.writer_of(directory, engine.policy, engine.tokenizer, engine.optimizer, trainer,
                                     stored, remembered, is_copy)

        def clean():
            engine.run.replace(root, saved=directory)
            checkpoint.clean(root, keep=engine.config.keep)

        def finish(group=None):
            write(group)
            from_main(sealed.explained, directory, clean, group=group)

        if is_copy:
            background.start(finish, ranks.aside)
        else:
            finish()

    def check_background(self) -> None:
        """Stop the run, on all ranks, where a save in the background has failed."""
        if background.thread is None:
            return
        has_failed = float(background.fault is not None)
        failures, = sum_over_ranks([has_failed], self.engine.policy.device)
        if failures:
            background.wait()

    def last_checkpoint(self) -> str:
        background.join()
        saved = checkpoint.checkpoints(self.engine.run.directory)
        return saved[-1] if saved else "none"

    def check_weights(self, update: int) -> None:
        """Stop the run, on all ranks, before anything is written, if a trained weight, a moment of it or the
        policy's answer to a row is not finite: a loss would show it one update later."""
        policy = self.engine.policy
        reshard(policy)
        tensors = {}
        for name, parameter in trained(policy).items():
            tensors[name] = parameter
            for key, value in self.engine.optimizer.state.get(parameter, {}).items():
                tensors[f"{key} of {name}"] = value
        faults = [float(not is_finite(local_part(tensor))) for tensor in tensors.values()]
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
        background.wait()
        from_main(engine.run.check_there)
        self.check_weights(engine.last)
        lm = engine.policy.lm
        weights = share_of(saved_tensors(engine.policy), deal(engine.policy, engine.world))
        try:
            if engine.config.merge:
                lm, weights = self.merged(weights)
            self.write_final(lm, weights, self.write_over)
        except UserError:
            if engine.config.merge:
                engine.save(engine.last)          # the merge may have failed: at least the adapter is kept
                background.wait()
            raise
        from_main(engine.run.replace, engine.run.directory)
        from_main(engine.run.finish, engine.record.pace())

    def merged(self, weights: dict) -> tuple:
        """The LM with the adapter merged into it, and its weights, on rank 0; nothing to write on others."""
        lm, merged = self.engine.policy.lm, []
        from_main(lambda: merged.append(lora.merged(lm, weights)))
        return merged[0] if merged else (lm, {})

    def write_over(self, directory: str, fill) -> None:
        """Write a directory, in the place of an earlier one; what a user changed in that is kept."""
        aside = from_main(sealed.set_aside, directory)
        if aside:
            self.engine.notice(f"what was changed in {directory} is kept in {aside}")
        write_by_all(directory, fill)

    def write_final(self, lm, weights: dict, write, with_final: bool = True) -> int:
        """Write what a run ends with by `write(directory, function that fills it)`; the number of bytes of
        these weights, this rank's share."""
        engine = self.engine
        if engine.config.save_dtype == "bf16":
            weights = checkpoint.in_dtype(lm, weights, torch.bfloat16)

        def filling(save):
            return lambda temporary: save(lm, engine.tokenizer, weights, temporary)

        copies = 1
        # not of `lm`: where an adapter is merged, only rank 0 has the plain model
        reason = why_no_classifier(engine.policy.lm, engine.config.merge)
        if isinstance(engine.policy, RewardModel) and not reason:
            write(engine.run.path("classifier"), filling(save_classifier))
            copies = 2

        def save_with_card(lm, tokenizer, weights, temporary):
            checkpoint.save_model(lm, tokenizer, weights, temporary)
            self.write_card(temporary)

        if with_final:                                                            # else it is a checkpoint's
            write(engine.run.path("final"), filling(save_with_card))              # last: the run is finished
        return copies * num_bytes(weights)

    def write_card(self, directory: str) -> None:
        """README.md of the final model; one rank writes it."""
        engine = self.engine
        run = read_run(engine.run.directory) if engine.run.main and engine.run.begun else None
        if run:
            is_adapter = bool(lora.settings(engine.policy.lm)) and not engine.config.merge
            is_reward = isinstance(engine.policy, RewardModel)
            text = model_card(run, engine.config.model, is_adapter, is_reward)
            with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
                file.write(text)

    # ---- samples -------------------------------------------------------------------------------------

    def write_samples(self, update: int) -> None:
        """Append the completions of SAMPLES prompts to samples.jsonl; those of a rollout as whole groups,
        with their rewards."""
        engine = self.engine
        rollout = engine.online.rollout if engine.online else None
        examples = rollout.examples if rollout else self.sampled(update)
        for example in examples[:SAMPLES]:
            rows = self.samples_of(example, update)
            for row in rows:
                engine.run.append("samples.jsonl", row)
            if engine.config.show_samples:
                engine.run.show_samples(rows)

    def samples_of(self, example: Example, update: int) -> list[dict]:
        """A row for each of an example's responses, of a rollout with its rewards."""
        decode, online = self.engine.tokenizer.decode, self.engine.online
        known = {}      # what a row calls a number, and what a rollout calls it
        if online:
            known["truncated"] = "truncated"
            if online.rewards:
                known["reward"] = "rewards"
            if len(online.rewards) > 1:
                for reward in online.rewards:
                    known[f"rewards/{reward.name}"] = f"rewards/{reward.name}"
        rows = []
        for k, response in enumerate(example.responses):
            row = {"step": update, "prompt": decode(example.prompt), "completion": decode(response.tokens)}
            for name, number in known.items():
                row[name] = example.extras[number][k].item()
            rows.append(row)
        return rows

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
