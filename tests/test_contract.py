"""What happens to a researcher who copies an algorithm file and edits a few lines: it works, or one sentence
says which line to add. Nothing that was trained is lost."""
import itertools
import math
import shutil
import signal

import pytest
from helpers import (
    CLOCK,
    ONLINE,
    REWARDS,
    ROOT,
    ROWS,
    algorithms_of,
    assert_same_weights,
    final_weights,
    metrics,
    refused,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from robust_helpers import join, train_on_ranks
from safetensors.torch import load_file

from data.errors import RunError
from engine.loop import Engine

NAME, NUMBERS = "my_algorithm", itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def edit(model, tmp_path, monkeypatch):
    """edit(name, (text, other), ...) -> run(output, key=value, ...): a run of a copy of algorithms/<name>.py,
    under another name, in which each `text`, found once, is replaced. Without edits the copy itself runs."""
    folder = algorithms_of(tmp_path / "project", monkeypatch)

    def edit(name, *edits):
        source = (ROOT / "algorithms" / f"{name}.py").read_text()
        for text, other in edits:
            assert source.count(text) == 1, (text, source.count(text))
            source = source.replace(text, other)
        copy = f"{NAME}_{next(NUMBERS)}"                  # a name of its own: Python keeps modules
        (folder / f"{copy}.py").write_text(source)
        rows = ROWS[name]
        data = write_jsonl(tmp_path / f"{copy}.jsonl", rows(10))
        held_out = write_jsonl(tmp_path / f"{copy}-eval.jsonl", rows(4, 50))

        def run(output, stop_after=None, **values):
            files = dict(model=model, data=data, eval_data=held_out, output=tmp_path / output)
            keys = dict(algorithm=copy, batch_size=4, max_length=200, lr=1e-3, save_every=1, keep=100,
                        eval_every=2, max_steps=6) | files
            config = write_config(tmp_path / f"{output}.yml", **keys | ONLINE.get(name, {}) | values)
            with monkeypatch.context() as patch:
                stop(patch, stop_after)
                train_here(config)
            return tmp_path / output
        return run
    return edit


def stop(patch, update):
    """A SIGTERM while `update` is made."""
    clip = Engine.clip_gradients

    def clip_and_stop(engine):
        clip(engine)
        if engine.step.index == update:
            engine.signals.number = signal.SIGTERM
    patch.setattr(Engine, "clip_gradients", clip_and_stop)


def resumed(run, output, update, **values):
    """A run that a signal ends after `update`, and that is continued."""
    with pytest.raises(SystemExit):
        run(output, stop_after=update, **values)
    return run(output, **values)


def updates_of(directory):
    return [row["step"] for row in metrics(directory)]


def told(directory):
    return (directory / "events.log").read_text()


def before(line, *others):
    """An edit: `others` stand before the line."""
    return line, "".join([*others, line])


def after(line, *others):
    """An edit: `others` stand after the line."""
    return line, "".join([line, *others])


CLIP = "        engine.clip_gradients()"
STEP = "        optimizer.step()\n"
ZERO = "        optimizer.zero_grad()\n"
LOG = "            step.log(losses, metrics)\n        engine"      # the first of two
OFFLINE_LOOP = "    for step in engine.steps():"
MICRO_BATCHES = "        for batch in step:"
ONLINE_LOOP = "        for step in engine.steps(rollout):"
ONLINE_ZERO = "            optimizer.zero_grad()\n"


# ---- leaving a loop ------------------------------------------------------------------------------------

@pytest.mark.parametrize("edit_of_loop, last", [
    (before(MICRO_BATCHES, "        if step.index == 4:\n            break\n"), 3),
    (after(ZERO, "        if step.index == 3:\n            break\n"), 3)])
def test_a_break_keeps_every_update_and_the_model(edit, edit_of_loop, last):
    whole = edit("dpo")("whole")
    left = edit("dpo", edit_of_loop)("left")
    assert updates_of(left) == list(range(1, last + 1))
    assert metrics(left) == metrics(whole)[:last]
    assert f"the algorithm ended the run after update {last} of 6" in told(left)
    saved = whole / "checkpoints" / f"step-{last:06d}" / "model.safetensors"
    assert_same_weights(final_weights(left), load_file(saved))


LEAVE_ROLLOUT = after(ONLINE_ZERO, "            if step.index % 2 == 0:\n                break\n")


def test_a_break_out_of_a_rollout_keeps_every_update(edit):
    """PPO's usual stop at a target KL: of four updates per rollout two are made."""
    run = edit("grpo", LEAVE_ROLLOUT)
    directory = run("left", max_steps=12)
    assert updates_of(directory) == [1, 2, 5, 6, 9, 10]
    assert (directory / "final").is_dir()
    part = resumed(run, "part", 6, max_steps=12)
    assert metrics(part) == metrics(directory)
    assert_same_weights(final_weights(part), final_weights(directory))


def test_a_break_out_of_the_rollouts_keeps_every_update(edit):
    leave = before(ONLINE_LOOP, "        if rollout.number == 1:\n            break\n")
    directory = edit("grpo", leave)("left")
    assert updates_of(directory) == [1, 2, 3, 4]
    assert "ended the run after update 4 of 6" in told(directory)
    assert (directory / "final").is_dir()


# ---- a line that is missing, or in the wrong place ----------------------------------------------------

BATCH_LOG = "                step.log(losses, metrics)\n"
REDUCED = LOG.replace("losses", "losses.mean()")
PER_PROMPT = '        rollout.once("difficulty", lambda: [[0.5] for _ in rollout.examples])\n'
PER_ROLLOUT = '        rollout.once("difficulty", list, [0.5])\n'
BACKWARD = "            (losses.sum() / step.num_examples).backward()"
ONLINE_BACKWARD = "                (losses.sum() / step.num_responses).backward()"
TWICE = "step for _ in range(2) for step in engine.steps("


def logged(metrics):
    """The edit that logs other metrics."""
    return LOG, LOG.replace("metrics", metrics)


LINES = {    # name: (algorithm, edits, what the sentence says)
    "log": ("dpo", [(LOG, "        engine")], "add the line step.log(losses, metrics)"),
    "clip": ("dpo", [(CLIP, "        pass #")],
             "add the line engine.clip_gradients() before optimizer.step()"),
    "step": ("dpo", [(STEP, "")],
             "add the line optimizer.step() before it, after engine.clip_gradients()"),
    "step and zero": ("dpo", [(STEP, ""), (ZERO, "")],
                      "add the line optimizer.step() after engine.clip_gradients()"),
    "zero": ("dpo", [(ZERO, "")], "add the line optimizer.zero_grad() after optimizer.step()"),
    "zero early": ("dpo", [(ZERO, ""), before(CLIP, ZERO)],
                   "optimizer.zero_grad() came before optimizer.step() in update 1"),
    "zero between": ("dpo", [(ZERO, ""), before(STEP, ZERO)], "add the line optimizer.step() before it"),
    "two steps": ("dpo", [after(STEP, STEP)], "optimizer.step() was called twice in update 1"),
    "split": ("dpo", [(', split="eval"', "")], "write step.log(losses, metrics, split='eval')"),
    "mean": ("dpo", [(LOG, REDUCED)], "pass the losses per example, response or token"),
    "a loss per pair of pairs": ("dpo", [(LOG, LOG.replace("losses", "losses[:, None] - losses"))],
                                 "one number for every pair of two things"),
    "a mean as a metric": ("dpo", [logged("{'x': losses.mean()}")], "'x' of shape (), whose mean over"),
    "a square as a metric": ("dpo", [logged("{'x': losses[:, None]}")], "'x' of shape (4, 1), whose mean"),
    "the loss as a metric": ("dpo", [logged("{'loss': losses}")], "'loss', which every row has already"),
    "a name of the row": ("dpo", [logged("{'epoch': losses}")], "'epoch', which every row has already"),
    "backward": ("dpo", [(BACKWARD, "            pass #")],
                 "update 1 has no gradient; fix: add the line (losses.sum() / step.num_examples).backward()"),
    "online backward": ("grpo", [(ONLINE_BACKWARD, "                pass #")],
                        "update 1 has no gradient; fix: add the line"),
    "steps twice": ("dpo", [(OFFLINE_LOOP, f"    for step in ({TWICE})):")], "update 1 was made already"),
    "a rollout twice": ("grpo", [(ONLINE_LOOP, f"        for step in ({TWICE}rollout)):")],
                        "update 1 was made already; fix: iterate engine.steps once"),
    "a step twice": ("dpo", [(MICRO_BATCHES, "        for batch in (x for _ in range(2) for x in step):")],
                     "update 1 has 2 losses of 1 micro-batches"),
    "a rate before": ("dpo", [before(OFFLINE_LOOP, "    optimizer.param_groups[1]['lr'] = 1.0\n")],
                      "has lr 1, which every update replaces by that of the keys lr (0.001), schedule"),
    "score": ("grpo", [("        engine.score(rollout)", "        pass #")],
              "add the line engine.score(rollout) before"),
    "each reward": ("gdpo", [("        engine.score(rollout)", "        pass #")],
                    "add the line engine.score(rollout) before engine.each_reward(rollout)"),
    "advantages": ("grpo", [("        rollout.advantages = ", "        rollout.advantage = ")],
                   "write rollout.advantages"),
    "read": ("grpo", [("(rollout.rewards)", "(rollout.reward)")], "write rollout.rewards"),
    "extra": ("grpo", [('extra("advantages")', 'extra("advantage")')], "the batch has no 'advantage'"),
    "online log": ("grpo", [(BATCH_LOG, "")], "add the line step.log(losses, metrics)"),
    "per prompt": ("grpo", [before(ONLINE_LOOP, PER_PROMPT)],
                   "difficulty has the shape (1,) for a prompt with 4 completions"),
    "per rollout": ("grpo", [before(ONLINE_LOOP, PER_ROLLOUT)],
                    "fix: give a list with one tensor per prompt"),
    "nothing": ("dpo", [(OFFLINE_LOOP, "    for step in ():")],
                "nothing was trained, so there is no model to write"),
}


@pytest.mark.parametrize("name", LINES)
def test_one_sentence_names_the_line(edit, name):
    algorithm, edits, says = LINES[name]
    run = edit(algorithm, *edits)
    sentence = refused(run, "run")
    assert says in sentence


def test_a_rate_that_is_set_within_an_update_acts_and_is_logged(edit):
    set_rate = before(STEP, "        optimizer.param_groups[0]['lr'] = 0.5 * step.index\n")
    rows = metrics(edit("dpo", set_rate)("run"))
    assert [row["lr"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_rewards_of_a_rollout_are_not_assigned_into(edit):
    assign = before("        rollout.advantages =", "        rollout.rewards[0] = 0 * rollout.rewards[0]\n")
    with pytest.raises(TypeError, match="item assignment"):
        edit("grpo", assign)("run")


def test_what_was_made_before_is_kept(edit, tmp_path):
    """The gradients are not cleared: the second update stops, the first one is on the disk."""
    run = edit("dpo", ("        optimizer.zero_grad()\n", ""))
    with pytest.raises(RunError, match="in update 2"):
        run("run")
    assert updates_of(tmp_path / "run") == [1]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


# ---- what is computed once, and what is kept between updates -------------------------------------------

PENALTY = before(
    "        rollout.advantages =",
    "        pairs = zip(rollout.rewards, rollout.lengths)\n",
    "        rollout.rewards = [rewards - 0.1 * (lengths > 5) for rewards, lengths in pairs]\n")
IN_PLACE = before(
    "        rollout.advantages =",
    "        for rewards, lengths in zip(rollout.rewards, rollout.lengths):\n",
    "            rewards -= 0.1 * (lengths > 5)\n")
ONCE = before(
    ONLINE_LOOP,
    "        own = rollout.once('own', lambda: [0.01 * part for part in rollout.lengths])\n",
    "        rollout.advantages = [group - part for group, part in zip(rollout.advantages, own)]\n")
AVERAGED = [
    ("    reference = engine.reference(config.reference) if config.beta > 0 else None\n",
     "    reference = engine.reference(config.reference)\n"
     "    copies = {name: weight.detach().float().clone() for name, weight in reference.named_parameters()}\n"
     "    averaged = engine.remember('averaged', copies)\n"),
    before(
        "        engine.score(rollout) ",
        "        for name, weight in reference.named_parameters():\n",
        "            weight.data.copy_(averaged[name])\n"),
    after(
        ONLINE_ZERO,
        "            for name, parameter in policy.named_parameters():\n",
        "                averaged[name].lerp_(parameter.detach(), 0.3)\n")]
CONTROLLER = [
    before(
        OFFLINE_LOOP,
        "    import torch\n",
        "    state = engine.remember('controller', {'beta': torch.tensor(config.beta)})\n"),
    ("            config.beta,\n", "            float(state['beta']),\n"),
    after(ZERO, "        state['beta'] *= 1.5\n")]


@pytest.mark.parametrize("algorithm, edits, values", [
    ("grpo", [PENALTY], dict(reward=f"{REWARDS}:coarse")),
    ("grpo", [IN_PLACE], dict(reward=f"{REWARDS}:coarse")),
    ("grpo", [ONCE], {}),
    ("grpo", AVERAGED, dict(beta=0.5)),
    ("grpo", AVERAGED, dict(beta=0.5, precision="bf16")),      # the reference is rounded, the average not
    ("dpo", CONTROLLER, {}),
], ids=["penalty", "penalty in place", "once", "averaged reference", "in bf16", "controller"])
def test_a_resumed_run_ends_as_one_without_a_stop(edit, algorithm, edits, values):
    run, plain = edit(algorithm, *edits), edit(algorithm)
    whole = run("whole", **values)
    for update in (2, 5):                                # within a rollout, and within the next one
        part = resumed(run, f"part-{update}", update, **values)
        assert metrics(part) == metrics(whole)
        assert_same_weights(final_weights(part), final_weights(whole))
    assert metrics(plain("plain", **values)) != metrics(whole)      # the edit does something


def own_algorithms(rank, port, count, project):
    """The files in `project`/algorithms are algorithms too."""
    join(rank, port, count)
    algorithms_of(project, pytest.MonkeyPatch())


def test_an_averaged_reference_resumes_on_two_ranks(edit, tmp_path):
    """Sharded: what a forward has gathered must not hide that the reference has changed."""
    run = edit("grpo", *AVERAGED)
    directory = run("run", max_steps=1, beta=0.5)        # writes the configuration
    shutil.rmtree(directory)
    config = tmp_path / "run.yml"
    config.write_text(config.read_text().replace("max_steps: 1", "max_steps: 6"))

    def train():
        ranks = train_on_ranks(config, patch=own_algorithms, arguments=(tmp_path / "project",))
        assert [rank.code for rank in ranks] == [0, 0], ranks
        return metrics(directory), final_weights(directory)

    rows, weights = train()
    shutil.rmtree(directory / "final")
    for update in (4, 5, 6):
        shutil.rmtree(directory / "checkpoints" / f"step-{update:06d}")
    again, weights_again = train()
    assert "step-000003" in told(directory)
    assert again == rows
    assert_same_weights(weights_again, weights)


def test_two_ranks_take_extra_forwards_and_metrics_of_one_of_them(edit, tmp_path):
    """A forward without a backward gathers the weights again: they must be sharded before the clipping, and
    after the update. A metric may be known on one rank alone, or come in another order."""
    forward = (
        "        import torch\n"
        "        with torch.no_grad():\n"
        "            step.index and policy(batch)\n")
    mixed = "{**(metrics if engine.rank else dict(reversed(metrics.items()))), **mine}"
    log = LOG.replace("metrics", mixed).replace("        engine", f"{forward}        engine")
    mine = "            mine = {'mine': 0 * losses + 5} if engine.rank else {}\n"
    found = []
    for edits in ([], [(LOG, mine + log), before(STEP, forward)]):
        run = edit("dpo", *edits)
        directory = run("run", max_steps=1, save_every=None)      # writes the configuration
        shutil.rmtree(directory)
        config = tmp_path / "run.yml"
        config.write_text(config.read_text().replace("max_steps: 1", "max_steps: 4"))
        ranks = train_on_ranks(config, patch=own_algorithms, arguments=(tmp_path / "project",))
        assert [rank.code for rank in ranks] == [0, 0], ranks
        found.append((metrics(directory), final_weights(directory)))
        shutil.rmtree(directory)
    (plain, weights), (edited, edited_weights) = found
    assert [row.pop("mine") for row in edited if row["split"] == "train"] == [5.0] * 4
    assert edited == plain
    assert_same_weights(edited_weights, weights)


# ---- more than the paper -------------------------------------------------------------------------------

def test_a_second_log_adds_metrics_and_no_loss(edit):
    second = "            step.log(0 * losses, {'pairs': losses * 0 + 3})\n        engine"
    plain = edit("dpo")("plain")
    edited = edit("dpo", (LOG, LOG.replace("        engine", second)))("edited")
    rows = metrics(edited)
    assert [row.pop("pairs") for row in rows] == [3.0] * 6
    assert rows == metrics(plain)


def test_an_entropy_bonus(edit):
    """The logged entropy is at most log(vocabulary), and its gradient moves the weights."""
    forward = ("logps = policy(batch, config.temperature) ",
               "logps, entropies = policy(batch, config.temperature, entropy=True) ")
    bonus = before(
        "                losses = batch.mean(losses) ",
        "                losses = losses - 0.1 * entropies\n",
        "                metrics['exact_entropy'] = entropies\n")
    plain, edited = edit("grpo")("plain"), edit("grpo", forward, bonus)("edited")
    first = metrics(edited)[0]
    assert 0 < first["exact_entropy"] < math.log(259)
    assert first["grad_norm"] != metrics(plain)[0]["grad_norm"]
    assert all(math.isfinite(row["loss"]) for row in metrics(edited))


def test_a_copy_is_the_original(edit, tmp_path):
    """Every metric and weight of a copy under another name, online and offline."""
    for name in ("dpo", "rm", "grpo"):
        copy = edit(name)(f"copy-{name}")
        # where names are looked up
        shutil.copy(ROOT / "algorithms" / f"{name}.py", tmp_path / "project" / "algorithms")
        train_here(tmp_path / f"copy-{name}.yml", f"algorithm={name}", f"output={tmp_path / name}")
        rows = metrics(tmp_path / name)
        assert rows == metrics(copy) and not any(key in row for row in rows for key in CLOCK)
        assert_same_weights(final_weights(copy), final_weights(tmp_path / name))
