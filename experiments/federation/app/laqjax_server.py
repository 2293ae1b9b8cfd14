"""ServerApp that runs a point of `experiments.federated`."""

from experiments.federation import flower_apps

app = flower_apps.server  # Flower looks for this name in a plain assignment
