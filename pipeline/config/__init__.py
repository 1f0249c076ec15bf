"""The settings of a run: what there is, and how it is read."""

from pipeline.config.reading import CommandLine, ConfigError, load_config, parse_command_line
from pipeline.config.schema import FIELDS, Config, may_change

__all__ = ["FIELDS", "CommandLine", "Config", "ConfigError", "load_config", "may_change", "parse_command_line"]
