"""World models by name. Values are import paths ``module:make``, resolved when one is asked for."""

REGISTRY = {
    "rssm": "world_models.rssm:make",
}
