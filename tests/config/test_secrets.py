"""Keys and passwords: refused in a recipe, hidden in what is printed, written nowhere."""

from __future__ import annotations

import json
import subprocess

import pytest

from cmt_fast.config import loading, secrets
from cmt_fast.config.errors import ConfigError, one_line, printable
from cmt_fast.storage import loggers
from tests.fixtures import tiny

KEYS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
}
LOOKS = (
    "hf_abcdefghijklmnopqrstuvwxyz0123", "AKIAIOSFODNN7EXAMPLE", "ghp_abcdefghijklmnopqrstuvwxyz0123",
    "sk-abcdefghijklmnopqrstuv",
    "https://user:pass@host/data", "https://host/data?token=abcdef123456", "s3://host/x?X-Amz-Signature=abcdef0123",
    "sk-proj-abc_def-0123456789abcdef", "https://a.blob/data?sig=abcdef0123",
    "https:/user:pass@host/data",
)  # fmt: skip
PLAIN = (
    "runs/token",
    "runs/token: cannot be read",
    "https://host/data?tokenizer=sd-vae-ft-ema&sort_key=filename",
    "sk-learn-digits-8x8-balanced",
    "D:/imagenet512latents@v2/x=1",
    "ASIAPACIFICIMAGES2020",
    "hf_imagenetlatentsfloat16",
    "/backup/postgres/digits",
    "20000000 images",
    "stabilityai/sd-vae-ft-ema",
    "/data/key=3/x",
    "https://host/data?page=2",
    "hf_home",
    "a:b@c",
    "sk-learn",
    "mid.lr=1e-4",
)


@pytest.mark.parametrize("text", [*KEYS.values(), *LOOKS])
def test_a_key_is_taken_in_no_recipe_and_is_hidden_in_a_line(text, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for override in (f"data={{kind: npz, path: '{text}'}}", f"name='x {text}'", f"eval.vae={text}"):
        with pytest.raises(ConfigError, match="holds a key or a password") as refused:
            loading.load("digits", [override])
        assert text not in str(refused.value)
    shown = secrets.hidden(f"cannot open {text}: not found")
    secret = text.partition(":/")[2].lstrip("/").partition("@")[0] if "@" in text else text.partition("=")[2] or text
    assert (
        secret not in shown
        and secrets.HIDDEN in shown
        and shown.startswith("cannot open ")
        and shown.endswith("not found")
    )


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_key_is_neither_refused_nor_hidden(text, monkeypatch):
    for name, value in {
        "MAX_TOKENS": "20000000",
        "HF_TOKEN_PATH": "cannot be read",
        "KEY_SECRET_NAME": "filename",
    }.items():
        monkeypatch.setenv(name, value)
    secrets.refuse({"a": [text]})
    assert secrets.hidden(text) == text


def test_a_password_that_is_a_word_is_hidden_and_refuses_no_recipe(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    secrets.refuse({"a": ["/backup/postgres/digits"]})
    assert secrets.hidden("no access with postgres") == "no access with ***"


def test_a_run_on_record_is_read_whatever_is_in_it(tmp_path):
    run = loading.dump(loading.load("digits")) | {"name": LOOKS[0]}
    (tmp_path / "run.json").write_text(json.dumps({"run": run, "digest": "x"}), "utf-8")
    assert loading.load(str(tmp_path / "run.json")).name == LOOKS[0]


def test_errors_and_loggers_say_no_key(tmp_path, monkeypatch, capsys):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    done: subprocess.CompletedProcess = tiny.cmt("report", f"{tmp_path}/{KEYS['HF_TOKEN']}")
    assert done.returncode == 2 and KEYS["HF_TOKEN"] not in done.stderr and secrets.HIDDEN in done.stderr
    loggers._told("wandb", "mid", RuntimeError(f"401: api_key {KEYS['WANDB_API_KEY']}\nis wrong"))
    said = capsys.readouterr().err
    assert KEYS["WANDB_API_KEY"] not in said and said.count("\n") == 1 and "401" in said


def test_foreign_text_is_shown_in_one_printable_line():
    bad = "a\x1b[31m\x00b\u202ec\ud800\n d\x85e\u200b"
    assert printable(bad) == "a\\x1b[31m\\x00b\\u202ec\\ud800\n d\\x85e\\u200b"
    assert one_line(bad).isprintable() and one_line(bad).startswith("a\\x1b[31m")
    assert one_line("Fréchet – 3 × 4") == "Fréchet – 3 × 4" and one_line("abcdef", 3) == "abc..."
    assert str(ConfigError("a: \x1b[2J" + "x" * 9000)).isprintable() and len(str(ConfigError("x" * 9000))) < 3100
