"""Train a model: `python train.py example/tiny-dpo.yml lr=2e-5`, or `torchrun --nproc-per-node 8 train.py …` for several GPUs.

This file only wires the parts together; the update rule is in `algorithms/<name>.py`.
"""
import importlib
import shlex
import sys
from dataclasses import replace

from data.errors import run_program
from engine import console
from engine.config import as_yaml, help_text, load_config


def main(argv: list[str]) -> None:
    run_config = load_config(argv)
    if "help" in run_config.flags:
        return print(help_text())
    # these imports take seconds, so they wait until the configuration is known to be good
    from data.dataset import load_datasets
    from engine import checkpoint, load, logs, model, ranks, value
    from engine.loop import Engine, Stopped
    from engine.online import OnlineEngine

    common, config = run_config.common, run_config.config
    algorithm = importlib.import_module(f"algorithms.{common.algorithm}")
    if "dry-run" in run_config.flags:
        from engine.dry_run import dry_run
        return dry_run(run_config, algorithm.DATA)
    ranks.start_processes(common.deterministic)
    rank, world = ranks.distributed()
    try:
        # a run as start model is its final/ or newest checkpoint of now: a resumed run must start from the same one
        common = replace(common, model=ranks.from_main(checkpoint.model_path, common.model, lambda text: print(text, file=sys.stderr)))
        config_yaml = as_yaml(replace(common, resume="auto"), config)      # how this process was started is not the run's business
        directory, start = ranks.from_main(logs.choose_directory, common.output, run_config.stem, common.resume, config_yaml)
        run = logs.Run(directory, main=rank == 0)
        tokenizer = load.load_tokenizer(common.model)
        train_set, eval_set, report = load_datasets(common, config, algorithm.DATA, tokenizer, run.notice)
        policy = model.build_policy(common, tokenizer, start)
        model.check_policy(policy, train_set, common.share_prompt, run.notice)
        if algorithm.MODEL == "reward":
            policy = model.build_reward_model(policy, start or common.model, common.seed)
        if algorithm.MODEL == "actor_critic":
            policy = value.build_actor_critic(policy, common, config, tokenizer, start, run.notice)
        step = checkpoint.load_trainer(start)["step"] if start else 0
        run.begin(config_yaml, report, step)
        run.notice(f"run {directory}" + (f", resumed from {start}" if start else ""))
        if world > 1:
            model.shard(policy)
        kind = OnlineEngine if algorithm.DATA == "prompts" else Engine
        engine = kind(common, policy, tokenizer, train_set, eval_set, run, algorithm.PROGRESS, start)
        algorithm.train(engine, config)
        run.summary(chat=algorithm.MODEL != "reward")
    except Stopped as stop:
        # resume=never would start another run, resume=PATH an older part of this one
        words = argv if common.resume == "auto" else [*argv, f"resume={directory}"]
        run.notice(f"{stop}; continue with: python train.py {shlex.join(words)}")
        sys.exit(stop.exit_code)
    finally:
        ranks.stop_processes()


if __name__ == "__main__":
    run_program(main, console.close)
