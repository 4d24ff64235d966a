"""Neural processes: networks that read a data set and predict, `build(tasks, …)` a `bm.ConditionalModel`."""

from bayesmeta.models.neural_processes import attentive_np, cnp, conv_cnp, latent_np, outputs, tnp
from bayesmeta.models.neural_processes.latent import Draws, elbo, importance_weighted, maximum_likelihood
from bayesmeta.models.neural_processes.pixels import pixel_tasks

__all__ = [
    "Draws",
    "attentive_np",
    "cnp",
    "conv_cnp",
    "elbo",
    "importance_weighted",
    "latent_np",
    "maximum_likelihood",
    "outputs",
    "pixel_tasks",
    "tnp",
]
