"""Tucker adapters on the layers of a model: config, targets, state, files, merging; the layers of peft's method."""
