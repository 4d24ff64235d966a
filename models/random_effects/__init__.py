"""The parts of `models/meta_analysis.py`: arguments, the model given tau, prior and posterior of tau, picture."""
