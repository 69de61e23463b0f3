import torch
from hypothesis import HealthCheck, settings

# The same examples at every run, so that a red run is red again.
settings.register_profile(
    "flexattn", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flexattn")
torch.set_num_threads(2)
