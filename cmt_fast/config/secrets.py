"""Keys and passwords, known by their looks and from the surroundings: they are taken in no recipe, and hidden in what is printed.

A recipe goes into run.json, the report, figures and loggers, so one that holds a key is refused before anything is written; keys
come from the environment, where the libraries look for them. Error lines of others, as of a hub that was asked with a token in
its address, are shown without it.
"""

from __future__ import annotations

import os
import re
from typing import Any

from cmt_fast.config.errors import ConfigError

HIDDEN = "***"
NAMED = re.compile(r"(?i)(api_?key|access_?key|secret|token|passw(or)?d|credential)")
PLACES = re.compile(
    r"(?i)_(files?|path|dir|directory|home|ur[li]|names?|endpoint|type|parallelism)$"
)  # variables, not of keys
SHORTEST = 8  # of a value that is looked for: a shorter one would be found in words
NUMBER = re.compile(r"[\d._:-]{1,15}")
WORD = re.compile(r"[A-Za-z]{1,15}")  # no recipe is refused for one, as for `postgres` in a path
# what keys look like: Hugging Face, AWS, GitHub, GitLab, OpenAI and Anthropic, Google, Slack
LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{28,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-(?:(?:proj|svcacct|admin|ant-\w+|or-v1)-[\w-]{20,}|[A-Za-z0-9]{20,})|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}"
    r"|(?<=[Bb]earer )[\w.~+/-]{16,})"
)
IN_URL = re.compile(  # of a path it has one slash of the two; a drive is no scheme
    r"(://|\b(?:https?|s3|gs|ftp|ssh|git):/)(?:[^/\s:@]*:[^/\s@]+|[^/\s:@]{16,})(?=@)"
)
ASSIGNED = re.compile(  # after a blank a word is none, as of "runs/token: cannot be read"
    r"(?i)((?<![a-z/])(?:[a-z]+_)*(?:api_?key|access_?key(?:_id)?|secret(?:_access_key)?|(?:auth|access)?token|password|passwd"
    r"|signature|x-amz-\w+)[\"']?(?:\s*=\s*|:|:\s+(?=[\"']?\S*\d)|:?\s+(?=[\"']?\S{16}))[\"']?)([^\s&\"',;}\]]{6,})"
)
QUERY = re.compile(  # the last word of a name counts: not ?tokenizer=, not ?sort_key=
    r"(?i)[?&](?:(?:[\w-]*[_-])?(?:token|api_?key|access_?key(?:_?id)?|secret|password|passwd|signature|credential|sig)|key)"
    r"=[^\s&\"']{6,}"
)


def _values() -> list[str]:
    """What variables of the surroundings hold that are named as keys are, the longest first."""
    named = [v for name, v in os.environ.items() if NAMED.search(name) and not PLACES.search(name)]
    found = {v for v in named if len(v) >= SHORTEST and not NUMBER.fullmatch(v) and not os.path.exists(v)}
    return sorted(found, key=len, reverse=True)


def hidden(text: str) -> str:
    """A text with *** for every key and password in it that is known by its looks, its place or from the surroundings."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    text = IN_URL.sub(lambda m: m[1] + HIDDEN, LOOKS.sub(HIDDEN, text))
    text = QUERY.sub(lambda m: m[0].partition("=")[0] + "=" + HIDDEN, text)
    return ASSIGNED.sub(lambda m: m[1] + HIDDEN, text)


def within(text: str, values: list[str] | None = None) -> bool:
    """Whether a value of a recipe holds a key or a password, by what leaves no doubt. values: the surroundings', where they
    are at hand."""
    known = any(value in text for value in (_values() if values is None else values) if not WORD.fullmatch(value))
    return known or bool(LOOKS.search(text) or IN_URL.search(text) or QUERY.search(text))


def refuse(tree: Any, key: str = "", values: list[str] | None = None) -> None:
    """Raises ConfigError for the first value, or name, of a recipe's tree that holds one; it is not repeated."""
    values = _values() if values is None else values  # read once for the whole tree
    if isinstance(tree, dict):
        for name, value in tree.items():
            refuse(str(name), key or "recipe", values)
            refuse(value, f"{key}.{name}".lstrip("."), values)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            refuse(value, key, values)
    elif isinstance(tree, str) and within(tree, values):
        raise ConfigError(
            "holds a key or a password, which would be written into run.json, the report and logs; leave it out and set the "
            "variable of the library that needs it, as HF_TOKEN or WANDB_API_KEY",
            key,
        )
