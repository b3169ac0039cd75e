"""The inference engine: scheduler, caches, runner, sampler and the process that hosts them."""
