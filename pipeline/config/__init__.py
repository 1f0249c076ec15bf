"""The settings of a run: what there is, and how it is read."""

from pipeline.config.reading import CommandLine, ConfigError, describe_accepted, load_config, parse_command_line
from pipeline.config.schema import FIELDS, SECTIONS, Config, OptimConfig, Problem

__all__ = [
    "FIELDS",
    "SECTIONS",
    "CommandLine",
    "Config",
    "ConfigError",
    "OptimConfig",
    "Problem",
    "describe_accepted",
    "load_config",
    "parse_command_line",
]
