"""World models by name. Values are import paths ``module:make``, resolved when one is asked for."""

# Models with a decoder, which Dreamer learns from.
LATENT = {
    "rssm": "world_models.rssm:make",
    "s4wm": "world_models.s4wm:make",
    "r2i": "world_models.s4wm:make_r2i",
    "transformer": "world_models.transformer:make",
    "storm": "world_models.transformer:make_storm",
    "transdreamer": "world_models.transformer:make_transdreamer",
    "koopman": "world_models.koopman:make",
}
REGISTRY = LATENT | {"tdmpc": "world_models.tdmpc:make", "ensemble": "world_models.ensemble:make"}
