"""What a word of a recipe or of the command line means: its key's type says, and nothing is guessed.

YAML 1.1 reads 010 as 8, 1:30 as 90, `no` as false, 1e-3 as text and 2024-01-01 as a date. Here a word stays as it was
written until its key is known. Text is the word itself. Numbers are decimal, with 1e5 and 1_000 for whole ones too, and
0x10, 0o10 and 0b10 as Python has them; one that others would read otherwise is refused with both readings. Yes and no, on
and off, true and false are switches where a switch is meant. `null`, `~` and `None` leave an optional key empty.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cmt_fast.config.errors import ConfigError

NULLS = ("", "~", "null", "none")
SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WHOLE = re.compile(r"[-+]?\d+(_\d+)*", re.ASCII)
NUMBER = re.compile(r"[-+]?((\d+(_\d+)*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
BASED = re.compile(r"[-+]?0[xob][0-9a-f]+", re.IGNORECASE)
SEXAGESIMAL = re.compile(r"[-+]?\d+(:[0-5]?\d)+(\.\d*)?", re.ASCII)
SHORT = re.compile(r"(\d+(?:\.\d+)?)([kM])", re.ASCII)
INFINITE = re.compile(r"([-+]?)\.?(inf|nan)", re.IGNORECASE)
MOST_VALUES, DEEPEST = (
    200_000,
    60,
)  # of a recipe, its aliases written out; one with ImageNet's 21,841 class numbers has those
LARGEST_EXPONENT = 18  # of a whole number; 1e400 would be written out digit by digit


class Word(str):
    """A scalar as it stands in the text, without quotes: what it means is not known yet."""


class Loader(yaml.SafeLoader):
    """Mappings and lists of Words; a quoted scalar is a plain str. Tags and duplicate keys are refused."""


def _scalar(loader: Loader, node: yaml.ScalarNode) -> str:
    return Word(node.value) if node.style is None else node.value


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict:
    out: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} in line {line} is not a name")
        if key in out:
            raise ConfigError(f"{key}: appears twice, again in line {line}")
        out[str(key)] = loader.construct_object(value_node, deep=True)
    return out


Loader.yaml_implicit_resolvers = {}  # no word is resolved by its looks
Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _scalar)
Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str, source: str) -> Any:
    """YAML to mappings, lists and Words. Raises ConfigError naming `source` and the line."""
    try:
        tree = yaml.load(text, Loader)
        _bounded(tree, [MOST_VALUES])
        return tree
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where, why = (f" line {mark.line + 1}" if mark else ""), str(getattr(error, "problem", None) or error)
        if mark and mark.line < len(lines := text.splitlines()) and "\t" in lines[mark.line][: mark.column + 1]:
            why += "; a tab stands where YAML takes spaces"
        raise ConfigError(f"{source}:{where} is not valid YAML ({why})") from None


def _bounded(tree: Any, left: list[int], depth: int = 0) -> None:
    """Raises ConfigError where aliases (*name) make a tree endless or vast, which no reader after this one expects."""
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        what = f"more than {MOST_VALUES:,} values" if left[0] < 0 else f"more than {DEEPEST} levels"
        raise ConfigError(f"it has {what}, or its aliases refer to each other without end", "")
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _bounded(inner, left, depth + 1)


def value(text: str, key: str) -> Any:
    """What stands behind `a.b=` on a command line, all of it: lists and mappings in brackets are YAML, all else a Word.

    No `#` begins a comment and no `: ` a mapping; quotes around the whole are not part of it. Raises ConfigError.
    """
    text = text.strip()
    if text[:1] in ("[", "{"):
        return parse(text, f"override {key}")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if not text:
        raise ConfigError(
            f"has no value behind =; write {key}=null to leave it empty, {key}='\"\"' for empty text", key
        )
    return Word(text)


def natural(tree: Any) -> Any:
    """The same with Words as numbers, switches and nulls by their looks, as YAML 1.2 reads them: where no key says more."""
    if isinstance(tree, dict):
        return {str(k): natural(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [natural(v) for v in tree]
    if not isinstance(tree, Word):
        return tree
    if tree.lower() in ("", "~", "null"):
        return None
    if tree.lower() in ("true", "false"):
        return tree.lower() == "true"
    found: float | None = _whole(tree) if WHOLE.fullmatch(tree) and not _leading_zero(tree) else None
    if found is None and NUMBER.fullmatch(tree) and not _leading_zero(tree):
        found = float(tree)
    return str(tree) if found is None else found


def typed(tree: Any, hint: Any, key: str = "") -> Any:
    """Plain data for `hint`: every word read as its key's type says. What does not fit stays as it is, for the schema to say.

    Raises ConfigError for a number with two readings and for a word where a list or a mapping is needed.
    """
    hint, optional = bare(hint)
    if isinstance(tree, dict):
        return _mapping_of(tree, hint, key)
    if isinstance(tree, Word) and optional and tree.lower() in NULLS:
        return None
    hint = _list_of(tree, hint)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        if isinstance(tree, Word):
            tree = _listed(tree, inner, key)
        of = inner[0] if inner[1:] == (Ellipsis,) else None
        if isinstance(tree, (list, tuple)):
            return [typed(v, of or inner[min(i, len(inner) - 1)], f"{key}.{i}") for i, v in enumerate(tree)]
    if isinstance(tree, (list, tuple)):
        return [natural(v) for v in tree]
    if not isinstance(tree, str):
        return tree
    classes = [c for c in (hint, *inner) if dataclasses.is_dataclass(c)]
    if classes or origin is dict:
        raise ConfigError(f"{str(tree)!r} is not valid; {_instead(tree, classes, key)}", key)
    return _word(tree, inner if origin in (Union, types.UnionType) else (hint,), key)


def _list_of(tree: Any, hint: Any) -> Any:
    """Of a choice between a list and words, the list: for a list, and for a word that is none of the others."""
    lists = (
        [m for m in get_args(hint) if get_origin(m) is tuple] if get_origin(hint) in (Union, types.UnionType) else []
    )
    words = [v for m in get_args(hint) if get_origin(m) is Literal for v in get_args(m)]
    return (
        lists[0]
        if lists and (isinstance(tree, (list, tuple)) or (isinstance(tree, Word) and tree not in words))
        else hint
    )


def bare(hint: Any) -> tuple[Any, bool]:
    """A hint without what annotates it and without None, and whether None was one of its choices."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = tuple(m for m in get_args(hint) if m is not type(None))
    optional = len(members) < len(get_args(hint))
    rest, deeper = bare(members[0]) if len(members) == 1 else (Union[members], False)  # noqa: UP007
    return rest, optional or deeper


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """What the keys of a part of the schema take, annotations with it. Evaluated once: that was a third of reading a recipe."""
    return get_type_hints(cls, include_extras=True)


def _mapping_of(tree: dict, hint: Any, key: str) -> dict:
    """A mapping whose values are read by the part of the schema that its `kind` names; by looks where there is none."""
    below = lambda name: f"{key}.{name}".lstrip(".")
    if get_origin(hint) is dict:
        name_of, of = get_args(hint)
        return {_word(str(k), (name_of,), below(k)): typed(v, of, below(k)) for k, v in tree.items()}
    classes: list[Any] = (
        [hint] if dataclasses.is_dataclass(hint) else [c for c in get_args(hint) if dataclasses.is_dataclass(c)]
    )
    if len(classes) > 1:
        classes = [c for c in classes if getattr(c, "kind", None) == tree.get("kind")]
    if not classes:
        return natural(tree)
    hints = hints_of(classes[0])
    return {str(k): typed(v, hints[k], below(k)) if k in hints else natural(v) for k, v in tree.items()}


def _listed(word: Word, inner: tuple, key: str) -> list:
    """`1,2,4` as a list, and one word as a list of one; only of numbers and words, not of mappings."""
    first, _ = bare(inner[0])
    classes = [c for c in (first, *get_args(first)) if dataclasses.is_dataclass(c)]
    if classes:
        raise ConfigError(f"{str(word)!r} is not valid; {_instead(word, classes, key, '[{{{}}}]')}", key)
    return [Word(part.strip()) for part in word.split(",")]


def _instead(word: str, classes: list, key: str, form: str = "{}") -> str:
    """What to write where a mapping is needed and a word was given."""
    kinds = [c.kind for c in classes if hasattr(c, "kind")]
    if word in kinds and form == "{}":
        return f"write {key}.kind={word}"
    if form != "{}" and NUMBER.fullmatch(word):
        kind, name = next((c.kind, n) for c in classes for n, h in get_type_hints(c).items() if bare(h)[0] is float)
        return f"did you mean {key}={form.format(f'kind: {kind}, {name}: {word}')}?"
    valid = f", of kind {', '.join(kinds)}" if kinds else ""
    return f"it needs {'a list of mappings' if form != '{}' else 'a mapping'}{valid}; `cmt keys {key}` has its keys"


def _word(word: str, members: tuple, key: str) -> Any:
    """One word as the first of a key's types that reads it; as it is where none does."""
    members = tuple(bare(m)[0] for m in members)
    for literal in (v for m in members if get_origin(m) is Literal for v in get_args(m)):
        if str(literal) == word:
            return literal
    if str in members:
        if isinstance(word, Word) and word.lower() in NULLS and word != "none":
            raise ConfigError(f"must be given, and {str(word)!r} means empty; as text it stands in quotes", key)
        return os.path.expanduser(word) if word.startswith("~/") else str(word)
    found: Any = None
    if bool in members:
        found = SWITCHES.get(word.lower())
    if found is None and (int in members or float in members):
        found = _number(word, int in members, key)
    return str(word) if found is None else found


def _number(word: str, whole: bool, key: str) -> int | float | None:
    """A decimal number, None for what is none. Raises ConfigError for what has two readings, or one by another's habit."""
    word = word.strip()
    if _leading_zero(word):
        plain = word.lstrip("+-0_").replace("_", "") or "0"
        octal = str(int(plain, 8)) if re.fullmatch("[0-7]+", plain) else ""
        if octal == plain:
            return int(word.replace("_", ""))
        other = f": YAML and C read it as octal, {octal}, others as {plain}; write {octal} or" if octal else "; write"
        raise ConfigError(f"{word!r} begins with 0{other} {plain}", key)
    if SEXAGESIMAL.fullmatch(word):
        raise ConfigError(f"{word!r} is no number here (YAML 1.1 reads it to the base 60); write it in decimals", key)
    if short := SHORT.fullmatch(word):
        raise ConfigError(f"{word!r} is no number; write {short[1]}e{3 if short[2] == 'k' else 6}", key)
    if BASED.fullmatch(word):
        with_digits = re.sub("^[-+]?", "", word)
        try:
            return int(word.replace(with_digits, with_digits.lower()), 0)
        except ValueError:
            return None
    if infinite := INFINITE.fullmatch(word):
        return float(infinite[1] + infinite[2])
    if NUMBER.fullmatch(word):
        return _whole(word) if whole or WHOLE.fullmatch(word) else float(word)
    ascii_ = unicodedata.normalize("NFKC", re.sub("[\u2010-\u2015\u2212]", "-", word))
    if ascii_ != word and NUMBER.fullmatch(ascii_):
        raise ConfigError(f"{word!r} has characters that are no ASCII; did you mean {ascii_}?", key)
    return None


def _leading_zero(word: str) -> bool:
    return bool(WHOLE.fullmatch(word)) and len(digits := word.lstrip("+-")) > 1 and digits[0] == "0"


def _whole(word: str) -> int | None:
    """A whole number, however it is written: 100000, 1e5, 2.5e6, 1_000. None where it is not whole."""
    try:
        found = Decimal(word.replace("_", ""))
    except InvalidOperation:
        return None
    fits = found == found.to_integral_value() if found.adjusted() <= LARGEST_EXPONENT else False
    return int(found) if fits else int(word) if WHOLE.fullmatch(word) and len(word) < 400 else None
