"""Pushing a finished model to a Hub of the tests' own, and loading it from there where linpass is not installed."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, Hub
from test_training_card import facts

from linpass import LinformerForCausalLM
from linpass.errors import InputError
from linpass.training.card import write_card
from linpass.training.hub import check_hub
from linpass.training.tokenization import load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXT = [f"The iterator number {n} yields the next object of the sequence. " * 3 for n in range(40)]


def run(body, home, hub, *arguments, token="hf_accepted"):
    """Python in a process that knows the Hub only; returns what it prints, as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=home,
        env=hub.environment(home, token=token, PYTHONPATH=str(ROOT)),
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(build, tiny_config, tmp_path_factory):
    """A finished model as linpass train leaves it."""
    path = tmp_path_factory.mktemp("run") / "final_model"
    tokenizer = train_tokenizer(TEXT, 300)
    config = tiny_config(vocab_size=300, position_embedding="rotary", projection="convolution")
    build(LinformerForCausalLM, config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "training_loss_plot.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (path / "training_log.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    write_card(path, facts(name="final_model", repo_id=f"{OWNER}/tiny", seq_length=32))
    return path


@pytest.fixture(scope="module")
def pushed(hub, folder, tmp_path_factory):
    """What a process printed that pushed and was refused in every way; `hub` holds the repositories after it."""
    # An older push of the same name, whose weights came in shards, beside a file that is somebody's own.
    hub.add(f"{OWNER}/tiny", {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine", "README.md": b"old"})
    hub.add("else/where", {"config.json": b"{}"})
    hub.full.add(f"{OWNER}/full")
    return run(
        """
        import json, sys
        import huggingface_hub
        from linpass import LinformerForCausalLM
        from linpass.errors import InputError
        from linpass.training.hub import check_hub, push_folder
        from transformers import AutoTokenizer, Trainer, TrainingArguments

        folder = sys.argv[1]
        out = {"repo": check_hub("tiny", folder), "default": check_hub(None, folder, private=True)}
        out["url"] = push_folder(folder, out["repo"])
        push_folder(folder, check_hub("branched", folder, revision="trial"), revision="trial")

        model, tokenizer = LinformerForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        model.push_to_hub("by-model")
        arguments = TrainingArguments("trainer", hub_model_id="by-trainer", use_cpu=True, report_to="none")
        Trainer(model, arguments, processing_class=tokenizer).push_to_hub()

        def refusal(function, *arguments, **others):
            try:
                return function(*arguments, **others)
            except InputError as error:
                return f"InputError: {error}"

        out["name"] = refusal(check_hub, "not a name", folder)
        out["folder_name"] = refusal(check_hub, None, "runs/..--..")
        out["wrong_token"] = refusal(check_hub, "tiny", folder, token="hf_other")
        out["other_owner"] = refusal(check_hub, "else/where", folder)
        out["new_of_other_owner"] = refusal(check_hub, "else/new", folder)
        out["full"] = refusal(push_folder, folder, check_hub("full", folder))
        huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody listens
        out["no_network"] = refusal(check_hub, "tiny", folder)
        print(json.dumps(out))
        """,
        tmp_path_factory.mktemp("pusher"),
        hub,
        folder,
    )


def test_the_whole_folder_is_pushed_in_one_commit(hub, pushed, folder):
    assert pushed["repo"] == f"{OWNER}/tiny"
    assert pushed["url"] == f"{hub.url}/{OWNER}/tiny"
    local = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "modeling_linformer.py", "README.md"} <= local.keys()
    assert {"training_log.jsonl", "training_loss_plot.png"} <= local.keys()
    assert hub.commits[f"{OWNER}/tiny"] == 1
    # The shards of the older model, which the new one does not have, are gone.
    assert hub.files(f"{OWNER}/tiny") == {**local, "notes.txt": b"mine"}


def test_a_branch_is_made_and_main_stays(hub, pushed, folder):
    assert hub.files(f"{OWNER}/branched", branch="trial").keys() >= {path.name for path in folder.iterdir()}
    assert hub.files(f"{OWNER}/branched").keys() == {".gitattributes"}


def test_without_a_name_it_is_the_folders_and_private_stays_private(hub, pushed):
    assert pushed["default"] == f"{OWNER}/final_model"
    asked = hub.created[f"{OWNER}/final_model"]
    assert asked.get("private") is True or asked.get("visibility") == "private"


def test_transformers_own_pushes_carry_the_code(hub, pushed):
    for name in ("by-model", "by-trainer"):
        files = hub.files(f"{OWNER}/{name}")
        assert {"config.json", "model.safetensors", "modeling_linformer.py", "attention_linformer.py"} <= files.keys()
        assert "AutoModelForCausalLM" in json.loads(files["config.json"])["auto_map"]


def test_loads_by_name_without_linpass_with_the_same_logits(hub, pushed, folder, tmp_path):
    output = run(
        """
        import json, sys
        sys.modules["linpass"] = None  # imports of it fail as if it were not installed
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

        repo, ids = sys.argv[1], torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules.")
        write = pipeline("text-generation", model=repo, trust_remote_code=True)
        text = write("The iterator", max_new_tokens=12, do_sample=False)[0]["generated_text"]
        trained = AutoModelForCausalLM.from_pretrained("somebody/by-trainer", trust_remote_code=True).eval()
        assert torch.equal(trained(ids).logits, model(ids).logits)
        code = open(sys.argv[2]).read().split("```python\\n")[2].split("```")[0]
        exec(code)  # what the model card says
        print(json.dumps({"logits": model(ids).logits.tolist(), "text": text}))
        """,
        tmp_path,
        hub,
        f"{OWNER}/tiny",
        folder / "README.md",
        token=None,
    )
    model = LinformerForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert torch.equal(torch.tensor(output["logits"]), model(ids).logits)
    tokenizer = load_tokenizer(str(folder), 300)
    inputs = tokenizer("The iterator", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert output["text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("name", r"hub_model_id='not a name' must be NAME or OWNER/NAME"),
        ("folder_name", r"hub_model_id='\.\.--\.\.' \(the name of output_dir\) must be"),
        ("wrong_token", r"hub_token=\*\*\* must be a valid token of http://127"),
        ("other_owner", r"hub_model_id='else/where' must be a repository that the token may write to"),
        ("new_of_other_owner", r"hub_model_id='else/new' must be a repository that the token may write to"),
        ("no_network", r"push_to_hub=True must be able to reach the Hub; http://127\.0\.0\.1:9 does not answer"),
    ],
)
def test_what_cannot_be_pushed_is_refused_by_name(pushed, case, message):
    assert re.match(f"InputError: {message}", pushed[case])
    assert "hf_" not in pushed[case]  # no token is ever shown
    assert "\n" not in pushed[case]


def test_a_failed_upload_names_the_folder_and_a_command_that_works(hub, pushed, folder, tmp_path):
    assert "push_to_hub=True: hub_model_id='somebody/full' must be" in pushed["full"]
    assert f"the model is complete in {str(folder)!r}" in pushed["full"]
    assert (folder / "model.safetensors").is_file()
    command = shlex.split(pushed["full"].partition("to push it later: ")[2])
    assert command[:2] == ["hf", "upload"]
    hub.full.clear()
    command[0] = str(Path(sys.executable).with_name("hf"))
    environment = hub.environment(tmp_path)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    assert hub.files(f"{OWNER}/full").keys() >= {path.name for path in folder.iterdir()}


def test_offline_is_told_by_its_variable(folder):
    with pytest.raises(InputError, match="HF_HUB_OFFLINE=1 forbids it"):  # set for all tests
        check_hub("tiny", folder, token="hf_accepted")


def test_without_a_token_it_says_how_to_log_in(folder, monkeypatch):
    monkeypatch.setattr("linpass.training.hub.get_token", lambda: None)
    with pytest.raises(InputError, match="hub_token=None must be a token .* hf auth login"):
        check_hub("tiny", folder)


def test_the_hub_of_the_tests_has_data_sets_and_misses_others(hub, tmp_path):
    hub.add("owner/lines", {"train.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}, kind="datasets")
    output = run(
        """
        import json
        from datasets import load_dataset
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        out = {}
        try:
            HfApi().dataset_info("owner/none")
        except RepositoryNotFoundError:
            out["info"] = "not found"
        try:
            load_dataset("owner/none")
        except Exception as error:
            out["load"] = type(error).__name__
        out["known"] = load_dataset("owner/lines", split="train")["text"][:]
        out["streamed"] = [row["text"] for row in load_dataset("owner/lines", split="train", streaming=True)]
        print(json.dumps(out))
        """,
        tmp_path,
        hub,
    )
    assert output == {
        "info": "not found",
        "load": "DatasetNotFoundError",
        "known": ["one", "two"],
        "streamed": ["one", "two"],
    }
