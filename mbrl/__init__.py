"""Model-based reinforcement learning in JAX: world models, imagination, planning, many seeds at once."""

__version__ = "0.1.0"
