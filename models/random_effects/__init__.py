"""The parts of `models/meta_analysis.py`: arguments, the model given tau, the prior and posterior of tau, the picture."""
