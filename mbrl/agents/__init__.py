"""Agents: each module provides ``make(config, spec, model, ...) -> mbrl.types.Agent``."""
