"""Train a model: `python train.py example/tiny-dpo.yml lr=2e-5`, or for several GPUs
`torchrun --nproc-per-node 8 train.py …`.

This file only wires the parts together; the update rule is in `algorithms/<name>.py`.
"""
import importlib
import sys
from dataclasses import asdict, replace

from data.errors import give_reason, notice, run_program
from engine import console
from engine.config import as_yaml, help_text, load_config


def main(argv: list[str]) -> None:
    run_config = load_config(argv)
    if "help" in run_config.flags:
        return print(help_text())
    # these imports take seconds, so they wait until the configuration is known to be good
    from data.dataset import load_datasets
    from engine import checkpoint, logs, ranks
    from engine.claim import release
    from engine.directory import changed_rates, choose_directory
    from engine.dry_run import marked
    from engine.fingerprint import fingerprints
    from engine.loop import Engine, Stopped
    from engine.rollouts import OnlineEngine
    from engine.score import critic_path
    from model import load
    from model.actor_critic import build_actor_critic
    from model.build import build_policy, shard
    from model.check import check_policy
    from model.reward_model import build_reward_model
    from rewards.functions import check_rewards

    common, config = run_config.common, run_config.config
    algorithm = importlib.import_module(f"algorithms.{common.algorithm}")
    # until here it is an object of the class alone, without its file
    config = algorithm.Config(**asdict(config))
    if "dry-run" in run_config.flags:
        from engine.dry_run import dry_run
        return dry_run(run_config, algorithm.DATA)
    ranks.start_processes(common.deterministic)
    rank, world = ranks.distributed()
    place = None
    try:
        # a run named as start model stands for its model of now, and a resumed run must start from the same
        start_model = ranks.from_main(checkpoint.model_path, common.model, notice)
        common = replace(common, model=start_model)
        values = asdict(common) | asdict(config)
        # the stored configuration always says resume: auto, since `resume` concerns this process only
        config_yaml = as_yaml(replace(common, resume="auto"), config)
        place = ranks.from_main(choose_directory, common.output, run_config.stem, common.resume, config_yaml)
        start = place.start
        run = logs.Run(place.directory, main=rank == 0)
        if place.finished:
            ranks.from_main(run.take_back)
            run.notice(f"{place.directory} is finished already: nothing is trained, nothing in it is touched")
            return run.summary(chat=algorithm.MODEL != "reward")
        if start:
            ranks.from_main(lambda: run.check_started(fingerprints(values)))
            if changed := ranks.from_main(changed_rates, place.directory, config_yaml):
                run.notice(changed)
        tokenizer = load.load_tokenizer_for(common, common.model, run.notice)
        load.check_path(getattr(config, "reference", None) or common.model, "reference")
        train_set, eval_set, report = load_datasets(common, config, algorithm.DATA, tokenizer, run.notice)
        if algorithm.DATA == "prompts":
            check_rewards(config, train_set + eval_set)
        if start:
            ranks.from_main(run.check_data, report)
        for line in marked(train_set[0], tokenizer, most=400):
            run.notice(line)
        policy = build_policy(common, tokenizer, start)
        check_policy(policy, train_set, common.share_prompt, run.notice)
        if algorithm.MODEL == "reward":
            policy = build_reward_model(policy, start or common.model, common.seed, run.notice)
        if algorithm.MODEL == "actor_critic":
            critic = critic_path(config.reward, tokenizer, run.notice)
            trunk = None
            if not config.share_value_trunk:
                trunk = build_policy(common, tokenizer, critic or common.model, frozen=True)
            policy = build_actor_critic(policy, trunk, critic, start, common.seed, run.notice)
        step = checkpoint.load_trainer(start)["step"] if start else 0
        # once more: loading may have fetched another commit of a hub model
        digests = ranks.from_main(fingerprints, values)
        if start:
            digests = ranks.from_main(run.check_digests, digests)
        ranks.from_main(run.begin, config_yaml, report, digests, step)
        run.notice(f"run {place.directory}" + (f", resumed from {start}" if start else ""))
        if world > 1:
            shard(policy)
        kind = OnlineEngine if algorithm.DATA == "prompts" else Engine
        engine = kind(common, policy, tokenizer, train_set, eval_set, run, algorithm.PROGRESS, start)
        engine.try_saving()
        algorithm.train(engine, config)
        ranks.from_main(run.summary, algorithm.MODEL != "reward")      # all leave together
    except Stopped as stop:
        # resume=never would start another run, resume=PATH an older part of this one
        words = argv if common.resume == "auto" else [*argv, f"resume={place.directory}"]
        line = f"{stop}; continue with: {ranks.command(words)}"
        give_reason(line)
        ranks.from_main(run.notice, line)      # all wait: torchrun ends all when the first one leaves
        sys.exit(stop.exit_code)
    finally:
        if place and rank == 0:
            release(place.directory)
        ranks.stop_processes()


if __name__ == "__main__":
    run_program(main, console.close)
