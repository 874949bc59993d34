"""What saving needs is tried before the first update; what is saved is whole, finite, and loads elsewhere."""
import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil

import pytest
import robust_helpers as child
import torch
from family_models import save_model
from helpers import (
    assert_same_weights,
    byte_tokenizer,
    config_of,
    final_weights,
    metrics,
    pair_rows,
    random_lm,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    PreTrainedModel,
)

from data.errors import RunError, UserError
from data.tokenise import stop_ids
from engine import checkpoint, restore, saver, sealed, shares
from engine.card import LOAD
from engine.logs import Run
from engine.loop import Engine
from engine.saver import Saver
from model import load
from model.build import build_policy
from model.classifier import save_classifier
from model.completions import Stops
from model.reward_model import build_reward_model
from model.state import precision, save_pretrained

MERGED = {"lora_r": 2, "merge": "true"}
VICUNA = {"temperature": 0.9, "top_p": 0.6}           # as published: sampling settings without do_sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def with_settings(directory, **settings):
    """A tiny model with these generation settings, written past transformers' own check."""
    path = tiny_model(directory)
    file = f"{path}/generation_config.json"
    with open(file) as content:
        given = json.load(content)
    with open(file, "w") as content:
        json.dump(given | settings, content)
    return path


def train(folder, model, algorithm="sft", **values):
    """A run of two updates in this process; its directory."""
    rows = pair_rows(8) if algorithm in ("rm", "dpo") else sft_rows(8)
    data = write_jsonl(folder / "data.jsonl", rows)
    values = dict(batch_size=4, lr=1e-3, max_length=256, save_every="null") | values
    values = dict(data=data) | values | dict(algorithm=algorithm, model=model, output=folder / "run")
    train_here(write_config(folder / "config.yml", **values))
    return folder / "run"


# ---- stop tokens

@pytest.mark.parametrize("own, stops", [
    ([258, 257, 256], [256, 257, 258]), (257, [257, 258]), (258, [258]), (None, [258]),
    ([65, 300, -1], [258])])                              # text, and no tokens at all
def test_the_start_model_stops_at_more_tokens(own, stops, tmp_path):
    """Such as GLM, whose template has no end of turn: at these a run's completions end, and its model, and
    what a further run makes of it."""
    path = with_settings(tmp_path / "model", eos_token_id=own)
    assert Stops(load.load_tokenizer(path), []).ids == set(stops)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        run = train(folder, path, max_steps=1)
        settings = json.loads((run / "final" / "generation_config.json").read_text())
        assert settings["eos_token_id"] == stops
        path = run / "final"


def test_an_adapter_keeps_its_stop_tokens(tmp_path):
    """They may be others than its base model's; peft's own way to load it would read those."""
    pytest.importorskip("peft")
    base = with_settings(tmp_path / "base", eos_token_id=256)
    final = train(tmp_path, base, lora_r=2, max_steps=1) / "final"
    names = {"PATH": str(final)}
    exec(LOAD["peft"], names)
    assert names["model"].generation_config.eos_token_id == [256, 258]
    head = names["model"].get_output_embeddings()

    def always_258(module, inputs, logits):
        tokens = torch.full(logits.shape[:2], 258)
        return torch.eye(259)[tokens]

    head.register_forward_hook(always_258)
    written = names["model"].generate(input_ids=torch.tensor([[65]]), max_new_tokens=5, do_sample=False)
    assert written.tolist() == [[65, 258]]
    assert stop_ids(load.load_tokenizer(str(final))) == [256, 258]
    os.remove(final / "generation_config.json")           # an adapter that another program made
    assert stop_ids(load.load_tokenizer(str(final))) == [256, 258]
    byte_tokenizer(chat_template=False).save_pretrained(final)
    with_settings(tmp_path / "base", eos_token_id=257)
    assert stop_ids(load.load_tokenizer(str(final))) == [257, 258]


# ---- generation settings that transformers would not write

@pytest.mark.parametrize("settings, changed, kept", [
    (VICUNA, "with do_sample: true", VICUNA | {"do_sample": True}),
    ({"do_sample": None, "top_k": 7}, "with do_sample: true", {"do_sample": True, "top_k": 7}),
    ({"do_sample": False, "top_p": 0.5}, "without top_p: 0.5", {"do_sample": False, "top_p": None}),
    ({"length_penalty": 2.0, "min_p": 0.1}, "with do_sample: true, without length_penalty: 2.0",
     {"min_p": 0.1, "do_sample": True}),
    ({"max_new_tokens": 0}, "without max_new_tokens: 0", {"max_new_tokens": None, "do_sample": None}),
    ({"early_stopping": "perhaps", "num_beams": 2}, 'without early_stopping: "perhaps"', {"num_beams": 2}),
    ({"watermarking_config": [1]}, "without watermarking_config: [1]", {"watermarking_config": None}),
    ({"do_sample": True, "temperature": 0.7}, "", {"do_sample": True, "temperature": 0.7}),
    ({}, "", {"do_sample": None})])
def test_generation_settings_are_repaired_at_load(settings, changed, kept, tmp_path):
    path = with_settings(tmp_path / "model", **settings)
    _, said = load.generation_settings(path)
    assert said.endswith(changed) and bool(said) == bool(changed)
    lm = load.load_lm(path)
    assert {key: getattr(lm.generation_config, key) for key in kept} == kept
    assert lm.generation_config.pad_token_id == 256
    lm.generation_config.eos_token_id = [256, 258]      # transformers checks what has changed
    lm.save_pretrained(tmp_path / "saved")
    again = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert {key: getattr(again, key) for key in kept} == kept


def test_settings_of_an_old_model_stand_in_its_configuration(tmp_path):
    path = tiny_model(tmp_path / "model")
    os.remove(f"{path}/generation_config.json")
    with open(f"{path}/config.json") as content:
        config = json.load(content)
    with open(f"{path}/config.json", "w") as content:
        json.dump(config | VICUNA, content)
    lm = load.load_lm(path)
    assert lm.generation_config.do_sample and lm.generation_config.temperature == 0.9
    lm.save_pretrained(tmp_path / "saved")


def test_settings_that_are_no_settings(tmp_path):
    path = tiny_model(tmp_path / "model")
    for text in ("[1, 2]", "{", "3"):
        (tmp_path / "model" / "generation_config.json").write_text(text)
        says = r"generation_config\.json (cannot be read|holds a) .*; fix: check the file"
        with pytest.raises(UserError, match=says):
            load.load_lm(path)


@pytest.mark.parametrize("algorithm, values", [("sft", {}), ("rm", {}), ("sft", MERGED)])
def test_a_run_saves_what_was_repaired(algorithm, values, tmp_path, capsys):
    if values:
        pytest.importorskip("peft")
    path = with_settings(tmp_path / "model", **VICUNA)
    run = train(tmp_path, path, algorithm, max_steps=1, **values)
    said = "contradicts itself and could not be saved; it is read with do_sample: true"
    assert capsys.readouterr().err.count(said) == 1
    saved = GenerationConfig.from_pretrained(run / "final")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (True, 0.9, 0.6, [258])
    assert (run / "classifier").is_dir() == (algorithm == "rm")


# ---- sealing

def named_templates(directory):
    path = tiny_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(path)
    default = tokenizer.chat_template
    tokenizer.chat_template = {"default": default, "rag": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(path)
    return path


def test_files_in_subdirectories_are_sealed(tmp_path):
    run = train(tmp_path, named_templates(tmp_path / "model"), save_every=1)
    assert AutoTokenizer.from_pretrained(run / "final").chat_template["rag"] == "{{ messages }}"
    nested = "additional_chat_templates/rag.jinja"
    for folder in (run / "final", run / "checkpoints" / "step-000001"):
        assert sealed.broken(folder) is None
        assert nested in json.loads((folder / "manifest.json").read_text())
        assert (folder / nested).stat().st_mode & 0o777 == 0o644
        assert (folder / nested).parent.stat().st_mode & 0o777 == 0o755
    (folder / nested).write_text("{{ messagez }}")
    assert nested in sealed.broken(folder) and "damaged" in sealed.broken(folder)
    shutil.rmtree((folder / nested).parent)
    assert nested in sealed.broken(folder) and "missing" in sealed.broken(folder)


def test_every_file_is_synced_before_the_manifest_and_every_directory_after(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(sealed, "sync", lambda path: order.append(str(path).partition(".tmp-")[2][9:]))

    def write(temporary):
        os.makedirs(f"{temporary}/a/b", mode=0o700)
        for name in ("one", "a/two", "a/b/three"):
            with open(f"{temporary}/{name}", "w") as file:
                file.write(name)
    sealed.write_sealed(tmp_path / "sealed", write)
    assert set(order[:3]) == {"one", "a/two", "a/b/three"} and order[3] == "manifest.json"
    assert set(order[4:7]) == {"", "a", "a/b"}
    assert (tmp_path / "sealed" / "a" / "b").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error, fix", [
    (OSError(errno.ENOSPC, "No space left on device"), "free disk space"),
    (OSError(errno.EDQUOT, "Quota exceeded"), "free disk space"),
    (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "free disk space"),
    (PermissionError(errno.EACCES, "Permission denied"), "make its directory writable"),
    (OSError(errno.EROFS, "Read-only file system"), "make its directory writable"),
    (RuntimeError("I/O error: Permission denied (os error 13)"), "make its directory writable"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"),
     "check that nothing else moves or removes"),
    (ValueError("GenerationConfig is invalid"), "correct the files of the start model"),
    (TypeError("not JSON serializable"), "correct the files of the start model"),
    (KeyError("model_type"), "correct the files of the start model"),
    (MemoryError(), "free memory")])
def test_whatever_a_save_raises_is_one_line_with_its_own_fix(error, fix, tmp_path):
    def write(temporary):
        with open(f"{temporary}/half", "w") as file:
            file.write("half")
        raise error
    (tmp_path / "step").mkdir()
    with pytest.raises(RunError) as raised:
        sealed.write_sealed(tmp_path / "step", write)
    text = str(raised.value)
    assert "\n" not in text and f"; fix: {fix}" in text and f"cannot write {tmp_path / 'step'} (" in text
    assert os.listdir(tmp_path) == ["step"]


def test_what_stood_there_comes_back_if_its_replacement_cannot(tmp_path, monkeypatch):
    def write(temporary):
        with open(f"{temporary}/file", "w") as file:
            file.write("text")
    sealed.write_sealed(tmp_path / "step", write)
    rename = os.rename

    def refuse(source, target):
        if str(target) == str(tmp_path / "step") and not str(source).endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(RunError):
        sealed.write_sealed(tmp_path / "step", write)
    assert os.listdir(tmp_path) == ["step"] and sealed.broken(tmp_path / "step") is None


# ---- the trial

def refuse_in(owner, name, error):
    """`owner.name` raises."""
    def refused(*arguments, **options):
        raise error
    setattr(owner, name, refused)


def unsavable_tokenizer():
    from transformers import PreTrainedTokenizerBase
    refuse_in(PreTrainedTokenizerBase, "save_pretrained", TypeError("a dtype is not JSON serializable"))


def test_what_cannot_be_saved_stops_before_the_first_update(model, tmp_path):
    child.project(tmp_path, "sft", model)
    result = child.train(tmp_path, patch=unsavable_tokenizer)
    assert result.code == 1 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    refused = "TypeError: a dtype is not JSON serializable"
    assert last.startswith(f"error: cannot write run/checkpoint ({refused}); ")
    assert "before the first update" in last and "; fix: " in last
    assert metrics(tmp_path / "run") == metrics(tmp_path / "run", "eval") == []
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


@pytest.mark.parametrize("algorithm, values, forms", [
    ("sft", {}, ["checkpoint"]), ("rm", {}, ["checkpoint", "classifier"]), ("ppo", {}, ["checkpoint"]),
    ("rm", MERGED, ["checkpoint", "classifier", "final"]), ("dpo", dict(lora_r=2), ["checkpoint"])])
def test_a_trial_writes_every_file_but_no_weight(algorithm, values, forms, model, tmp_path, monkeypatch):
    """Its files are those of the real save, and the weights in them are none."""
    if values:
        pytest.importorskip("peft")
    names, weights = {}, []
    seal = sealed.seal

    def looked_at(directory, durable=True):
        form = os.path.basename(directory).partition(".tmp-")[0]
        if not durable:
            names[form] = set(sealed.files_below(directory))
            files = [name for name in names[form] if name.endswith(".safetensors")]
            weights.extend(tensor for name in files if name != "value_head.safetensors"
                           for tensor in load_file(f"{directory}/{name}"))
        seal(directory, durable)
    monkeypatch.setattr(sealed, "seal", looked_at)
    folder = child.project(tmp_path, algorithm, model, output=tmp_path / "run", **values)
    train_here(folder / "config.yml", "max_steps=1")
    run = tmp_path / "run"
    assert sorted(names) == forms and weights == []
    for form in forms:
        real = run / {"checkpoint": "checkpoints/step-000001"}.get(form, form)
        found = set(sealed.files_below(real))
        weights_only = {"manifest.json", "model.safetensors", "optimizer.safetensors", "rollout.safetensors"}
        assert found - names[form] <= weights_only
        assert names[form] <= found
    assert not list(run.glob("*.tmp-*"))


def model_that_reads_images(directory, **files):
    """A tiny Gemma 3 and, as files {name: content}, its processor; their names have no ending here."""
    save_model("gemma3_full", directory)
    byte_tokenizer().save_pretrained(directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content)
    return directory


PROCESSOR = {
    "processor_config": '{"a": 1}', "preprocessor_config": "{}", "video_preprocessor_config": '{"b": 2}'}


def processor_in(directory):
    found = {}
    for path in directory.iterdir():
        if path.stem in (*PROCESSOR, "chat_template") and path.suffix == ".json":
            found[path.stem] = path.read_text()
    return found


def test_the_processor_of_a_model_that_reads_images_is_kept(tmp_path):
    """Also in a run that goes on from a checkpoint. An old template, which would win over the tokenizer's, is
    left out."""
    path = model_that_reads_images(tmp_path / "model", **PROCESSOR, chat_template='{"chat_template": "old"}')
    run = train(tmp_path, path, save_every=1, max_steps=1)
    for name in PROCESSOR:
        os.remove(path / f"{name}.json")
    train(tmp_path, path, save_every=1, max_steps=2)
    for saved in ("checkpoints/step-000001", "checkpoints/step-000002", "final"):
        assert processor_in(run / saved) == PROCESSOR and sealed.broken(run / saved) is None
    assert "no processor files" not in (run / "events.log").read_text()


def test_the_processor_of_a_merged_model(tmp_path):
    """An adapter needs none, the model that it is merged into does. A template that only the processor has is
    kept, too."""
    pytest.importorskip("peft")
    files = PROCESSOR | {"chat_template": '{"chat_template": "old"}'}
    path = model_that_reads_images(tmp_path / "model", **files)
    os.remove(path / "chat_template.jinja")
    for merge in ("false", "true"):
        (tmp_path / merge).mkdir()
        data = write_jsonl(tmp_path / merge / "plain.jsonl", [{"prompt": "a", "response": "b"}] * 4)
        run = train(tmp_path / merge, path, data=data, lora_r=2, merge=merge, max_steps=1)
        assert processor_in(run / "final") == (files if merge == "true" else {})


def test_a_processor_that_is_not_there_is_told(tmp_path):
    path = model_that_reads_images(tmp_path / "model")
    run = train(tmp_path, path, max_steps=1)
    said = (run / "events.log").read_text()
    assert f"{path} has no processor files beside it" in said and processor_in(run / "final") == {}


def test_a_classifier_of_an_architecture_without_sdpa(tmp_path):
    random_lm(config_of(BloomConfig, n_layer=2, n_head=4)).save_pretrained(tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}
    state["value_head.weight"] = torch.ones(1, 32)
    save_classifier(lm, byte_tokenizer(), state, tmp_path / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(classifier.score.weight, torch.ones(1, 32))


def test_an_adapter_that_cannot_be_merged_at_the_end_is_kept(model, tmp_path):
    pytest.importorskip("peft")
    base = shutil.copytree(model, tmp_path / "base")

    save = Saver.save_final

    def after_the_base_has_gone(engine):
        os.rename(base, tmp_path / "elsewhere")
        save(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save_final", after_the_base_has_gone)
        with pytest.raises(UserError):
            train(tmp_path, base, lora_r=2, merge="true", epochs=1)
    run = tmp_path / "run"
    assert not (run / "final").exists() and sealed.broken(run / "checkpoints" / "step-000002") is None
    assert load_file(run / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    os.rename(tmp_path / "elsewhere", base)
    train_here(tmp_path / "config.yml")
    assert final_weights(run) and sealed.broken(run / "final") is None


def test_a_killed_trial_is_tidied(model, tmp_path):
    child.project(tmp_path, "sft", model)
    third = ("chmod", 16)      # of the trial: the tokens have 13 files
    assert child.train(tmp_path, patch=child.kill_at_call, arguments=third).code < 0
    assert list((tmp_path / "run").glob("checkpoint.tmp-*"))
    assert child.train(tmp_path).code == 0
    assert not list((tmp_path / "run").rglob("*tmp*"))


def test_a_disk_that_is_too_small_is_said_once(model, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    parameters = AutoModelForCausalLM.from_pretrained(model).num_parameters()
    needed = 3 * 12 * parameters + 4 * parameters            # two kept, one that comes, and final/
    for free, said in ((needed - 1, 1), (needed, 0)):
        monkeypatch.setattr(saver.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        folder = tmp_path / str(free)
        folder.mkdir()
        assert (train(folder, model, save_every=1, epochs=2) / "final").is_dir()
        assert capsys.readouterr().err.count("warning: the disk of ") == said


# ---- what is saved

def test_checkpoints_stop_where_the_template_stops(tmp_path):
    """A base model's own eos ends texts, the template's token ends turns: a server needs both."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    random_lm(config_of(eos_token_id=256)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = train(tmp_path, tmp_path / "model", save_every=1)
    for saved in (run / "checkpoints" / "step-000001", run / "final"):
        assert GenerationConfig.from_pretrained(saved).eos_token_id == [256, 258]


@pytest.mark.parametrize("tied", [False, True])
def test_save_dtype(tied, tmp_path):
    """final/ in bf16 is the fp32 model rounded once, half as large; checkpoints stay fp32."""
    path = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    runs = {}
    for dtype in ("fp32", "bf16"):
        (tmp_path / dtype).mkdir()
        runs[dtype] = train(tmp_path / dtype, path, save_every=1, save_dtype=dtype)
    whole, half = (final_weights(runs[dtype]) for dtype in ("fp32", "bf16"))
    assert whole.keys() == half.keys() and ("lm_head.weight" in whole) == (not tied)
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32 and torch.equal(half[name], tensor.bfloat16())
    assert json.loads((runs["bf16"] / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    lm = AutoModelForCausalLM.from_pretrained(runs["bf16"] / "final")
    assert lm.dtype == torch.bfloat16 and torch.equal(lm.lm_head.weight, lm.state_dict()["lm_head.weight"])
    saved = checkpoint.checkpoints(runs["bf16"])[-1]
    assert json.loads(open(f"{saved}/config.json").read())["dtype"] == "float32"
    assert_same_weights(load_file(f"{saved}/model.safetensors"), whole)


@pytest.mark.parametrize("family, exact", [
    ("deepseek_v3", r"\.e_score_correction_bias$"),
    ("ernie4_5_moe", r"\.gate\.weight$|\.e_score_correction_bias$")])
def test_save_dtype_leaves_what_transformers_keeps_in_fp32(family, exact, tmp_path):
    """Rounded, such a bias would send tokens to other experts."""
    save_model(family, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run = train(tmp_path, tmp_path / "model", save_every=1, save_dtype="bf16")
    whole = load_file(run / "checkpoints" / "step-000002" / "model.safetensors")
    half = final_weights(run)
    kept = {name for name in whole if re.search(exact, name)}
    assert kept and whole.keys() == half.keys()
    for name, tensor in whole.items():
        assert torch.equal(half[name], tensor if name in kept else tensor.bfloat16())
    assert {half[name].dtype for name in kept} == {torch.float32}
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_precision_of_weights_is_that_of_the_largest():
    assert precision({"bias": torch.ones(3), "weight": torch.ones(5).bfloat16()}) == torch.bfloat16


def test_save_dtype_of_a_reward_model_and_of_adapters(model, tmp_path):
    pytest.importorskip("peft")
    for name in ("rm", "merged", "adapter"):
        (tmp_path / name).mkdir()
    run = train(tmp_path / "rm", model, "rm", save_dtype="bf16")
    classifier = AutoModelForSequenceClassification.from_pretrained(run / "classifier")
    head = load_file(run / "final" / "value_head.safetensors")["v_head.summary.weight"]
    assert classifier.dtype == classifier.score.weight.dtype == torch.bfloat16 and head.dtype == torch.float32
    assert torch.equal(classifier.score.weight, head.bfloat16())
    merged = train(tmp_path / "merged", model, lora_r=2, merge="true", save_dtype="bf16")
    assert {tensor.dtype for tensor in final_weights(merged).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(merged / "final").dtype == torch.bfloat16
    adapter = train(tmp_path / "adapter", model, lora_r=2, save_dtype="bf16")
    saved = load_file(adapter / "final" / "adapter_model.safetensors")
    assert saved and {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_save_dtype_may_change_when_a_run_goes_on(model, tmp_path):
    child.project(tmp_path, "sft", model)
    assert child.train(tmp_path, patch=child.kill_after_save, arguments=(4,)).code < 0
    assert child.train(tmp_path, "save_dtype=bf16").code == 0
    assert {tensor.dtype for tensor in final_weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_the_value_head_has_the_bias_that_others_read(model, tmp_path, capsys):
    """LLaMA-Factory and ms-swift ask for both names; a file without the second, or with a bias, is read."""
    final = train(tmp_path, model, "rm") / "final"
    tensors = load_file(final / "value_head.safetensors")
    assert set(tensors) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(tensors["v_head.summary.bias"], torch.zeros(1))
    linear = torch.nn.Linear(32, 1)
    linear.load_state_dict({name.removeprefix("v_head.summary."): tensor for name, tensor in tensors.items()})
    policy = build_policy(str(final), byte_tokenizer())
    for bias, said in ({}, 0), ({"v_head.summary.bias": torch.full((1,), 0.25)}, 1):
        notices = []
        save_file({"v_head.summary.weight": linear.weight.data} | bias, final / "value_head.safetensors")
        head = build_reward_model(policy, str(final), 0, notices.append).value_head
        assert torch.equal(head.weight, tensors["v_head.summary.weight"])
        assert len(notices) == said and ("0.25" in "".join(notices)) == bool(said)
    save_file({"weight": tensors["v_head.summary.weight"]}, final / "value_head.safetensors")
    with pytest.raises(UserError, match="holds weight, not v_head.summary.weight"):
        build_reward_model(policy, str(final), 0, notices.append)


# ---- what an algorithm keeps between updates

ROWS = torch.arange(15.0).view(5, 3)


def save_remembered(model, folder, remembered):
    policy = build_policy(str(model), byte_tokenizer())
    optimizer = torch.optim.AdamW(policy.parameters())
    write = checkpoint.writer_of(folder, policy, byte_tokenizer(), optimizer, {"step": 1}, {}, remembered)
    write()


def one_of_two_ranks(rank, model, folder, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    remembered = {"ema": distribute_tensor(ROWS, mesh, [Shard(0)]), "count": torch.tensor(7)}
    save_remembered(model, folder, remembered)
    live = {"ema": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]), "count": torch.tensor(0)}
    before = live["ema"].to_local()
    restore.recall(folder, live)
    assert torch.equal(before, ROWS[:3] if rank == 0 else ROWS[3:])              # this rank's part, in place
    assert live["count"] == 7
    torch.distributed.barrier()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_remembered_tensors_come_back_sharded_as_they_are(model, tmp_path):
    folder = str(tmp_path / "step-000001")
    port, processes = child.free_port(), []
    for rank in range(2):
        arguments = (rank, model, folder, port)
        processes.append(multiprocessing.get_context("fork").Process(target=one_of_two_ranks, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    saved = load_file(f"{folder}/remembered.safetensors")
    assert_same_weights(saved, {"ema": ROWS, "count": torch.tensor(7)})
    assert sealed.broken(folder) is None


def test_one_process_remembers_views_and_nothing(model, tmp_path):
    """Two views of one storage are two tensors in the file; where nothing is remembered there is no file."""
    save_remembered(model, str(tmp_path / "nothing"), {})
    assert not (tmp_path / "nothing" / "remembered.safetensors").exists()
    save_remembered(model, str(tmp_path / "views"), {"all": ROWS, "column": ROWS[:, 1], "rows": ROWS[:2]})
    live = {"all": torch.zeros(5, 3), "column": torch.zeros(5), "rows": torch.zeros(2, 3)}
    restore.recall(str(tmp_path / "views"), live)
    assert_same_weights(live, {"all": ROWS, "column": ROWS[:, 1], "rows": ROWS[:2]})
    column = {"column": torch.zeros(5)}
    restore.recall(str(tmp_path / "views"), column)              # the other names belong to other groups
    assert torch.equal(column["column"], ROWS[:, 1])


@pytest.mark.parametrize("saved, says", [
    (None, "remembered.safetensors cannot be read .*, so the run cannot go on from it"),
    ({"ema/w": torch.zeros(3, 5)}, r"holds ema/w of shape \[3, 5\] instead of \[5, 3\]"),
    ({"ema/w": ROWS, "ema/b": torch.ones(1)}, "holds ema/b, which the algorithm does not remember"),
    ({"kl/w": ROWS}, "lacks ema/w"), ({}, "lacks ema/w"), ("cut", "cannot be read")])
def test_what_does_not_fit_is_not_recalled(saved, says, tmp_path):
    path = tmp_path / "remembered.safetensors"
    if saved == "cut":
        path.write_bytes(b"cut")
    elif saved is not None:
        save_file(saved, path)
    live = {"ema/w": torch.full((5, 3), 2.0)}
    with pytest.raises(RunError, match=says) as refused:
        restore.recall(str(tmp_path), live)
    assert "; fix: " in str(refused.value) and "\n" not in str(refused.value)
    assert torch.equal(live["ema/w"], torch.full((5, 3), 2.0))


# ---- only finite numbers

def spoil(step, value, where):
    """After update `step` one weight, or one moment, is `value`."""
    due = Engine.stop_requested

    def patched(engine):
        if engine.step and engine.step.index == step:
            parameter = dict(engine.policy.named_parameters())["lm.model.norm.weight"]
            tensor = parameter if where == "weight" else engine.optimizer.state[parameter][where]
            tensor.data[5] = value
        return due(engine)
    Engine.stop_requested = patched


@pytest.mark.parametrize("step, value, where, names", [
    (2, float("nan"), "weight", "lm.model.norm.weight;"),
    (6, float("inf"), "weight", "lm.model.norm.weight;"),
    (6, float("-inf"), "exp_avg", "exp_avg of lm.model.norm.weight;"),
    (6, float("nan"), "exp_avg_sq", "exp_avg_sq of lm.model.norm.weight;")])
def test_nothing_that_is_not_finite_is_saved(step, value, where, names, model, tmp_path):
    """The last update (6) too: no later loss would show it."""
    child.project(tmp_path, "sft", model, save_every=2)
    result = child.train(tmp_path, patch=spoil, arguments=(step, value, where))
    assert result.code == 1 and "Traceback" not in result.err
    last = f"run/checkpoints/step-{step - 2:06d}" if step > 2 else "none"
    error = result.err.splitlines()[-1]
    assert error.startswith(f"error: not finite after update {step}: {names}")
    assert error.endswith(f"last checkpoint: {last}; fix: lower lr")
    run = tmp_path / "run"
    assert not (run / "final").exists() and not list(run.rglob("*tmp*"))
    found = checkpoint.checkpoints(run)
    assert [checkpoint.step_of(path) for path in found] == list(range(2, step, 2))[-2:]
    assert all(sealed.broken(path) is None for path in found)


@pytest.mark.parametrize("lr, with_eval", [("1e20", True), ("1e20", False), ("1e39", True)])
def test_a_run_of_one_update_that_ruins_the_model(lr, with_eval, model, tmp_path):
    child.project(tmp_path, "sft", model, max_steps=1, warmup=0, save_every="null")
    words = [] if with_eval else ["eval_data=null"]
    result = child.train(tmp_path, f"lr={lr}", *words)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: not finite after update 1: ")
    assert not (tmp_path / "run" / "final").exists()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()

    def refused(constant):
        raise AssertionError(constant)
    rows = [json.loads(line, parse_constant=refused) for line in text.splitlines()]
    assert [row["step"] for row in rows] == ([0, 1, 1] if with_eval else [1])
    if with_eval:
        assert rows[-1] == {"step": 1, "split": "eval", "loss": None}
        assert "held-out rows at step 1: loss nan" in result.err


def test_a_ruined_model_stops_in_the_next_update_where_nothing_is_saved_before(model, tmp_path):
    child.project(tmp_path, "sft", model, save_every="null", eval_data="null")
    result = child.train(tmp_path, "lr=1e20")
    assert result.code == 1 and "in update 2, before the weights were touched" in result.err.splitlines()[-1]


# ---- two ranks

def spoil_on_one_rank(rank, port, count, step, where):
    child.join(rank, port, count)
    from engine.loop import Engine
    due = Engine.stop_requested

    def patched(engine):
        if rank == 1 and engine.step and engine.step.index == step:
            name, tensor = next(iter(shares.saved_tensors(engine.policy).items()))
            assert name == "lm.model.embed_tokens.weight"
            tensor = tensor if where == "weight" else engine.optimizer.state[tensor][where]
            tensor.to_local().data[-1, -1] = float("nan")
        return due(engine)
    Engine.stop_requested = patched


def full_disk(rank, port, count, step):
    child.join(rank, port, count)
    child.full_disk(step)


@pytest.mark.parametrize("patch, arguments, says", [
    (spoil_on_one_rank, (4, "weight"), "not finite after update 4: lm.model.embed_tokens.weight; "),
    (spoil_on_one_rank, (4, "exp_avg_sq"), "after update 4: exp_avg_sq of lm.model.embed_tokens.weight; "),
    (full_disk, (4,), "File too large (os error 27)); earlier checkpoints are untouched; fix: free disk")])
def test_all_ranks_stop_where_a_save_cannot_be_made(patch, arguments, says, model, tmp_path):
    """One rank holds the NaN, one rank writes: both end, with the same line."""
    child.project(tmp_path, "sft", model, output=tmp_path / "run", save_every=2, eval_every=1)
    results = child.train_on_ranks(tmp_path / "config.yml", patch=patch, arguments=arguments)
    for result in results:
        assert result.code == 1 and "Traceback" not in result.err
        assert says in result.err.splitlines()[-1]
    found = checkpoint.checkpoints(tmp_path / "run")
    assert [checkpoint.step_of(path) for path in found] == [2] and sealed.broken(found[0]) is None


def test_rows_are_always_json(tmp_path):
    run = Run(str(tmp_path))
    run.begin("", {}, {}, 0)
    half = "caf\udcc3 \ud83d"           # halves of surrogates, which a file with wrong bytes can give
    row = {"step": 1, "completion": half, "reward": float("nan"), "kl": float("-inf"), "ok": 0.5}
    run.append("samples.jsonl", row)
    run.notice(f"said {half} 好")
    line = (tmp_path / "samples.jsonl").read_bytes().decode("utf-8")
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == row | {"reward": None, "kl": None}
    assert "好" in (tmp_path / "events.log").read_text(encoding="utf-8")


def test_the_summary_leaves_out_what_was_not_finite(tmp_path, capsys):
    run = Run(str(tmp_path))
    run.begin("", {}, {}, 0)
    for step, loss in ((1, 2.0), (2, float("nan"))):
        run.append("metrics.jsonl", {"step": step, "split": "train", "loss": loss, "reward": 1.0})
    run.summary()
    printed = capsys.readouterr().out
    assert "reward" in printed and "loss" not in printed


def test_two_threads_save_the_same_model(tmp_path, monkeypatch):
    """A second save begins and ends within the first one, on a rank that is not the first: both are whole."""
    lm = random_lm(config_of())
    weights = lm.state_dict()
    original = PreTrainedModel.save_pretrained

    def interrupted(this, directory, **options):
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", original)
        save_pretrained(lm, weights, tmp_path / "second")
        original(this, directory, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    save_pretrained(lm, weights, tmp_path / "first")
    for name in ("first", "second"):
        assert_same_weights(load_file(tmp_path / name / "model.safetensors"), weights)


def test_the_command_of_the_summary_is_one_for_a_shell(tmp_path, capsys):
    """The directory of a run may have spaces in its name."""
    run = Run(str(tmp_path / "my run"))
    run.begin("", {}, {}, 0)
    run.summary()
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chat ")]
    assert shlex.split(line)[-1] == str(tmp_path / "my run")
