"""Search rules by name. Values are import paths ``module:make``, resolved when one is asked for."""

REGISTRY = {
    "mppi": "planners.mppi:make",
}
