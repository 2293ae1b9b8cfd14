"""Flower app that runs a point of `experiments.federated`."""

from experiments.federation.flower_apps import make_apps

both = make_apps()
server = both[0]  # Flower looks for these names in plain assignments
client = both[1]
