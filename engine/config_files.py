"""Configurations as JSON files and as NAME=VALUE; reading them back refuses unknown keys."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import cattrs

from mentorch.engine.config import RunConfig
from mentorch.engine.files import replace_text

C = TypeVar("C", bound=RunConfig)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    return converter


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as JSON."""
    replace_text(path, json.dumps(asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path, kind: type[C]) -> C:
    """Reads what `save_config` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown or ill-typed keys, all of them named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a run folder: it has no {path.name}")
    try:
        return _converter().structure(json.loads(path.read_text()), kind)
    except (json.JSONDecodeError, cattrs.BaseValidationError) as error:
        problems = "; ".join(cattrs.transform_error(error, path=path.name))
        raise ValueError(f"{path} is not a configuration of this recipe: {problems}") from error


T = TypeVar("T")


def with_options(config: T, options: Sequence[str]) -> T:
    """A part of a configuration with some values changed.

    Args:
        config: a dataclass of this module.
        options: ``name=value`` each, the value in JSON.

    Raises:
        ValueError: no such option, or a value that does not fit.
    """
    changes: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{option!r} is not NAME=VALUE with a JSON value: {error}") from error
    values: dict[str, Any] = asdict(config) | changes  # type: ignore[call-overload]
    try:
        return _converter().structure(values, type(config))
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, path=type(config).__name__))
        raise ValueError(f"these options do not fit, {', '.join(options)}: {problems}") from error
