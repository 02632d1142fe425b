"""XLA's flags for the tests, and for the processes that they start."""

import importlib.metadata

# Eight simulated devices for the sharding tests. The other flags make programs compile faster and
# run slower: almost all of the tests' time is compilation.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# The older emitters compile a training step in a third of the time and memory. XLA refuses flags
# that it does not know, and jaxlib 0.11 does not have this one any more.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
