"""Two processes under torchrun (gloo, sharded by FSDP2) equal one; they resume, evaluate and sample without a deadlock."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    ONLINE,
    ROOT,
    ROWS,
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    final_weights,
    metrics,
    run_train,
    saved_gradients,
    tiny_model,
    train_here,
    trained_weights,
    watch_updates,
    write_config,
    write_jsonl,
)
from robust_helpers import free_port, join, train_on_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """config(name, algorithm, key=value, ...) -> the path of a configuration. Three rows per update and ten rows: the ranks get two and
    one, and one and none; five held-out rows. Online seven rows: in the last of
    three rollouts one rank has no prompt to sample, and one of the two updates from it no example."""
    folder = tmp_path_factory.mktemp("distributed")
    model = tiny_model(folder / "model")

    def config(name, algorithm, **values):
        rows = ROWS[algorithm]
        count = 7 if algorithm in ONLINE else 10
        data = {"data": write_jsonl(folder / f"{algorithm}.jsonl", rows(count)),
                "eval_data": write_jsonl(folder / f"{algorithm}-eval.jsonl", rows(5, 10))}
        options = dict(algorithm=algorithm, model=model, **data, output=folder / name / "run")
        options |= dict(batch_size=3, epochs=2, lr=1e-3, schedule="constant", warmup=0, weight_decay=0.1)
        options |= dict(max_length=256, eval_every=3, save_every=1, keep=9)
        if algorithm in ONLINE:
            options |= ONLINE[algorithm] | {"epochs": 1, "eval_every": 4, "sample_every": 4}
            options |= {"num_ppo_epochs" if algorithm == "ppo" else "num_iterations": 1}
        if algorithm == "ipo":      # the attention of a GPU: units of flat rows, and of a rank without rows
            options |= {"attn_implementation": "varlen"}
        return Path(write_config(folder / f"{name}.yml", **options | values))
    return config


def torchrun(count, *words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, timeout=200, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def updates():
    """Of every run in this process, see `watch_updates`."""
    with pytest.MonkeyPatch.context() as patch:
        yield watch_updates(patch)


@pytest.fixture(scope="module")
def both(config, updates):
    """Algorithm -> the directories of its run with one process and with two; all of the latter under one torchrun."""
    two = {algorithm: config(f"{algorithm}-2", algorithm) for algorithm in ROWS}
    one = {}
    # `updates` has the gradients of these runs; those of dpo are resumed, as two processes
    for algorithm in ROWS:
        one[algorithm] = config(f"{algorithm}-1", algorithm, save_every=1 if algorithm == "dpo" else 3)
    for path in one.values():
        train_here(path)
    torchrun(2, "tests/all_algorithms.py", *two.values())
    return {algorithm: [path.with_suffix("") / "run" for path in (one[algorithm], two[algorithm])] for algorithm in ROWS}


def assert_same_updates(run, start, gradients):
    """The gradients of a run are these, and its weights what AdamW makes of its own from these start weights:
    so the weights of two runs are as close as AdamW lets them be, see `saved_gradients` and what stands above
    it."""
    ours = saved_gradients(run, len(gradients))
    # in the last update of an online run no rank has an example, and nothing moves
    assert_same_gradients(ours, gradients)
    critic = run / "checkpoints" / f"step-{len(gradients):06d}" / "critic.safetensors"
    weights = trained_weights(run) | (load_file(critic) if critic.exists() else {})
    assert start.keys() <= weights.keys()
    assert_adam_made(weights, start, ours, decay=0.1)


@pytest.mark.parametrize("algorithm", ROWS)
def test_two_processes_equal_one(both, updates, algorithm):
    one, two = both[algorithm]
    for split, count in zip(("train", "eval"), (6, 3) if algorithm in ONLINE else (8, 4)):
        ours, theirs = metrics(one, split), metrics(two, split)
        assert len(ours) == count
        for x, y in zip(ours, theirs, strict=True):
            assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)
    assert_same_updates(two, *updates[one])
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    if algorithm in ONLINE:
        groups = 4 * ONLINE[algorithm].get("num_generations", 1)
        assert len(completions(one)) == groups and completions(two) == completions(one)


@pytest.mark.parametrize("algorithm", ["grpo", "distill"])
def test_a_rank_without_a_prompt_and_one_update_per_rollout(config, updates, algorithm):
    """Nothing runs between sampling and the update: FSDP would gather in advance what each rank ran last."""
    keys = {"num_mini_batches": 1, "save_every": "null"}
    one, two = (config(f"{algorithm}-once-{count}", algorithm, **keys) for count in (1, 2))
    train_here(one)
    assert [rank.code for rank in train_on_ranks(two)] == [0, 0]
    ours, theirs = (metrics(path.with_suffix("") / "run") for path in (one, two))
    assert len(ours) == 3
    for x, y in zip(ours, theirs, strict=True):
        assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)


def watch_storage(*place):
    """Print after each micro-batch how many bytes of unsharded weights and gradients are in memory, and how
    many the model has."""
    join(*place)
    from torch.distributed.fsdp import FSDPModule

    from engine.step import Step

    iterate = Step.__iter__

    def watched(step):
        for batch in iterate(step):
            yield batch
            found = whole = 0
            for module in step.engine.policy.modules():
                if not isinstance(module, FSDPModule):
                    continue
                for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                    whole += parameter.sharded_param.numel() * parameter.sharded_param.element_size()
                    weight = parameter._unsharded_param
                    found += weight.untyped_storage().nbytes()
                    for gradient in (weight.grad, parameter.unsharded_accumulated_grad):
                        found += 0 if gradient is None else gradient.untyped_storage().nbytes()
            print(f"unsharded {found} of {whole} bytes", flush=True)

    Step.__iter__ = watched


def test_between_micro_batches_nothing_is_unsharded(config):
    """Neither weights nor gradients: every micro-batch reduces its gradients over the ranks."""
    path = config("storage", "dpo", micro_batch_tokens=2, save_every="null", max_steps=2)
    for done in train_on_ranks(path, patch=watch_storage):
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if line.startswith("unsharded")]
        assert len(lines) >= 4 and {line.split(" of ")[0] for line in lines} == {"unsharded 0"}


def watch_bytes(*place):
    """Print what a rank keeps after its first update, and the most that is whole on it in a backward."""
    join(*place)
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor import DTensor

    from engine.optimizer import Optimizer

    groups, most = set(), [0]
    gather, reduce, step = FSDPParamGroup.unshard, FSDPParamGroup.post_backward, Optimizer.step

    def bytes_of(tensors):
        storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def gathered(group, *arguments, **options):
        groups.add(group)
        return gather(group, *arguments, **options)

    def reduced(group, *arguments, **options):
        results = [known._all_gather_result for known in groups]
        # of the layer that comes next
        whole = [result.all_gather_output for result in results if result is not None]
        for parameter in itertools.chain(*[known.fsdp_params for known in groups]):
            weight = getattr(parameter, "_unsharded_param", None)
            if weight is not None:
                whole += [weight, weight.grad, parameter.unsharded_accumulated_grad]
        most[0] = max(most[0], bytes_of(whole))
        return reduce(group, *arguments, **options)

    def stepped(optimizer):
        step(optimizer)
        kept = []
        for weight in itertools.chain(*[group["params"] for group in optimizer.param_groups]):
            kept += [weight, weight.grad, *optimizer.state[weight].values()]
        kept = [tensor.to_local() for tensor in kept if isinstance(tensor, DTensor)]
        print(f"bytes {bytes_of(kept)} {most[0]}", flush=True)

    FSDPParamGroup.unshard, FSDPParamGroup.post_backward, Optimizer.step = gathered, reduced, stepped


def test_the_forecast_is_what_a_rank_holds(config):
    """To 10 %, on each of two ranks: what is kept, and what is whole for a moment."""
    from engine.config import Common
    from engine.forecast import count_parameters, gathered_bytes, kept_bytes
    from model.load import empty_lm, load_config
    path = config("bytes", "dpo", max_steps=1, save_every="null")
    model = next(line.split(": ")[1] for line in path.read_text().splitlines() if line.startswith("model:"))
    lm = empty_lm(load_config(model), model)
    counts = count_parameters(Common(algorithm="dpo", model=model, data=""), lm)
    expected = [sum(kept_bytes(counts, 2, 4).values()), gathered_bytes(counts)]
    for done in train_on_ranks(path, patch=watch_bytes):
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if line.startswith("bytes")]
        *_, line = lines      # before it a trial was saved
        assert [int(word) for word in line.split()[1:]] == pytest.approx(expected, rel=0.1)


def watch_copies(*place):
    """Print how many bytes of bf16 copies of weights a forward keeps for its backward, and how many bytes
    these weights would take."""
    join(*place)
    from model.policy import Policy

    hidden = Policy.hidden

    def watched(policy, batch, **inputs):
        kept = {}
        parts = policy.trunk.layers.modules()
        linears = [part for part in parts if type(part) is torch.nn.Linear]
        shapes = {tuple(part.weight.shape) for part in linears}

        def pack(tensor):
            if tensor.dtype == torch.bfloat16 and {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = hidden(policy, batch, **inputs)
        if torch.is_grad_enabled():
            whole = sum(2 * part.weight.numel() for part in linears)
            print(f"copies {sum(kept.values())} of {whole} bytes", flush=True)
        return states

    Policy.hidden = watched


def test_a_sharded_forward_keeps_no_copies_of_weights(config):
    """In bf16: the losses are those of one process, whose forward keeps a copy of every weight."""
    keys = {"precision": "bf16", "save_every": "null"}
    one, two = config("bf16-1", "dpo", **keys), config("bf16-2", "dpo", **keys)
    train_here(one)
    for done in train_on_ranks(two, patch=watch_copies):
        assert done.code == 0, done.err
        lines = [line for line in done.out.splitlines() if line.startswith("copies")]
        assert len(lines) >= 8 and {line.split(" of ")[0] for line in lines} == {"copies 0"}
    ours, theirs = (metrics(path.with_suffix("") / "run") for path in (two, one))
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for x, y in zip(ours, theirs, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=2e-3)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-2)


def completions(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_moments_of_a_head_over_an_adapter_are_saved(config):
    """A forward without a backward gathers the root, in which the head lies: the optimizer knows its
    shards."""
    pytest.importorskip("peft")
    path = config("rm-lora", "rm", lora_r=4, max_steps=2, save_every=2)
    assert [rank.code for rank in train_on_ranks(path)] == [0, 0]
    last = path.with_suffix("") / "run" / "checkpoints" / "step-000002"
    moments = load_file(last / "optimizer.safetensors")
    assert {f"value_head.weight:{kind}" for kind in ("step", "exp_avg", "exp_avg_sq")} <= moments.keys()
    assert moments["value_head.weight:exp_avg"].any()


def test_two_processes_sample_with_an_adapter_as_one(config):
    pytest.importorskip("peft")
    one, two = (config(f"grpo-lora-{count}", "grpo", lora_r=4, lr=1e-2) for count in (1, 2))
    train_here(one)
    assert [rank.code for rank in train_on_ranks(two)] == [0, 0]
    one, two = (path.with_suffix("") / "run" for path in (one, two))
    assert completions(two) == completions(one)
    for x, y in zip(metrics(one), metrics(two), strict=True):
        assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)


@pytest.fixture(scope="module")
def whole(config):
    """A run of dpo under torchrun as a user starts it, with samples."""
    path = config("whole", "dpo", sample_every=4)
    done = run_train([path], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("metrics  ") == 1      # one rank speaks
    return path.with_suffix("") / "run"


def test_torchrun(whole, both):
    assert metrics(whole) == metrics(both["dpo"][1])
    assert_same_weights(final_weights(whole), final_weights(both["dpo"][1]))
    steps = [json.loads(line)["step"] for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert steps == [4] * 4 + [8] * 4


RESUMED = [("dpo", 1, 2), ("dpo", 2, 2), ("dpo", 2, 1), ("dpo", 2, 3), ("grpo", 2, 2), ("grpo", 2, 1)]


@pytest.fixture(scope="module")
def resumed(config, both):
    """(algorithm, ranks before, ranks after) -> the directory of a run that went on from its checkpoint at
    step 3: of dpo in the first epoch, of grpo between two updates from one rollout."""
    runs, paths = {}, {1: [], 2: [], 3: []}
    for algorithm, before, after in RESUMED:
        whole = both[algorithm][before - 1]
        path = config(f"resumed-{algorithm}-{before}-{after}", algorithm)
        part = path.with_suffix("") / "run"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "final")
        for later in sorted((part / "checkpoints").iterdir())[3:]:
            shutil.rmtree(later)
        settings = (part / "config.yaml").read_text()
        (part / "config.yaml").write_text(settings.replace(str(whole), str(part)))
        runs[algorithm, before, after] = part
        paths[after].append(path)
    for path in paths[1]:
        train_here(path)
    torchrun(2, "tests/all_algorithms.py", *paths[2])
    for path in paths[3]:
        assert [rank.code for rank in train_on_ranks(path, count=3)] == [0, 0, 0]
    return runs


def steady(gradients, least=1e-3):
    """-> name -> which weights had gradients that stand clear of rounding: in every update the root mean
    square of theirs so far is 0 or at least this, where the norm of all is about 1."""
    squares, clear = {}, {}
    for update, named in enumerate(gradients, 1):
        for name, gradient in named.items():
            squares[name] = squares.get(name, 0.0) + gradient.double() ** 2
            root = (squares[name] / update).sqrt()
            clear[name] = clear.get(name, True) & ((root == 0) | (root >= least))
    return clear


@pytest.mark.parametrize("algorithm, before, after", RESUMED)
def test_a_run_resumes_on_any_number_of_processes(algorithm, before, after, resumed, both, updates):
    """Gradients, weights and moments are those of one process without interruption; from two to two also
    those of two, to the bit."""
    run, (one, two) = resumed[algorithm, before, after], both[algorithm]
    assert json.loads((run / "run.json").read_text())["resumed_from_step"] == 3
    assert json.loads((run / "run.json").read_text())["world_size"] == after
    assert_same_updates(run, *updates[one])
    # moments are means of gradients, and of their squares: they differ by the rounding of gradients of a norm
    # of 1, some 1e-7
    assert_same_weights(moments(run), moments(one), 1e-6)
    # an error of 1e-7 in a gradient moves a weight by lr = 1e-3 times 1e-7 over the root mean square of its
    # gradients: in eight updates by less than 1e-6 where that root is 1e-3. Smaller ones have no bound but
    # that of `assert_same_updates`.
    weights, expected, clear = final_weights(run), final_weights(one), steady(updates[one][1])
    bounded = sum(int(mask.sum()) for mask in clear.values())
    assert bounded > 0.5 * sum(mask.numel() for mask in clear.values())
    compared = {name: torch.where(mask, weights[name], expected[name]) for name, mask in clear.items()}
    assert_same_weights(compared, expected, 1e-6)
    for ours, theirs in zip(metrics(run), metrics(one), strict=True):
        assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
    if before == after == 2:
        assert metrics(run) == metrics(two)
        assert_same_weights(weights, final_weights(two))
        assert_same_weights(moments(run), moments(two))


def moments(run):
    return load_file(run / "checkpoints" / "step-000006" / "optimizer.safetensors")


def test_an_error_ends_all_processes(whole):
    """One line of all ranks, which torchrun's table shows for each of them, and no rank left waiting."""
    done = run_train([whole.parent.with_suffix(".yml"), "lr=5e-3"], processes=2)
    lines = [line for line in done.stderr.splitlines() if "error: output: " in line and "(lr differ)" in line]
    assert done.returncode == 1 and lines[0].startswith("error: output: ")
    assert len(lines) == 3 and all(line.startswith("  traceback : error: output: ") for line in lines[1:])
    assert done.stderr.count("Traceback") == 1                                # torchrun's own


# ---- two machines

def two_machines(config, *folders):
    """One agent of torchrun per folder in which it runs, as on two machines. -> their CompletedProcess"""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def agent(number):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(number), "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
        command += ["--rdzv-endpoint", f"127.0.0.1:{port}", str(ROOT / "train.py"), str(config)]
        return subprocess.run(command, cwd=folders[number], timeout=200, capture_output=True, text=True,
                              env=environment)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(agent, range(2)))


def test_two_machines_are_one_run(config, tmp_path):
    """Two agents: the metrics and completions of one process; each scores the completions of its prompts."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("import os\n\ndef reward(prompts, completions, **columns):\n"
                       "    rank = os.environ.get('RANK', 'alone')\n"
                       f"    with open(r'{tmp_path}/scored-' + rank, 'a') as file:\n"
                       "        file.write(f'{len(prompts)} {len(set(map(str, prompts)))}\\n')\n"
                       "    return [len(set(text)) / 10 for text in completions]\n")
    keys = {"reward": f"{rewards}:reward", "eval_data": "null"}
    one = config("one_machine", "grpo", **keys)
    two = config("two_machines", "grpo", **keys)
    train_here(one)
    done = two_machines(two, ROOT, ROOT)
    assert [result.returncode for result in done] == [0, 0], done[0].stderr + done[1].stderr
    ours, theirs = metrics(two.with_suffix("") / "run"), metrics(one.with_suffix("") / "run")
    assert len(ours) == len(theirs) == 6
    for row, other in zip(ours, theirs):
        assert row.pop("split") == other.pop("split") and row == pytest.approx(other, rel=2e-5, abs=2e-5)
    assert completions(two.with_suffix("") / "run") == completions(one.with_suffix("") / "run")
    counts = {}
    for name in ("alone", "0", "1"):
        lines = (tmp_path / f"scored-{name}").read_text().splitlines()
        counts[name] = [tuple(map(int, line.split())) for line in lines]
    for whole, *parts in zip(counts["alone"], counts["0"], counts["1"]):
        assert tuple(map(sum, zip(*parts))) == whole and 0 < parts[0][1] <= parts[1][1] <= parts[0][1] + 1


def test_machines_without_a_common_disk(config, tmp_path):
    """One line, from both, before anything is read: each rank has a working directory of its own."""
    path = shutil.copy(config("no_common_disk", "sft", output="run"), tmp_path)
    done = train_on_ranks(Path(path))
    assert [rank.code for rank in done] == [2, 2]
    line, = {rank.err for rank in done}
    assert line.startswith("error: output: run is not the same directory for rank 1 on ")
    assert line.endswith("fix: choose an output on a disk that all machines share\n")
    assert line.count("\n") == 1
    assert not list(tmp_path.rglob(".token-*"))


def test_copies_of_the_sharded_model_equal_one_process(config, both):
    """Two copies, each on two ranks: the gradients are those of one process, summed over all four."""
    path = config("copies", "dpo", replicate=2)
    assert [rank.code for rank in train_on_ranks(path, count=4)] == [0] * 4
    one, ours = both["dpo"][0], path.with_suffix("") / "run"
    for x, y in zip(metrics(one), metrics(ours), strict=True):
        assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)
    assert_same_gradients(saved_gradients(ours, 8), saved_gradients(one, 8), least=4e-8)
    refused = train_on_ranks(path, "replicate=3", f"output={path.with_suffix('') / 'other'}")
    assert [rank.code for rank in refused] == [2, 2]
    assert {rank.err.splitlines()[-1] for rank in refused} == {
        "error: replicate is 3, which does not divide the number of processes, 2; "
        "fix: replicate=1, or the number of machines"}
