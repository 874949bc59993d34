"""From a configuration to an engine: what train.py, the benchmarks and the tests all start with."""
import importlib
import os
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

from engine import checkpoint
from engine.config import as_yaml
from engine.fingerprint import fingerprints
from engine.inputs import marked, read_inputs
from engine.logs import Run
from engine.loop import Engine
from engine.opening import opening, planned_updates
from engine.ranks import check_copies, check_shared, distributed, from_main
from engine.reward_models import critic_path
from model import lora
from model.actor_critic import build_actor_critic
from model.build import build_critic_trunk, build_policy, keep_no_copies, reshard, shard
from model.check import check_policy, check_sampling
from model.compiled import compile_policy
from model.experts import router_loss
from model.load import is_adapter
from model.modelscope import as_written
from model.policy import Policy
from model.reward_model import build_reward_model


def build(run_config, run: Run, start: str | None = None,
          policy: Policy | None = None) -> tuple[ModuleType, Any, Engine]:
    """(the algorithm's file, its Config, the engine that trains it).

    Data are read before the model, whose loading takes longest. `start`: the checkpoint to continue from;
    `policy`: the start model, where it is loaded already."""
    common = run_config.common
    _, world = distributed()
    check_copies(common.replicate, world)
    check_shared(run.directory)
    algorithm = importlib.import_module(f"algorithms.{common.algorithm}")
    # until here it is an object of the class alone, without its file
    config = algorithm.Config(**asdict(run_config.config))
    runs = os.path.dirname(os.path.normpath(run.directory))
    tokenizer, data = read_inputs(common, config, algorithm.DATA, run.notice, runs)
    train_set = data.train_set
    if start:
        from_main(run.check_data, data.reports)
    for line in marked(train_set[0], tokenizer, most=400):
        run.notice(line)
    if policy is None:
        trains_adapter = is_adapter(common.model)
        policy = build_policy(start or common.model, tokenizer, common, trains_adapter=trains_adapter)
    if world == 1:
        check_and_compile(policy, common, config, train_set, run.notice)
    policy = with_heads(policy, algorithm.MODEL, common, config, tokenizer, start, train_set, run.notice)
    if algorithm.MODEL != "reward":
        add_router_loss(policy, common.router_aux_loss_coef, run.notice)
    left_out = lora.left_out(policy.lm) if lora.settings(policy.lm) else None
    if left_out:
        run.notice(left_out)
    if world > 1:      # no device holds the whole model, so that it is checked as it is trained
        shard(policy, common.replicate)
        check_and_compile(policy, common, config, train_set, run.notice)
        keep_no_copies(policy)
        reshard(policy)
    step = checkpoint.load_trainer(start)["step"]
    # once more: loading may have fetched another commit of a hub model
    digests = from_main(fingerprints, asdict(common) | asdict(config))
    if start:
        digests = from_main(run.check_digests, digests)
    from_main(run.begin, stored_yaml(common, config), data.reports, digests, step)
    run.notice(f"run {run.directory}" + (f", resumed from {start}" if start else ""))
    run.notice(opening(common, config, policy, train_set, data.eval_set, algorithm.DATA, step, world))
    engine = Engine(
        common, policy, tokenizer, train_set, data.eval_set, run, algorithm.DATA, algorithm.PROGRESS, start)
    return algorithm, config, engine


def check_and_compile(policy: Policy, common, config, examples, notice) -> None:
    check_policy(policy, examples, common, notice)
    check_sampling(policy, examples, notice)
    compile_policy(policy, common, planned_updates(common, config, len(examples)), examples, notice)


def with_heads(policy: Policy, kind: str, common, config, tokenizer, start: str | None, examples,
               notice) -> Policy:
    """The policy, or what an algorithm's MODEL makes of it: a reward model, or a policy with its critic."""
    if kind == "reward":
        return build_reward_model(policy, start or common.model, common.seed, notice)
    if kind == "actor_critic":
        critic = critic_path(config.reward, tokenizer, notice)
        trunk = None
        if config.uses_critic():
            trunk = build_critic_trunk(
                critic or common.model, tokenizer, common, policy, examples, notice)
        return build_actor_critic(policy, trunk, critic, start, common.seed, notice)
    return policy


def add_router_loss(policy: Policy, coefficient: float | None, notice) -> None:
    """From now on the auxiliary loss of a mixture of experts is a part of every update."""
    policy.router_loss = router_loss(policy.lm, coefficient)
    if policy.router_loss:
        notice(f"router: {policy.router_loss.coefficient:g} times its auxiliary loss is added to every "
               "update; router_aux_loss_coef=0 leaves it out")


def stored_yaml(common, config) -> str:
    """The configuration as a run stores it: always with resume: auto, since `resume` concerns one process."""
    return as_yaml(replace(common, model=as_written(common.model), resume="auto"), config)
