"""The second room: what a model is.

Priors, likelihoods and the model built of them (``model.py``) are ordinary Pyro; reading a model's density, recording
it and whitening its task parameters live here too. Nothing here infers anything: ``inference`` does, from the density.
"""
