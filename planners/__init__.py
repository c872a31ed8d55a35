"""Search rules by name. Values are import paths ``module:make``, resolved when one is asked for."""

REGISTRY = {
    "mppi": "planners.mppi:make",
    "mppi_classic": "planners.mppi:make_classic",
    "cem": "planners.cem:make",
    "icem": "planners.icem:make",
    "random": "planners.random:make",
    "gradient": "planners.gradient:make",
    "policy": "planners.policy:make",
    "guided": "planners.policy:make_guided",
}
