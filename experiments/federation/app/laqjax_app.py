"""Flower app that runs a point of `experiments.federated`."""

from experiments.federation import flower_apps

server = flower_apps.server  # Flower looks for these names in plain assignments
client = flower_apps.client
