"""What happens to a researcher who copies an algorithm file and edits a few lines: it works, or one sentence says
which line to add. Nothing that was trained is lost."""
import itertools
import math
import shutil
import signal

import algorithms
import pytest
from helpers import (
    CLOCK,
    ONLINE,
    REWARDS,
    ROOT,
    ROWS,
    assert_same_weights,
    final_weights,
    metrics,
    refused,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from safetensors.torch import load_file

from data.errors import RunError
from engine import definition
from engine.loop import Engine

NAME, NUMBERS = "my_algorithm", itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def edit(model, tmp_path, monkeypatch):
    """edit(name, (text, other), ...) -> run(output, key=value, ...): a run of a copy of algorithms/<name>.py, under
    another name, in which each `text`, found once, is replaced. Without edits the copy itself runs."""
    folder = tmp_path / "project" / "algorithms"
    folder.mkdir(parents=True)
    monkeypatch.setattr(definition, "ROOT", folder.parent)
    monkeypatch.setattr(algorithms, "__path__", [str(folder), str(ROOT / "algorithms")])

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
            keys = dict(algorithm=copy, model=model, data=data, eval_data=held_out, output=tmp_path / output,
                        batch_size=4, max_length=200, lr=1e-3, save_every=1, keep=100, eval_every=2, max_steps=6)
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


CLIP = "        engine.clip_gradients()"
OFFLINE_LOOP = "    for step in engine.steps():"
ONLINE_LOOP = "        for step in engine.steps(rollout):"


# ---- leaving a loop -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edits, last", [
    ([("        for batch in step:", "        if step.index == 4:\n            break\n        for batch in step:")], 3),
    ([("        optimizer.zero_grad()\n", "        optimizer.zero_grad()\n        if step.index == 3:\n            break\n")], 3)])
def test_a_break_keeps_every_update_and_the_model(edit, edits, last):
    whole = edit("dpo")("whole")
    left = edit("dpo", *edits)("left")
    assert updates_of(left) == list(range(1, last + 1))
    assert metrics(left) == metrics(whole)[:last]
    assert f"the algorithm ended the run after update {last} of 6" in told(left)
    assert_same_weights(final_weights(left), load_file(whole / "checkpoints" / f"step-{last:06d}" / "model.safetensors"))


LEAVE_ROLLOUT = ("            optimizer.zero_grad()\n", "            optimizer.zero_grad()\n            if step.index % 2 == 0:\n                break\n")


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
    directory = edit("grpo", (ONLINE_LOOP, "        if rollout.number == 1:\n            break\n" + ONLINE_LOOP))("left")
    assert updates_of(directory) == [1, 2, 3, 4]
    assert "ended the run after update 4 of 6" in told(directory)
    assert (directory / "final").is_dir()


# ---- a line that is missing, or in the wrong place ----------------------------------------------------------------

LINES = {    # name: (algorithm, edits, what the sentence says)
    "log": ("dpo", [("            step.log(losses, metrics)\n        engine", "        engine")], "add the line step.log(losses, metrics)"),
    "clip": ("dpo", [(CLIP, "        pass #")], "add the line engine.clip_gradients() before optimizer.step()"),
    "step": ("dpo", [("        optimizer.step()\n", "")], "add the line optimizer.step() before it, after engine.clip_gradients()"),
    "zero": ("dpo", [("        optimizer.zero_grad()\n", "")], "add the line optimizer.zero_grad() after optimizer.step()"),
    "zero early": ("dpo", [("        optimizer.zero_grad()\n", ""), (CLIP, "        optimizer.zero_grad()\n" + CLIP)],
                   "optimizer.zero_grad() came before optimizer.step() in update 1"),
    "zero between": ("dpo", [("        optimizer.zero_grad()\n", ""), ("        optimizer.step()\n", "        optimizer.zero_grad()\n        optimizer.step()\n")],
                     "add the line optimizer.step() before it"),
    "two steps": ("dpo", [("        optimizer.step()\n", "        optimizer.step()\n        optimizer.step()\n")], "optimizer.step() was called twice in update 1"),
    "split": ("dpo", [(', split="eval"', "")], "write step.log(losses, metrics, split='eval')"),
    "mean": ("dpo", [("            step.log(losses, metrics)\n        engine", "            step.log(losses.mean(), metrics)\n        engine")],
             "pass the losses per example, response or token"),
    "score": ("grpo", [("        engine.score(rollout)", "        pass #")], "add the line engine.score(rollout) before"),
    "advantages": ("grpo", [("        rollout.advantages = ", "        rollout.advantage = ")], "write rollout.advantages"),
    "read": ("grpo", [("group_advantages(rollout.rewards)", "group_advantages(rollout.reward)")], "write rollout.rewards"),
    "extra": ("grpo", [('batch.extra("advantages")', 'batch.extra("advantage")')], "the batch has no 'advantage'"),
    "online log": ("grpo", [("                step.log(losses, metrics)\n", "")], "add the line step.log(losses, metrics)"),
    "per prompt": ("grpo", [(ONLINE_LOOP, '        rollout.once("difficulty", lambda: [[0.5] for _ in rollout.examples])\n' + ONLINE_LOOP)],
                   "difficulty has the shape (1,) for a prompt with 4 completions"),
    "per rollout": ("grpo", [(ONLINE_LOOP, '        rollout.once("difficulty", list, [0.5])\n' + ONLINE_LOOP)],
                    "fix: give a list with one tensor per prompt"),
    "nothing": ("dpo", [(OFFLINE_LOOP, "    for step in ():")], "nothing was trained, so there is no model to write"),
}


@pytest.mark.parametrize("name", LINES)
def test_one_sentence_names_the_line(edit, name):
    algorithm, edits, says = LINES[name]
    run = edit(algorithm, *edits)
    sentence = refused(run, "run")
    assert says in sentence


def test_what_was_made_before_is_kept(edit, tmp_path):
    """The gradients are not cleared: the second update stops, the first one is on the disk."""
    run = edit("dpo", ("        optimizer.zero_grad()\n", ""))
    with pytest.raises(RunError, match="in update 2"):
        run("run")
    assert updates_of(tmp_path / "run") == [1]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


# ---- what is computed once, and what is kept between updates --------------------------------------------------------

PENALTY = ("        rollout.advantages =", "        rollout.rewards = [group - 0.1 * (lengths > 5) for group, lengths in zip(rollout.rewards, rollout.lengths)]\n"
           "        rollout.advantages =")
ONCE = (ONLINE_LOOP, "        lengths = rollout.once(\"own\", lambda: [0.01 * part for part in rollout.lengths])\n"
        "        rollout.advantages = [group - own for group, own in zip(rollout.advantages, lengths)]\n" + ONLINE_LOOP)
AVERAGED = [
    ("    reference = engine.reference(config.reference) if config.beta > 0 else None\n",
     "    reference = engine.reference(config.reference)\n"
     "    averaged = engine.remember(\"averaged reference\", dict(reference.named_parameters()))\n"),
    ("            optimizer.zero_grad()\n", "            optimizer.zero_grad()\n"
     "            for name, parameter in policy.named_parameters():\n"
     "                averaged[name].data.lerp_(parameter.detach(), 0.3)\n")]
CONTROLLER = [
    (OFFLINE_LOOP, "    import torch\n    state = engine.remember(\"controller\", {\"beta\": torch.tensor(config.beta)})\n" + OFFLINE_LOOP),
    ("reference_rejected_logps, config.beta, config.label", "reference_rejected_logps, float(state[\"beta\"]), config.label"),
    ("        optimizer.zero_grad()\n", "        optimizer.zero_grad()\n        state[\"beta\"] *= 1.5\n")]


@pytest.mark.parametrize("algorithm, edits, values", [
    ("grpo", [PENALTY], dict(reward=f"{REWARDS}:coarse")), ("grpo", [ONCE], {}), ("grpo", AVERAGED, dict(beta=0.5)),
    ("dpo", CONTROLLER, {})], ids=["penalty", "once", "averaged reference", "controller"])
def test_a_resumed_run_ends_as_one_without_a_stop(edit, algorithm, edits, values):
    run, plain = edit(algorithm, *edits), edit(algorithm)
    whole = run("whole", **values)
    for update in (2, 4, 5):                             # within a rollout, at its end, within the next one
        part = resumed(run, f"part-{update}", update, **values)
        assert metrics(part) == metrics(whole)
        assert_same_weights(final_weights(part), final_weights(whole))
    assert metrics(plain("plain", **values)) != metrics(whole)      # the edit does something


# ---- more than the paper --------------------------------------------------------------------------------------------

def test_a_second_log_adds_metrics_and_no_loss(edit):
    more = ("            step.log(losses, metrics)\n        engine", "            step.log(losses, metrics)\n"
            "            step.log(0 * losses, {\"pairs\": losses * 0 + 3})\n        engine")
    plain, edited = edit("dpo")("plain"), edit("dpo", more)("edited")
    rows = metrics(edited)
    assert [row.pop("pairs") for row in rows] == [3.0] * 6
    assert rows == metrics(plain)


def test_an_entropy_bonus(edit):
    """The logged entropy is the exact one: near log(vocabulary) for a random model, and its gradient moves weights."""
    bonus = [("                logps = policy(batch, config.temperature)          # (N,) under the current policy\n",
              "                logps, entropies = policy(batch, config.temperature, entropy=True)\n"),
             ("                losses = batch.mean(losses) ", "                losses = losses - 0.1 * entropies\n"
              "                metrics[\"exact_entropy\"] = entropies\n                losses = batch.mean(losses) ")]
    plain, edited = edit("grpo")("plain"), edit("grpo", *bonus)("edited")
    first = metrics(edited)[0]
    assert 0 < first["exact_entropy"] < math.log(259)
    assert first["grad_norm"] != metrics(plain)[0]["grad_norm"]
    assert all(math.isfinite(row["loss"]) for row in metrics(edited))


def test_a_copy_is_the_original(edit, tmp_path):
    """Every metric and weight of a copy under another name, online and offline."""
    for name in ("sft", "dpo", "kto", "rm", "grpo", "ppo"):
        copy = edit(name)(f"copy-{name}")
        shutil.copy(ROOT / "algorithms" / f"{name}.py", tmp_path / "project" / "algorithms")      # where names are looked up
        train_here(tmp_path / f"copy-{name}.yml", f"algorithm={name}", f"output={tmp_path / name}")
        rows = metrics(tmp_path / name)
        assert rows == metrics(copy) and not any(key in row for row in rows for key in CLOCK)
        assert_same_weights(final_weights(copy), final_weights(tmp_path / name))
