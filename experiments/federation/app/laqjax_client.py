"""ClientApp that runs a point of `experiments.federated`."""

from experiments.federation import warm

app = warm.client  # Flower looks for this name in a plain assignment
